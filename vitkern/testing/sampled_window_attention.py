"""Sampled and hand-picked calls of sampled_window_attention."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.bias import DecomposedRelativePosition, RelativePosition, table_rows
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import leaf_shape, view

PLACES = frozenset(("coords", "coords_v"))  # stay float32 where `exact`
Pair = tuple[int, int]


def make(
    number: int,
    lengths: Pair,
    window: Pair,
    *,
    key_lengths: Pair | None = None,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    samples: int | None = None,
    groups: int = 1,
    apart: bool = False,
    bias: str = "none",
    places: str = "spread",
    layout: str = "plain",
    exact: bool = False,
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """A call in float64. `groups`: 1, heads or heads r; `apart`: v has its own places; `bias`: none, dense, row, table, index,
    decomposed, given (decomposed of every query), both (a table too) or hiding (a few -inf); `places`: "spread" over and around
    the map, "special" ones among them, on the "grid" of quarters, "outside", or "one" for all samples; `layout`: of q, k and v,
    or "turned" places."""
    g = torch.Generator().manual_seed(number)
    key_lengths, kv_heads, dv = key_lengths or lengths, kv_heads or heads, dv or d
    n = math.prod(window)
    samples = samples or n
    counts = [-(-length // w) for length, w in zip(lengths, window, strict=True)]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    own = "plain" if layout == "turned" else layout
    parts = (("q", lengths, heads, d), ("k", key_lengths, kv_heads, d), ("v", key_lengths, kv_heads, dv))
    tensors = {name: normal(*leaf_shape(own, batch, sides, h, width)) for name, sides, h, width in parts}
    for name in ("coords", "coords_v")[: 1 + apart]:
        size = torch.tensor([key_lengths[1], key_lengths[0]], dtype=torch.float64)
        spread = torch.rand((batch, *counts, samples, groups, 2), generator=g, dtype=torch.float64)
        tensors[name] = _placed(places, spread * (size + 3) - 2, g)
    parameters = set(PLACES) if exact else set()
    if bias in ("table", "both"):
        tensors["table"] = normal(table_rows(window, "query-key"), heads)
    elif bias == "index":
        tensors["table"] = normal(5, heads)
        tensors["index"] = torch.randint(0, 5, (n, samples), generator=g, dtype=torch.int32)
    if bias in ("decomposed", "given", "both"):
        for name, side in zip(("rel_h", "rel_w"), window, strict=True):
            tensors[name] = normal(2 * side - 1, d) if bias != "given" else normal(1, n, heads, side)
    elif bias not in ("none", "table", "index"):
        tensors["bias"] = normal(heads if bias != "row" else 1, n if bias != "row" else 1, samples)
        if bias == "hiding":
            tensors["bias"][torch.rand(tensors["bias"].shape, generator=g) < 0.3] = -math.inf
    parameters |= {"table", "bias", "rel_h", "rel_w"}

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(options)
        if bias == "table":
            kwargs["bias"] = RelativePosition(t["table"])
        elif bias == "index":
            kwargs["bias"] = RelativePosition(t["table"], t["index"])
        elif bias in ("decomposed", "given"):
            grid = window if bias == "decomposed" else None
            kwargs["bias"] = DecomposedRelativePosition(t["rel_h"], t["rel_w"], grid, window)
        elif bias == "both":
            decomposed = DecomposedRelativePosition(t["rel_h"], t["rel_w"], window, window)
            kwargs["bias"] = [decomposed, RelativePosition(t["table"])]
        elif bias != "none":
            kwargs["bias"] = t["bias"]
        where = [t[name] for name in ("coords", "coords_v") if name in t]
        if layout == "turned":  # another order in memory, the same values
            where = [x.movedim((-1, -3), (0, 1)).contiguous().movedim((0, 1), (-1, -3)) for x in where]
        if apart:
            kwargs["coords_v"] = where[1]
        maps = (view(own, t[name], 2, h) for name, _, h, _ in parts)
        return (*maps, window, where[0]), kwargs

    facts = {"L": lengths, "w": window, "Lk": key_lengths, "B": batch, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv}
    facts |= {
        "K": samples,
        "G": groups,
        "apart": apart,
        "bias": bias,
        "places": places,
        "layout": layout,
        "exact": exact,
    }
    text = label(number, facts | options)
    return Call(
        text, vitkern.sampled_window_attention, build, tensors, frozenset(parameters), expanded_gradient, number
    )


def _placed(kind: str, where: Tensor, g: torch.Generator) -> Tensor:
    if kind == "grid":
        return (where * 4).round() / 4
    if kind == "outside":
        return where + 100
    if kind == "one":
        return where[:1, :1, :1, :1, :1].expand_as(where).clone()
    if kind == "special":
        odd = torch.tensor(
            [math.nan, math.inf, -math.inf, 1e20, -1e20, 3e38, 0.0, -1.0, -0.5, 1.0], dtype=torch.float64
        )
        chosen = odd[torch.randint(0, len(odd), where.shape, generator=g)]
        return torch.where(torch.rand(where.shape, generator=g) < 0.3, chosen, where)
    return where


def draw(rng: random.Random) -> Call:
    lengths = (rng.randint(1, 15), rng.randint(1, 15))
    window = (rng.randint(1, 8), rng.randint(1, 8))
    heads = rng.choice((1, 2, 3, 4))
    parts = rng.choice((1, 1, 1, 2, 3))
    groups = rng.choice((1, heads, heads * parts)) if heads > 1 else rng.choice((1, parts))
    unit = max(groups // heads, 1)
    bias = rng.choice(("none", "dense", "row", "table", "index", "decomposed", "given", "both", "hiding"))
    free = bias in ("none", "dense", "row", "index", "hiding")
    widths = [w for w in (1, 6, 8, 10, 12, 15, 16, 24, 30, 32, 48, 64, 72, 96, 128, 256) if w % unit == 0]
    layout = rng.choice(("plain", "plain", "packed", "heads", "channels", "batch", "turned"))
    return make(
        rng.randrange(2**31),
        lengths,
        window,
        key_lengths=rng.choice((None, (rng.randint(1, 15), rng.randint(1, 15)))),
        batch=rng.choice((1, 2, 3)) if layout == "batch" else rng.choice((0, 1, 2, 3)) if rng.random() < 0.3 else 2,
        heads=heads,
        kv_heads=rng.choice([h for h in range(1, heads + 1) if heads % h == 0]),
        d=rng.choice(widths),
        dv=rng.choice(widths) if rng.random() < 0.4 else None,
        samples=rng.choice((None, 1, 5, 16, 33)) if free else None,
        groups=groups,
        apart=rng.random() < 0.3,
        bias=bias,
        places=rng.choice(("spread", "spread", "special", "grid", "outside", "one")),
        layout=layout,
        exact=rng.random() < 0.5,
        expanded_gradient=rng.random() < 0.2,
        **({"scale": rng.choice((0.0, 0.3, 1.0))} if rng.random() < 0.5 else {}),
        **({"out_of_range": "mask"} if rng.random() < 0.4 else {}),
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, (4, 5), (2, 3), d=4, bias="dense"),
        make(2, (5, 4), (2, 2), d=4, dv=6, groups=2, bias="table", exact=True, scale=0.3),
        make(3, (3, 4), (2, 2), d=4, dv=2, groups=4, apart=True, bias="decomposed", out_of_range="mask"),
        make(4, (4, 3), (2, 2), key_lengths=(3, 6), heads=4, kv_heads=2, d=3, samples=5, bias="index", layout="packed"),
        make(5, (3, 3), (2, 2), heads=4, kv_heads=2, groups=4, d=3, apart=True, bias="given", expanded_gradient=True),
        make(6, (1, 5), (1, 2), key_lengths=(1, 1), d=2, samples=3, out_of_range="mask", layout="channels"),
        make(7, (4, 4), (4, 4), heads=1, batch=1, groups=3, d=3, samples=2, layout="turned"),
        make(8, (5, 7), (3, 4), d=37, places="special", exact=True),
        make(9, (5, 7), (3, 4), groups=4, d=20, places="special", out_of_range="mask", bias="hiding"),
        make(10, (6, 4), (3, 2), key_lengths=(8, 16), d=80, places="grid", bias="row", layout="heads"),
        make(11, (9, 10), (9, 8), d=10, samples=70, bias="dense", exact=True),
        make(12, (10, 9), (9, 8), d=6, batch=1, bias="decomposed", groups=2, layout="heads"),
        make(13, (4, 4), (2, 2), places="one", bias="dense", layout="batch", batch=3),
        make(14, (4, 4), (2, 2), places="outside", out_of_range="mask"),
        make(15, (4, 4), (2, 2), places="outside"),
        make(16, (4, 4), (2, 2), batch=0, bias="dense", groups=2),
        make(17, (3, 3), (2, 3), d=256, samples=9),
        make(19, (5, 4), (4, 3), d=5, bias="both", places="grid", batch=3),
        make(18, (2, 1), (2, 1), batch=34, heads=1, d=3, bias="dense"),
    ]


def sizes() -> list[Call]:
    shapes = ((7, (20, 13), (9, 11)), (5, (18, 10), (7, 12)), (3, (22, 19), (10, 9)))  # no two sides are equal
    return [make(1, lengths, (2, 3), key_lengths=keys, batch=batch, bias="table") for batch, lengths, keys in shapes]


ENTRIES = (Entry("sampled_window_attention", draw, small, sizes, cast=("q", "k", "v")),)
