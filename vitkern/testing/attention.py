"""Sampled and hand-picked calls of attention: those that its op serves."""

import math
import random
from typing import Any

from vitkern.ops._dropout import Stream
from vitkern.testing import attention_options
from vitkern.testing.attention_inputs import FACTORS, MASKS, NORMALIZERS, PATTERNS, POSITIONS, PREFIX, half, make
from vitkern.testing.registry import Call, Entry
from vitkern.testing.window_attention import HEAD_SIZES


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
        if more.get("typed") in ("decomposed", "euclidean", "two distances"):
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
        make(90, 2, 6, 7, factor=(0, 0), modulation="gain+weight", masks="empty", bias=(0, 1, 1, 1), dropout_p=0.2, dropout_seed=6),
        make(91, 2, 9, 6, heads=4, kv_heads=2, d=4, factor=(0, 1), modulation="gain+heads+weight", masks="dense", sink=True),
        make(92, 2, 6, 9, d=4, factor=(1, 0), modulation="heads+gain+weight", normalizer="sigmoid", key_bias=True),
        make(93, 2, 7, 9, heads=4, kv_heads=2, factor=(1, 0), modulation="weight+gain", masks="empty", topk=4, sink=True),
        make(94, 2, 9, 7, factor=(0, 1), modulation="weight", normalizer="argmax_q", masks="dense"),
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
        *joined(),
    ]  # fmt: skip


def joined() -> list[Call]:
    """Calls with several modifiers of one kind, which are one in the kernels."""
    return [
        make(74, 2, 6, 6, heads=2, typed="two decays", grid=(2, 3), normalizer="sigmoid", beside="rows", masks="empty"),
        make(75, 2, 5, 7, heads=4, kv_heads=2, d=4, typed="two distances", masks="dense", sink=True),
        make(76, 2, 6, 6, d=4, typed="axes", grid=(3, 2), bias=(0, 1, 1, 1), beside="rows", normalizer="none", scale=0.3),
        make(77, 1, 6, 6, d=4, typed="axes", grid=(2, 3), beside="rows", normalizer="relu"),
        make(78, 2, 5, 6, typed="decomposed", grid=(2, 3), beside="rows", normalizer="sigmoid", modulation="heads"),
        make(79, 2, 12, 12, typed="manhattan", grid=(3, 4), beside="rows+turned", normalizer="sigmoid", key_bias=True),
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
        *(make(80 + i, 1, h * w, h * w, d=8, typed="axes", grid=(h, w))  # sides about a vector, and two
          for i, (h, w) in enumerate(((5, 3), (17, 2), (2, 17), (2, 33)))),
        make(95, 2, 5, 7, typed="euclidean", bias=(0, 1, 1, 1)),
        make(96, 1, 6, 6, typed="path", grid=(2, 3), bias=(0, 1, 1, 1)),
        make(97, 2, 6, 6, typed="context", bias=(1, 1, 1, 1)),
        make(98, 2, 5, 7, key_bias=True, bias=(0, 1, 1, 1), topk=4),
        make(99, 1, 6, 6, typed="table", grid=(2, 3), bias=(0, 1, 1, 1)),
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
