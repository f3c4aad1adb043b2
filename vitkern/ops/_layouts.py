"""Which axis of every tensor of an op is the batch, and which the heads: what the sharding rules are made of.

A layout has a letter for each axis: ``b`` the batch, ``h`` the heads (the channels of a scan), ``k`` the heads of keys and values
(its groups), ``*`` any number of axes, another letter an axis that has a name, ``.`` any other. ``(bx)`` is one axis of as many
entries as both together, ``(b*)`` of a multiple of the batch. ``+`` in front: what lacks an axis is a sum over it. ``|`` separates
layouts of different ranks. A tensor whose axis has length 1 broadcasts.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """`inputs` and `outputs` name the layouts of an op's tensors, in the order of its schema."""

    inputs: str
    outputs: str
    mixing: tuple[str, ...] = ()  # tensors that join the heads where they are given
    whole: dict[str, tuple[str, ...]] = field(default_factory=dict)  # option -> values with which heads stay together
    products: dict[str, str] = field(default_factory=dict)  # letter -> the option whose product is its length
    windows: bool = False  # whole windows along an axis that does not shift may be apart


_NEIGHBORS = "b...h. b...k."
_ROWS = "b.. b. b. b."  # rows, and a plan of what becomes of them

LAYOUTS = {
    "attention": Layout(
        "b.h. b.k. b.k. bh.. bh.. bh.. h h seed bh.. bh.. b.h.|.. b.h.|.. b.h|b.h. "
        "b.h|b.h. h b.. b.. b. b. * b.h . . * "
        "* * * b. bh.. bh.. bh.. "
        "* b.. b.h. b.h. bh.. bh.. "
        "bh..",
        "b.h. b.h b.h",
        mixing=("pre_weight", "pre_bias", "post_weight", "post_bias"),
    ),
    "window_attention": Layout("b*h. b*k. b*k. h..|.h .. h k. k. seed", "b*h. b*h", windows=True),
    "window_attention_qkvpacked": Layout("b*.h. h..|.h .. h h. h. seed", "b*h. b*h", windows=True),
    "linear_attention": Layout(
        "by.x.h. by.x.k. by.x.k. by.x. by.x.k (byx).h. (byx).h. (byx).k. (byx).k. . . h* h* h*",
        "by.x.h. (b*)k.. (b*)k.",
        whole={"feature_map": ("focused_width", "favor", "favor_relu", "hash")},
    ),
    "feature_rows": Layout("b.h. b. b.h", "b.h."),
    "chain_sum": Layout("b.h. b.h. b.h. b.h. (b*)h.. . .", "b.h. (b*)h.."),
    "chain_links": Layout("b.h. b.h. b.h. b.h. b.h. (b*)h.. (b*)h.. . .", "b.h."),
    "grid_sum": Layout("b..h. b..h. b..h. b..h b..h", "b..h."),
    "grid_links": Layout("b..h. b..h. b..h. b..h. b..h b..h", "b..h b..h"),
    "channel_attention": Layout("b..h. b..h. b..h. (h*) . b.. . b.", "b..h. b.h.. b.h."),
    "selective_scan": Layout(
        "b..h b..h .h. b..k. b..k. .h b..h .h b..h. .h. .. .", "b..h. b.h|b..h", mixing=("delta_weight",)
    ),
    "deformable_attention": Layout("b.h. b.h... b.h..", "b.h."),
    "neighborhood_attention": Layout(f"{_NEIGHBORS} b...k. h... b... b.k. b.k.", "b...h. b...h"),
    "neighborhood_qk": Layout(f"{_NEIGHBORS} h...", "b...h."),
    "neighborhood_av": Layout(_NEIGHBORS, "b...h."),
    "sampled_window_attention": Layout("b..h. b..k. b..k. b...(h*). b...(h*). b.h.. h..|.h ..", "b..h."),
    "depthwise_value": Layout("b.hd (hd)... (hd)", "b.hd"),
    "window_rows": Layout("b*h. h. b. b.", "(b*).h."),
    "window_sum": Layout("(bw).h. b. b.", "b*h. +h.", products={"w": "counts"}),
    "mask_from_logits": Layout("b... b.", "b.."),
    "bipartite_match": Layout("b.* b. b.", "b. b. b."),
    "merge_plan": Layout("b. b. b. b b", "b. b. b. b"),
    "merge_tokens": Layout(f"{_ROWS} b.", "b.. b."),
    "unmerge_tokens": Layout(_ROWS, "b.."),
    "select_tokens": Layout("b. b", "b. b. b. b"),
    "restore_tokens": Layout("b.. b. b.. .", "b.."),
    "soft_merge": Layout("b.. b.. b. b.", "b. b.."),
    "cluster_tokens": Layout("b.. b.. b. b.", "b. b. b."),
    "cluster_kmeans": Layout("b.. b.. b.", "b.. b.. b."),
    "reconstruct_tokens": Layout("b.. b.. b..", "b.."),
}
