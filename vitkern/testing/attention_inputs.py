"""What a call of attention in the tests is made of: tensors, typed modifiers and options from a few words."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import CosineScore
from vitkern.bias import (
    ContextualPosition,
    DecomposedRelativePosition,
    EuclideanDistance,
    KeyBias,
    ManhattanDecay,
    PolylinePath,
    RelativePosition,
    table_rows,
)
from vitkern.mask import BlockCausal, Causal, FromLogits, Segments
from vitkern.modulation import ElementwiseMask, GaussianMixture, Policy, SoftCausal, TalkingHeads
from vitkern.testing import attention_options
from vitkern.testing.registry import Call, label
from vitkern.testing.window_attention import leaf_shape, view

NORMALIZERS = ("softmax", "softmax", "softmax", "sigmoid", "relu", "none")
# 0: broadcast. A bias with neither queries nor keys adds one number to all scores of a head: its gradient is a sum of all
# of them that cancels, and is compared in float64 alone (tests/test_attention.py).
PATTERNS = tuple((b, h, q, k) for b in (0, 1) for h in (0, 1) for q in (0, 1) for k in (0, 1) if q or k)

PREFIX = 2
TABLES = {
    "table": ("query-key", 0, 1),
    "prefix": ("key-query", PREFIX, 1),
    "strided": ("abs", 0, 2),
}  # RelativePosition
POSITIONS: dict[str, Callable[..., Any]] = {
    **{
        name: lambda t, grid, how=how: RelativePosition(t["table"].t(), None, grid, *how)  # type: ignore[misc]
        for name, how in TABLES.items()
    },
    "decay": lambda t, grid: ManhattanDecay(t["rate"], grid, "prob"),
    "context": lambda t, grid: ContextualPosition(t["t_q"], t["t_k"], t["t_v"], t["index"]),
    "keys of context": lambda t, grid: ContextualPosition(None, t["t_k"], None, t["index"]),
    "values of context": lambda t, grid: ContextualPosition(None, None, t["t_v"], t["index"][0]),
    "axes": lambda t, grid: DecomposedRelativePosition(t["axis_y"], t["axis_x"], grid, grid),
    "pooled": lambda t, grid: DecomposedRelativePosition(t["axis_y"], t["axis_x"], half(grid), grid),
    "pooled keys": lambda t, grid: DecomposedRelativePosition(t["axis_y"], t["axis_x"], grid, half(grid)),
    "decomposed": lambda t, grid: DecomposedRelativePosition(t["rel_y"], t["rel_x"], None, grid),
    "manhattan": lambda t, grid: ManhattanDecay(t["rate"], grid),
    "euclidean": lambda t, grid: EuclideanDistance(t["slope"], t["q_xy"], t["k_xy"]),
    "two decays": lambda t, grid: [ManhattanDecay(t["rate"], grid), POSITIONS["axes"](t, grid)],
    "two distances": lambda t, grid: [EuclideanDistance(s, t["q_xy"], t["k_xy"]) for s in (t["slope"], t["slope_2"])],
    "path": lambda t, grid: PolylinePath(t["row"], t["col"]),
    "transposed": lambda t, grid: PolylinePath(t["row"], t["col"], transpose=True),
}
AXES = ("axes", "pooled", "pooled keys", "two decays")
RULES = {
    "segments": lambda q, k, allow: Segments(q, k),
    "table": lambda q, k, allow: Segments(q, k, allow),
    "levels": lambda q, k, allow: BlockCausal(q, k),
    "stripes": lambda q, k, allow: Segments(q, k),
}
MASKS = (
    "none", "none", "dense", "empty", "causal", "segments", "table", "levels", "logits", "block", "both", "stripes",
    "tiles",
)  # fmt: skip
FACTORS = {
    "gain": lambda t, grid: ElementwiseMask(t["factors"]),
    "weight": lambda t, grid: ElementwiseMask(t["factors"], "prob"),
    "mixture": lambda t, grid: GaussianMixture(t["sigma"], t["alpha"], grid),
    "behind": lambda t, grid: GaussianMixture(t["sigma"], t["alpha"], grid, PREFIX),
    "soft": lambda t, grid: SoftCausal(t["ratio"]),
    "policy": lambda t, grid: Policy(t["keep"], 1e-3),
    "heads": lambda t, grid: TalkingHeads(t["pre"], t["pre_bias"], t["post"], t["post_bias"]),
}


def half(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of every second row and column."""
    return -(-grid[0] // 2), -(-grid[1] // 2)


def make(
    seed: int,
    batch: int,
    queries: int,
    keys: int,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    bias: tuple[int, int, int, int] | None = None,
    key_bias: bool = False,
    masks: str = "none",
    typed: str = "",
    grid: tuple[int, int] = (1, 1),
    modulation: str = "",
    factor: tuple[int, int] = (1, 1),
    weighed: bool = False,
    cosine: bool = False,
    scale: Any = None,
    sink: bool = False,
    extra: int = 0,
    beside: str = "",
    repeated: bool = False,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`bias`: which axes it has; `typed`: a bias of positions on `grid`, whose tokens are the keys (and, but for decomposed and
    euclidean, the queries); `masks`: none, dense, empty (a row sees nothing), causal, segments, table, levels, logits,
    block (of some pairs), both, stripes (segments in order), tiles (most of 16 by 16 scores of a head are hidden);
    `modulation`: keys of FACTORS, joined by "+"; `factor`: which of the axes of queries and keys that of "gain" and "weight" has;
    `weighed`: key_mean has query weights; `scale`: "heads" is a tensor; `extra`: further keys; `beside`: NAMES of
    attention_options, joined by "+"; `repeated`: bias and factors are expanded to all scores; `layout` as of window_attention."""
    g = torch.Generator().manual_seed(seed)
    kv_heads, dv = kv_heads or heads, dv or d

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    groups = (("q", queries, heads, d), ("k", keys, kv_heads, d), ("v", keys, kv_heads, dv))
    tensors = {name: normal(*leaf_shape(layout, batch, (n,), h, width)) for name, n, h, width in groups}
    full = (batch, heads, queries, keys)
    if bias is not None:
        tensors["bias"] = normal(*(n if has else 1 for n, has in zip(full, bias, strict=True)))
    if key_bias:
        tensors["key_bias"] = normal(batch, 1, keys)
    if masks in ("dense", "empty", "both"):
        tensors["mask"] = torch.rand(batch, 1, queries, keys, generator=g) < 0.7
        if masks == "empty":
            tensors["mask"][:, :, 0] = False
    if masks == "tiles":
        seen = torch.rand(batch, heads, -(-queries // 16), -(-keys // 16), generator=g) < 0.1
        tensors["mask"] = seen.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :queries, :keys].contiguous()
        tensors["mask"] &= torch.rand(batch, 1, queries, keys, generator=g) < 0.8
    if masks == "stripes":
        tensors["ids"] = torch.arange(max(queries, keys))[None] * 4 // max(1, queries, keys)
        tensors["allow"] = torch.ones(1, 1, dtype=torch.bool)
    if masks in ("segments", "table", "levels"):
        tensors["ids"] = torch.randint(-1, 3, (1, max(queries, keys)), generator=g)
        tensors["allow"] = torch.rand(3, 3, generator=g) < 0.6
    if masks in ("logits", "block"):
        tensors["logits"] = normal(batch, queries - (masks == "block" and queries > 0), 3, 4)
    if typed == "decomposed":
        tensors["rel_y"], tensors["rel_x"] = normal(batch, queries, heads, grid[0]), normal(1, queries, 1, grid[1])
    if typed in AXES:
        tensors |= {f"axis_{name}": normal(2 * n - 1, d) / 2 for name, n in zip("yx", grid, strict=True)}
    if "context" in typed:
        tensors["index"] = torch.randint(0, 7, (batch, queries, keys), generator=g, dtype=torch.int32)
        tensors |= {"t_q": normal(7, 1, d) / 2, "t_k": normal(7, heads, d) / 2, "t_v": normal(7, heads, dv)}
        tensors = {
            n: t for n, t in tensors.items() if typed == "context" or n not in {"t_q", "t_k", "t_v"} - {f"t_{typed[0]}"}
        }
    if typed in TABLES:
        tensors["table"] = normal(heads, table_rows(grid, *TABLES[typed][:2]))
    if typed in ("manhattan", "decay", "two decays"):
        tensors["rate"] = -torch.rand(heads, generator=g, dtype=torch.float64)
    if typed in ("euclidean", "two distances"):
        tensors["slope"] = torch.rand(heads, generator=g, dtype=torch.float64)
        tensors["q_xy"], tensors["k_xy"] = normal(batch, queries, 2), normal(1, keys, 2)
    if typed == "two distances":
        tensors["slope_2"] = torch.rand(heads, generator=g, dtype=torch.float64)
    if typed in ("path", "transposed"):
        tensors["row"], tensors["col"] = -normal(batch, *grid, heads).abs() / 4, normal(batch, *grid, heads) / 4
    factors = modulation.split("+") if modulation else []
    if {"gain", "weight"} & {*factors}:
        tensors["factors"] = normal(
            1, heads, *(n if has else 1 for n, has in zip((queries, keys), factor, strict=True))
        )
    if {"mixture", "behind"} & {*factors}:
        tensors["sigma"], tensors["alpha"] = normal(2, heads).abs() + 1, normal(2, heads)
    if "heads" in factors:
        tensors |= {"pre": normal(heads, heads), "pre_bias": normal(heads), "post": normal(heads, heads)}
        tensors["post_bias"] = normal(heads)
    if "policy" in factors:
        tensors["keep"] = torch.rand(batch, keys, generator=g, dtype=torch.float64).round(decimals=1)
    if "soft" in factors:
        tensors["ratio"] = torch.rand((), generator=g, dtype=torch.float64)
    if weighed:
        tensors["query_weight"] = torch.rand(batch, queries, generator=g, dtype=torch.float64) + 0.1
    if cosine:
        tensors["logit_scale"] = normal(heads) + 2
    if scale == "heads":
        tensors["scale"] = torch.rand(heads, generator=g, dtype=torch.float64)
    if sink:
        tensors["sink"] = normal(heads)
    if extra:
        tensors["more_k"], tensors["more_v"] = normal(1, extra, kv_heads, d), normal(1, extra, kv_heads, dv)
    names = beside.split("+") if beside else []
    field = (1, keys) if math.prod(grid) == 1 or typed == "pooled keys" else grid
    passed = (view(layout, tensors[name], 1, h) for name, _, h, _ in groups)
    tensors |= attention_options.tensors(names, seed, g, *passed)
    parameters = frozenset(tensors) - {"q", "k", "v", "more_k", "more_v"}

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: dict[str, Any] = dict(options)
        if repeated:
            t = {name: x.expand(full) if name in ("bias", "factors") else x for name, x in t.items()}
        q, k, v = (view(layout, t[name], 1, h) for name, _, h, _ in groups)
        biases: list[Any] = [t["bias"]] if bias is not None else []
        if "expanded" in names:
            biases = [t["bias"].expand(len(q), heads, q.shape[1], k.shape[1])]
        biases += [KeyBias(t["key_bias"])] if key_bias else []
        made = POSITIONS[typed](t, grid) if typed else []
        biases += made if isinstance(made, list) else [made]
        hidden: list[Any] = [t["mask"]] if "mask" in t else []
        if masks in ("causal", "both"):
            hidden.append(Causal(k.shape[1] - q.shape[1]))
        if masks in RULES:
            hidden.append(RULES[masks](t["ids"][:, : q.shape[1]], t["ids"][:, : k.shape[1]], t["allow"]))
        if masks == "logits":
            hidden.append(FromLogits(t["logits"], (1, k.shape[1])))
        if masks == "block":
            last, behind = (q.shape[1] - t["logits"].shape[1], q.shape[1]), (k.shape[1] // 3, k.shape[1])
            size = (1, behind[1] - behind[0])
            hidden.append(FromLogits(t["logits"], size, empty="none", rows=last, cols=behind))
        given["modulation"] = [FACTORS[name](t, grid) for name in factors]
        if weighed:
            given["query_weight"] = t["query_weight"]
        rows, others, further = attention_options.place(names, seed, t, field, q, k)
        given |= further | {
            "bias": biases + rows,
            "mask": hidden + others,
            "scale": t.get("scale", scale),
            "sink": t.get("sink"),
        }
        if cosine:
            given["cosine"] = CosineScore(t["logit_scale"])
        if extra:
            given["extra_kv"] = (t["more_k"], t["more_v"])
        return (q, k, v), given

    facts: dict[str, Any] = {"B": batch, "Nq": queries, "Nk": keys, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv}
    facts |= {
        "bias": bias,
        "typed": typed,
        "grid": grid,
        "modulation": modulation,
        "weighed": weighed,
        "beside": beside,
        "repeated": repeated,
    }
    facts |= {"key_bias": key_bias, "masks": masks, "cosine": cosine, "scale": scale, "sink": sink, "extra": extra}
    text = label(seed, facts | {"layout": layout} | options)
    return Call(text, vitkern.attention, build, tensors, parameters, expanded_gradient, seed)
