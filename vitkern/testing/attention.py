"""Sampled and hand-picked calls of attention: those that its op serves."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import CosineScore
from vitkern.bias import KeyBias
from vitkern.mask import Causal, Segments
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import HEAD_SIZES, leaf_shape, view

NORMALIZERS = ("softmax", "softmax", "softmax", "sigmoid", "relu", "none")
# 0: broadcast. A bias with neither queries nor keys adds one number to all scores of a head: its gradient is a sum of all
# of them that cancels, and is compared in float64 alone (tests/test_attention.py).
PATTERNS = tuple((b, h, q, k) for b in (0, 1) for h in (0, 1) for q in (0, 1) for k in (0, 1) if q or k)


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
    cosine: bool = False,
    scale: Any = None,
    sink: bool = False,
    extra: int = 0,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`bias`: which axes it has; `masks`: none, dense, empty (a row sees nothing), causal, segments, both; `scale`: "heads"
    is a tensor; `extra`: further keys; `layout` as of window_attention."""
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
    if masks == "segments":
        tensors["ids"] = torch.randint(-1, 3, (1, max(queries, keys)), generator=g)
    if cosine:
        tensors["logit_scale"] = normal(heads) + 2
    if scale == "heads":
        tensors["scale"] = torch.rand(heads, generator=g, dtype=torch.float64)
    if sink:
        tensors["sink"] = normal(heads)
    if extra:
        tensors["more_k"], tensors["more_v"] = normal(1, extra, kv_heads, d), normal(1, extra, kv_heads, dv)
    parameters = frozenset(("bias", "key_bias", "logit_scale", "scale", "sink"))

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: dict[str, Any] = dict(options)
        q, k, v = (view(layout, t[name], 1, h) for name, _, h, _ in groups)
        biases = [t["bias"]] if bias is not None else []
        biases += [KeyBias(t["key_bias"])] if key_bias else []
        hidden: list[Any] = [t["mask"]] if "mask" in t else []
        if masks in ("causal", "both"):
            hidden.append(Causal(k.shape[1] - q.shape[1]))
        if masks == "segments":
            hidden.append(Segments(t["ids"][:, : q.shape[1]], t["ids"][:, : k.shape[1]]))
        given |= {"bias": biases, "mask": hidden, "scale": t.get("scale", scale), "sink": t.get("sink")}
        if cosine:
            given["cosine"] = CosineScore(t["logit_scale"])
        if extra:
            given["extra_kv"] = (t["more_k"], t["more_v"])
        return (q, k, v), given

    facts = {"B": batch, "Nq": queries, "Nk": keys, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv, "bias": bias}
    facts |= {"key_bias": key_bias, "masks": masks, "cosine": cosine, "scale": scale, "sink": sink, "extra": extra}
    text = label(seed, facts | {"layout": layout} | options)
    return Call(text, vitkern.attention, build, tensors, parameters, expanded_gradient, seed)


def draw(rng: random.Random) -> Call:
    queries, keys = (rng.choice((1, 2, 7, 33, 64, 65, 100, 197)) for _ in range(2))
    heads = rng.choice((1, 2, 3, 4))
    d = rng.choice(HEAD_SIZES if queries * keys < 5000 else HEAD_SIZES[:9])
    cosine = rng.random() < 0.2 and d > 1  # a direction of one dimension has no gradient to compare
    options: dict[str, Any] = {"normalizer": rng.choice(NORMALIZERS)}
    if options["normalizer"] == "softmax":
        options |= {"sink": rng.random() < 0.2, "return_stats": rng.choice(((), ("lse",)))}
    if rng.random() < 0.15:
        options |= {"dropout_p": rng.choice((0.1, 0.5)), "dropout_seed": rng.randrange(2**62)}
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        queries,
        keys,
        heads=heads,
        kv_heads=rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        d=d,
        dv=rng.choice((d, d, rng.choice(HEAD_SIZES[:9]))),
        bias=rng.choice((None, None, rng.choice(PATTERNS))),
        key_bias=rng.random() < 0.2,
        masks=rng.choice(("none", "none", "dense", "empty", "causal", "segments", "both")),
        cosine=cosine,
        scale=None if cosine else rng.choice((None, None, 0.3, 0.0, "heads")),
        extra=rng.choice((0, 0, 0, 3)),
        layout=rng.choice(("plain", "plain", "packed", "heads", "batch", "channels")),
        expanded_gradient=rng.random() < 0.2,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 5, 7, bias=(0, 1, 1, 1), return_stats=("lse",)),
        make(2, 2, 3, 9, heads=4, kv_heads=2, d=7, dv=5, bias=(1, 1, 1, 1), key_bias=True, masks="empty", sink=True, scale="heads",
             return_stats=("lse",)),
        make(3, 3, 4, 6, bias=(0, 0, 1, 1), masks="causal", layout="heads", dropout_p=0.3, dropout_seed=5),
        make(4, 2, 6, 5, d=3, bias=(1, 0, 0, 1), masks="both", normalizer="sigmoid", layout="packed"),
        make(5, 2, 4, 5, bias=(0, 1, 1, 0), masks="dense", normalizer="relu", layout="channels"),
        make(6, 1, 5, 5, d=4, bias=(1, 1, 0, 0), masks="segments", normalizer="none", scale=0.3),
        make(7, 2, 4, 6, cosine=True, extra=2, masks="causal", key_bias=True, layout="batch"),
        make(8, 2, 1, 33, heads=3, kv_heads=1, d=16, bias=(0, 0, 0, 1), sink=True),
        make(9, 3, 70, 40, heads=2, d=8, bias=(0, 1, 1, 1), masks="dense"),
        make(10, 0, 4, 5, heads=2, bias=(0, 1, 1, 1)),
        make(11, 2, 0, 5, bias=(0, 1, 1, 1)),
        make(12, 2, 4, 0, heads=2, sink=True, return_stats=("lse",)),
    ]  # fmt: skip


def sizes() -> list[Call]:
    options: dict[str, Any] = {"heads": 2, "key_bias": True, "masks": "both", "sink": True, "return_stats": ("lse",)}
    return [make(1, 2, q, k, bias=(0, 1, 1, 1), **options) for q, k in ((17, 20), (30, 12), (41, 50))]


ENTRIES = (Entry("attention", draw, small, sizes, cast=("q", "k", "v")),)
