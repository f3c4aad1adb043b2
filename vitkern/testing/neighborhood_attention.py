"""Sampled and hand-picked calls of neighborhood_attention, neighborhood_qk and neighborhood_av."""

import math
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import HEAD_SIZES, leaf_shape, view

FUSED, QK, AV = "neighborhood_attention", "neighborhood_qk", "neighborhood_av"


def make(
    seed: int,
    lengths: tuple[int, ...],
    kernel: tuple[int, ...],
    *,
    op: str = FUSED,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    rpb: bool = True,
    masked: bool = False,
    extra: int = 0,
    extra_batch: bool = False,
    layout: str = "plain",
    spread: float = 1.0,
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """A call in float64. `layout`: plain, packed, channels, heads, batch (a view of each kind); `extra`: keys that all see."""
    g = torch.Generator().manual_seed(seed)
    kv_heads, dv = kv_heads or heads, dv or d

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * spread

    parts = {"q": (heads, d), "k": (kv_heads, d), "v": (kv_heads, dv), "a": (heads, math.prod(kernel))}
    names = {FUSED: "qkv", QK: "qk", AV: "av"}[op]
    tensors = {name: normal(*leaf_shape(layout, batch, lengths, *parts[name])) for name in names}
    if op != AV and rpb:
        tensors["rpb"] = normal(heads, *(2 * size - 1 for size in kernel))
    if masked:
        tensors["key_mask"] = torch.rand((batch, *lengths), generator=g) < 0.6
    if extra:
        for name, width in (("k_extra", d), ("v_extra", dv)):
            tensors[name] = normal(batch if extra_batch else 1, extra, kv_heads, width)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = options | {name: t[name] for name in ("rpb", "key_mask") if name in t}
        if extra:
            kwargs["extra_kv"] = (t["k_extra"], t["v_extra"])
        maps = (view(layout, t[name], len(lengths), parts[name][0]) for name in names)
        return (*maps, kernel), kwargs

    facts = {"L": lengths, "K": kernel, "B": batch, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv, "rpb": rpb}
    facts |= {"masked": masked, "extra": extra, "layout": layout, "spread": spread}
    return Call(
        label(seed, facts | options), getattr(vitkern, op), build, tensors, frozenset({"rpb"}), expanded_gradient, seed
    )


def draw(rng: random.Random, op: str = FUSED) -> Call:
    rank = rng.choice((1, 2, 2, 2, 3))
    kernel = tuple(rng.randint(1, {1: 24, 2: 7, 3: 4}[rank]) for _ in range(rank))
    dilation = tuple(rng.choice((1, 1, 2, 3)) for _ in range(rank))
    longest = {1: 60, 2: 14, 3: 4}[rank]
    lengths = tuple(k * d + rng.choice((0, 1, rng.randint(0, longest))) for k, d in zip(kernel, dilation, strict=True))
    options: dict[str, Any] = {
        "dilation": dilation,
        "stride": tuple(rng.choice((1, 1, rng.randint(1, k))) for k in kernel),
    }
    if rng.random() < 0.3:
        options["is_causal"] = tuple(rng.random() < 0.5 for _ in range(rank))
    elif rng.random() < 0.3:
        options["border"] = "zero"
    if op != AV and rng.random() < 0.5:
        options["scale"] = rng.choice((0.0, 0.3, 1.0))
    if op == FUSED:
        options |= {"return_stats": ("lse",)} if rng.random() < 0.5 else {}
        options |= {"masked": rng.random() < 0.3, "extra_batch": rng.random() < 0.5}
        options |= {"extra": rng.choice((0, 0, 1, 5))}
    layout = rng.choice(("plain", "plain", "packed", "heads", "batch", "channels"))
    heads = rng.choice((1, 2, 3, 4))
    wide = HEAD_SIZES if math.prod(lengths) * math.prod(kernel) < 3000 else HEAD_SIZES[:9]
    return make(
        rng.randrange(2**31),
        lengths,
        kernel,
        op=op,
        batch=rng.choice((1, 2, 3) if layout == "batch" else (0, 1, 2, 3)) if rng.random() < 0.3 else 2,
        heads=heads,
        kv_heads=rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        d=rng.choice(wide),
        dv=rng.choice(wide) if rng.random() < 0.4 else None,
        rpb=rng.random() < 0.7,
        layout=layout,
        spread=rng.choice((1.0, 1.0, 0.1, 3.0)),
        expanded_gradient=rng.random() < 0.2,
        **options,
    )


def small(op: str = FUSED) -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    calls: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
        ((5, 6), (3, 3), {}),
        ((7, 9), (3, 4), {"dilation": (2, 1), "scale": 0.3, "layout": "packed"}),
        ((9,), (4,), {"is_causal": True, "stride": 3, "dv": 5, "heads": 4, "kv_heads": 2}),
        ((3, 4, 5), (2, 3, 2), {"is_causal": (True, False, True), "batch": 1, "d": 3}),
        ((4, 4), (4, 4), {"rpb": False, "d": 16}),
        ((5, 8), (4, 3), {"border": "zero", "stride": (2, 1), "dilation": (1, 2)}),
        ((1, 1), (1, 1), {"heads": 1}),
        ((6, 7), (2, 5), {"dilation": (3, 1), "stride": (2, 5), "batch": 0}),
        ((3, 5), (2, 3), {"layout": "heads", "expanded_gradient": True}),
    ]  # fmt: skip
    if op == FUSED:
        calls += [
            ((6, 6), (3, 5), {"masked": True, "return_stats": ("lse",), "kv_heads": 1}),
            ((8,), (3,), {"extra": 2, "extra_batch": True, "masked": True, "return_stats": ("lse",)}),
            ((4, 5), (3, 3), {"extra": 1, "border": "zero", "layout": "channels", "expanded_gradient": True}),
        ]
    if op == QK:  # differences of a score of -inf are none
        calls.sort(key=lambda call: "is_causal" in call[2])
    made = []
    for number, (lengths, kernel, options) in enumerate(calls, 1):
        chosen = {n: x for n, x in options.items() if not (op == AV and n in ("scale", "d"))}
        chosen |= {"d": 1} if op == AV else {}
        made.append(make(number, lengths, kernel, op=op, **chosen | ({"dv": options.get("dv", 6)} if op == AV else {})))
    return made


def sizes(op: str = FUSED) -> list[Call]:
    shapes = ((6, (10, 11)), (3, (7, 12)), (4, (12, 7)))
    return [make(1, lengths, (3, 5), op=op, batch=batch, dilation=(2, 1)) for batch, lengths in shapes]


ENTRIES = tuple(
    Entry(
        name,
        partial(draw, op=name),
        partial(small, name),
        partial(sizes, name),
        cast=cast,
    )
    for name, cast in ((FUSED, ("q", "k", "v")), (QK, ("q", "k")), (AV, ("a", "v")))
)
