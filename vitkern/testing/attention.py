"""Sampled and hand-picked calls of attention: those that its op serves."""

import math
import random
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
from vitkern.ops._dropout import Stream
from vitkern.testing import attention_options
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import HEAD_SIZES, leaf_shape, view

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
    "path": lambda t, grid: PolylinePath(t["row"], t["col"]),
    "transposed": lambda t, grid: PolylinePath(t["row"], t["col"], transpose=True),
}
AXES = ("axes", "pooled", "pooled keys")
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
    `modulation`: keys of FACTORS, joined by "+"; `weighed`: key_mean has query weights; `scale`: "heads" is a tensor; `extra`:
    further keys; `beside`: NAMES of attention_options, joined by "+"; `repeated`: bias and factors are expanded to all scores;
    `layout` as of window_attention."""
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
    if typed in ("manhattan", "decay"):
        tensors["rate"] = -torch.rand(heads, generator=g, dtype=torch.float64)
    if typed == "euclidean":
        tensors["slope"] = torch.rand(heads, generator=g, dtype=torch.float64)
        tensors["q_xy"], tensors["k_xy"] = normal(batch, queries, 2), normal(1, keys, 2)
    if typed in ("path", "transposed"):
        tensors["row"], tensors["col"] = -normal(batch, *grid, heads).abs() / 4, normal(batch, *grid, heads) / 4
    factors = modulation.split("+") if modulation else []
    if {"gain", "weight"} & {*factors}:
        tensors["factors"] = normal(1, heads, queries, keys)
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
        biases += [POSITIONS[typed](t, grid)] if typed else []
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


def draw(rng: random.Random) -> Call:
    """One of three is of positions on a grid, of factors, or of statistics; the others are plain."""
    queries, keys = (rng.choice((1, 2, 7, 33, 64, 65, 100, 197)) for _ in range(2))
    kind = rng.choice(("plain", "plain", "plain", "typed", "factors", "stats", "hard"))
    more: dict[str, Any] = {}
    if kind in ("typed", "factors"):
        grid = rng.choice(((1, 1), (2, 5), (7, 9), (13, 6), (14, 14)))
        queries = keys = grid[0] * grid[1]
        more["grid"] = grid
        more["typed" if kind == "typed" else "modulation"] = rng.choice(
            tuple(POSITIONS if kind == "typed" else FACTORS)
        )
        if more.get("typed") in ("decomposed", "euclidean"):
            queries = rng.choice((1, 7, 65))
        if more.get("typed") in ("strided", "pooled"):
            queries = math.prod(half(grid))
        if more.get("typed") == "pooled keys":
            keys = math.prod(half(grid))
        if "prefix" in more.values() or "behind" in more.values():
            queries = keys = keys + PREFIX
    heads = rng.choice((1, 2, 3, 4))
    d = rng.choice(HEAD_SIZES if queries * keys < 5000 else HEAD_SIZES[:9])
    # a direction of one dimension has no gradient to compare; with one head that of logit_scale is one number, which can be lucky
    cosine = rng.random() < 0.2 and d > 1 and heads > 1
    options: dict[str, Any] = {"normalizer": rng.choice(NORMALIZERS)}
    if options["normalizer"] == "softmax":
        options |= {"sink": rng.random() < 0.2, "return_stats": rng.choice(((), ("lse",)))}
    if more.get("modulation") == "policy":
        options = {"normalizer": "softmax"}
    if kind == "hard" and d >= 8:
        options = {"normalizer": rng.choice(("argmax_k", "argmax_q"))}
    if kind == "stats":
        options["return_stats"] = (*options.get("return_stats", ()), "key_mean")
        more["weighed"] = rng.random() < 0.5
    if kind == "stats" and rng.random() < 0.5 and d >= 8:
        options["topk"] = rng.randint(1, keys)
    if rng.random() < 0.15:
        options |= {"dropout_p": rng.choice((0.1, 0.5)), "dropout_seed": rng.randrange(2**62)}
    made: dict[str, Any] = {
        "seed": rng.randrange(2**31),
        "batch": rng.choice((1, 2, 3)),
        "queries": queries,
        "keys": keys,
        "heads": heads,
        "kv_heads": rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        "d": d,
        "dv": rng.choice((d, d, rng.choice(HEAD_SIZES[:9]))),
        "bias": rng.choice((None, None, rng.choice(PATTERNS))),
        "key_bias": rng.random() < 0.2,
        "masks": rng.choice(MASKS),
        **more,
        "cosine": cosine,
        "scale": None if cosine else rng.choice((None, None, 0.3, 0.0, "heads")),
        "extra": rng.choice((0, 0, 0, 3)) if kind == "plain" else 0,
        "layout": rng.choice(("plain", "plain", "packed", "heads", "batch", "channels")),
        "expanded_gradient": rng.random() < 0.2,
        **options,
    }
    return make(**made, beside="+".join(attention_options.draw(rng, made)))


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 5, 7, bias=(0, 1, 1, 1), return_stats=("lse",)),
        make(2, 2, 3, 9, heads=4, kv_heads=2, d=7, dv=5, bias=(1, 1, 1, 1), key_bias=True, masks="empty", sink=True, scale="heads",
             return_stats=("lse",)),
        make(3, 3, 4, 6, bias=(0, 0, 1, 1), masks="causal", layout="heads", dropout_p=0.3, dropout_seed=Stream(5, 2 + (4 << 32))),
        make(4, 2, 6, 5, d=3, bias=(1, 0, 0, 1), masks="both", normalizer="sigmoid", layout="packed"),
        make(5, 2, 4, 5, bias=(0, 1, 1, 0), masks="dense", normalizer="relu", layout="channels"),
        make(6, 1, 5, 5, d=4, bias=(1, 1, 0, 0), masks="segments", normalizer="none", scale=0.3),
        make(7, 2, 4, 6, cosine=True, extra=2, masks="causal", key_bias=True, layout="batch"),
        make(8, 2, 1, 33, heads=3, kv_heads=1, d=16, bias=(0, 0, 0, 1), sink=True),
        make(9, 3, 70, 40, heads=2, d=8, bias=(0, 1, 1, 1), masks="dense"),
        make(13, 2, 6, 6, d=4, typed="path", grid=(2, 3), masks="table", return_stats=("lse", "key_mean"), weighed=True),
        make(14, 1, 6, 6, d=4, typed="transposed", grid=(3, 2), modulation="mixture", normalizer="sigmoid"),
        make(15, 2, 3, 8, typed="decomposed", grid=(2, 4), modulation="weight", masks="levels", dropout_p=0.4, dropout_seed=9),
        make(16, 2, 5, 6, typed="euclidean", modulation="gain", masks="logits", topk=2, return_stats=("key_mean",)),
        make(17, 1, 9, 9, typed="manhattan", grid=(3, 3), modulation="soft", masks="causal", normalizer="none"),
        make(18, 2, 5, 6, heads=4, kv_heads=2, d=4, modulation="heads", bias=(0, 1, 1, 1), masks="empty", dropout_p=0.3,
             dropout_seed=2, return_stats=("lse", "key_mean")),
        make(19, 1, 7, 7, heads=3, d=4, modulation="heads", typed="manhattan", grid=(1, 7), normalizer="none", masks="both",
             scale="heads"),
        make(20, 2, 5, 7, heads=4, kv_heads=2, d=4, modulation="policy", bias=(0, 1, 1, 1), masks="empty",
             return_stats=("key_mean",), weighed=True),
        make(21, 2, 6, 9, heads=2, normalizer="argmax_k", masks="empty", return_stats=("index", "key_mean")),
        make(22, 2, 6, 9, heads=2, normalizer="argmax_q", masks="dense", dropout_p=0.3, dropout_seed=8),
        *offsets(),
        *with_further_options(),
        *mixed_tiles(),
        make(72, 2, 9, 9, heads=2, d=4, modulation="policy", masks="empty", return_stats=("row", "key_mean"), stat_rows=(0, -1)),
        make(73, 2, 9, 7, heads=4, kv_heads=2, normalizer="argmax_q", masks="empty", return_stats=("row",), stat_rows=(0, 3, 8)),
        make(63, 2, 5, 6, heads=4, kv_heads=2, d=4, repeated=True, bias=(0, 0, 1, 1), modulation="gain+weight", masks="dense"),
        make(64, 3, 4, 7, repeated=True, bias=(1, 0, 1, 0), key_bias=True, normalizer="sigmoid", dropout_p=0.3, dropout_seed=4),
        make(65, 2, 5, 5, heads=4, d=4, repeated=True, bias=(0, 1, 0, 1), modulation="gain+heads+weight", return_stats=("lse",)),
        make(10, 0, 4, 5, heads=2, bias=(0, 1, 1, 1)),
        make(11, 2, 0, 5, bias=(0, 1, 1, 1)),
        make(12, 2, 4, 0, heads=2, sink=True, return_stats=("lse",)),
    ]  # fmt: skip


MIXED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gain+mixture+heads", {"sink": True, "key_bias": True}),
    ("heads+gain+mixture+weight", {"scale": "heads", "dropout_p": 0.3, "dropout_seed": 6}),
    ("weight+soft+heads+mixture", {"normalizer": "sigmoid", "return_stats": ("key_mean",), "weighed": True}),
    ("heads", {"topk": 3, "return_stats": ("row",), "stat_rows": (1, 7)}),
    ("gain+heads+weight", {"topk": 5, "extra": 2}),
    ("weight+heads", {"normalizer": "argmax_k", "return_stats": ("index", "key_mean")}),
    ("heads+weight+soft", {"normalizer": "argmax_q"}),
    ("mixture+heads", {"normalizer": "argmax_q", "topk": 4}),
)


def mixed() -> list[Call]:
    """Calls with a mixture of heads and what may stand beside it."""
    options: dict[str, Any] = {"heads": 4, "kv_heads": 2, "d": 4, "grid": (3, 4), "masks": "empty"}
    each = enumerate(MIXED)
    return [make(36 + i, 2, 12, 12, typed="decay" * (i % 2), modulation=m, **options, **more) for i, (m, more) in each]


def mixed_tiles() -> list[Call]:
    """Calls whose heads mix where whole tiles of keys are hidden from all of them, or from some."""
    options: dict[str, Any] = {"heads": 3, "d": 4}
    return [
        make(66, 2, 70, 75, masks="tiles", modulation="gain+heads+weight", bias=(0, 1, 1, 1), sink=True, dropout_p=0.3,
             dropout_seed=3, return_stats=("lse", "key_mean"), **options),
        make(67, 1, 90, 70, masks="stripes", modulation="heads+gain+weight", key_bias=True, scale="heads",
             return_stats=("key_mean", "row"), stat_rows=(1, 80), weighed=True, **options),
        make(68, 1, 70, 90, masks="causal", modulation="weight+heads", normalizer="sigmoid", typed="euclidean", **options),
        make(69, 2, 70, 90, masks="tiles", modulation="heads", topk=5, return_stats=("row",), stat_rows=(1, 66), **options),
        make(70, 2, 90, 70, masks="stripes", modulation="gain+heads", normalizer="argmax_k", return_stats=("index",), **options),
        make(71, 2, 90, 70, masks="tiles", modulation="heads", normalizer="argmax_q", return_stats=("row", "key_mean"),
             stat_rows=(1, 89), weighed=True, **options),
    ]  # fmt: skip


def with_further_options() -> list[Call]:
    return [
        make(55, 2, 9, 7, heads=4, kv_heads=2, bias=(0, 1, 0, 1), masks="empty", beside="expanded+no self+turned", sink=True),
        make(56, 2, 6, 8, d=4, bias=(0, 0, 1, 1), masks="dense", beside="rows+named", normalizer="sigmoid"),
        make(57, 2, 12, 12, d=6, dv=5, grid=(3, 4), beside="no self+turned+lepe", layout="packed", return_stats=("lse",)),
        make(58, 2, 6, 15, heads=3, kv_heads=1, d=4, typed="pooled", grid=(3, 5), scale="heads", masks="empty"),
        make(59, 1, 15, 6, typed="pooled keys", grid=(3, 5), modulation="gain", bias=(1, 0, 1, 1), beside="expanded"),
        make(60, 2, 5, 9, heads=4, kv_heads=2, beside="named", modulation="heads", key_bias=True, sink=True, extra=2),
        make(61, 2, 10, 10, heads=2, typed="prefix", grid=(2, 4), beside="lepe+turned", masks="causal", cosine=True),
        make(62, 2, 9, 4, typed="pooled keys", grid=(3, 3), beside="turned+rows", normalizer="none", scale=0.3),
    ]  # fmt: skip


def offsets() -> list[Call]:
    """Calls whose modifiers depend on offsets: on a grid, before or behind the query, or of tables that meet the content."""
    return [
        make(23, 2, 15, 15, typed="table", grid=(3, 5), modulation="mixture", masks="empty", bias=(0, 1, 1, 1)),
        make(24, 2, 10, 10, heads=4, kv_heads=2, typed="prefix", grid=(2, 4), modulation="behind+gain", key_bias=True, sink=True),
        make(25, 2, 6, 15, d=4, typed="strided", grid=(3, 5), masks="causal", modulation="weight", topk=4),
        make(26, 1, 8, 8, typed="decay", grid=(2, 4), modulation="weight+mixture+gain", masks="dense", return_stats=("key_mean",),
             weighed=True),
        make(29, 2, 9, 20, modulation="soft+weight", masks="dense", dropout_p=0.3, dropout_seed=3, normalizer="sigmoid"),
        make(31, 2, 5, 9, heads=4, kv_heads=2, d=4, dv=6, typed="context", masks="empty", bias=(0, 1, 1, 1), sink=True,
             dropout_p=0.2, dropout_seed=4, return_stats=("lse",)),
        make(32, 2, 6, 6, typed="context", modulation="weight+soft", masks="both", normalizer="sigmoid", extra=3),
        make(33, 3, 17, 35, heads=8, d=4, dv=20, typed="context", masks="segments", return_stats=("row",), stat_rows=(1, 16)),
        make(34, 2, 4, 6, typed="keys of context", key_bias=True, topk=3),
        make(35, 2, 17, 6, typed="values of context", normalizer="argmax_k", modulation="weight"),
        make(50, 2, 15, 15, heads=4, kv_heads=2, typed="axes", grid=(3, 5), scale="heads", masks="empty", bias=(0, 1, 1, 1),
             sink=True, return_stats=("lse",)),
        make(51, 2, 70, 70, d=24, typed="axes", grid=(10, 7), modulation="gain", dropout_p=0.3, dropout_seed=7,
             return_stats=("row",), stat_rows=(1, 30)),
        make(52, 1, 6, 6, d=4, typed="axes", grid=(1, 6), modulation="heads", normalizer="sigmoid", masks="dense"),
        make(53, 1, 6, 6, typed="axes", grid=(2, 3), cosine=True),
        make(54, 1, 6, 6, typed="axes", grid=(3, 2), normalizer="argmax_q"),
        *mixed(),
        make(44, 2, 6, 9, heads=4, kv_heads=2, d=4, typed="context", modulation="weight+heads", masks="dense", dropout_p=0.2,
             dropout_seed=7),
        make(66, 2, 5, 33, heads=4, kv_heads=2, d=4, masks="block", bias=(0, 1, 1, 1), sink=True, extra=3),
        make(67, 2, 9, 65, heads=2, d=4, masks="block", modulation="heads", dropout_p=0.2, dropout_seed=4),
        make(68, 1, 17, 64, heads=2, masks="block", topk=9, return_stats=("lse", "key_mean")),
        make(69, 2, 66, 66, d=4, typed="table", grid=(6, 11), masks="block"),  # tiles that begin inside a word
        make(70, 2, 7, 66, d=4, typed="decomposed", grid=(6, 11), masks="block"),
        make(71, 3, 1, 31, d=4, masks="logits", normalizer="sigmoid", return_stats=("row",), stat_rows=(0,)),
        make(30, 2, 6, 6, typed="decay", grid=(2, 3), modulation="soft+mixture", return_stats=("key_mean",)),
        make(27, 2, 99, 99, d=4, typed="prefix", grid=(1, 97), modulation="behind", masks="segments", normalizer="sigmoid",
             dropout_p=0.2, dropout_seed=3),
        make(28, 3, 70, 70, heads=8, d=4, typed="table", grid=(2, 35), modulation="mixture", return_stats=("row",),
             stat_rows=(0, 68)),
    ]  # fmt: skip


def sizes() -> list[Call]:
    options: dict[str, Any] = {"heads": 2, "key_bias": True, "masks": "both", "sink": True, "return_stats": ("lse",)}
    return [make(1, 2, q, k, bias=(0, 1, 1, 1), **options) for q, k in ((17, 20), (30, 12), (41, 50))]


ENTRIES = (
    Entry(
        "attention",
        draw,
        small,
        sizes,
        cast=("q", "k", "v"),
        derived=lambda: [
            c for c in (*offsets(), *with_further_options()) if c.seed not in (27, 28, 33, 51, 56, 59, 61, 62)
        ],
    ),
)
