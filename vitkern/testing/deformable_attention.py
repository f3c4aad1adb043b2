"""Sampled and hand-picked calls of deformable_attention."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label

Sizes = tuple[tuple[int, int], ...]
PLACES = frozenset(("sampling_locations", "attention_weights"))  # stay float32 where `exact`


def make(
    number: int,
    batch: int,
    queries: int,
    heads: int,
    dim: int,
    shapes: Sizes,
    points: int | tuple[int, ...] = 2,
    *,
    layout: str = "plain",
    exact: bool = False,
    places: str = "spread",
    expanded_gradient: bool = False,
    maps: bool = False,
    **options: Any,
) -> Call:
    """`points`: of every level, or one number for each. `places`: "spread" over and around the maps, "special" ones among
    them, on the "grid" of eighths, "outside" of all maps, or "one" for all. `maps`: the value is given level by level,
    whose sizes then are those of the tensors."""
    g = torch.Generator().manual_seed(number)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    own = isinstance(points, tuple)
    tail = (sum(points),) if isinstance(points, tuple) else (len(shapes), points)
    if maps:
        tensors = {f"level {i}": drawn(batch, *size, heads, dim) for i, size in enumerate(shapes)}
    else:
        cells = sum(h * w for h, w in shapes)
        sides = {"plain": (cells, heads, dim), "heads first": (heads, cells, dim), "channels": (heads, dim, cells)}
        tensors = {"value": drawn(batch, *sides.get(layout, sides["plain"]))}
    where = torch.rand(batch, queries, heads, *tail, 2, generator=g, dtype=torch.float64) * 1.4 - 0.2
    if places == "grid":
        where = (where * 8).round() / 8
    elif places == "outside":
        where = where + 2.5
    elif places == "one":
        where = where[:1, :1, :1].expand_as(where).clone()
    elif places == "special":
        odd = torch.tensor([math.nan, math.inf, -math.inf, 1e20, -1e20, 3e38, 0.0, 1.0, -0.5, 1.5], dtype=torch.float64)
        chosen = odd[torch.randint(0, len(odd), where.shape, generator=g)]
        where = torch.where(torch.rand(where.shape, generator=g) < 0.4, chosen, where)
    tensors["sampling_locations"] = where
    tensors["attention_weights"] = drawn(batch, queries, heads, *tail)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if maps:
            levels = [t[f"level {i}"] for i in range(len(shapes))]
            sizes: Any = tuple(tuple(m.shape[1:3]) for m in levels)
            value = torch.cat([m.flatten(1, 2) for m in levels], 1)
        else:
            sizes, value = shapes, view(layout, t["value"])
        places, weights = t["sampling_locations"], t["attention_weights"]
        if layout == "turned":  # another order in memory, the same values
            places = places.movedim((-1, -2), (0, 1)).contiguous().movedim((0, 1), (-1, -2))
            weights = weights.movedim(-1, 1).contiguous().movedim(1, -1)
        more = {"points_per_level": points} if own else {}
        return (value, sizes, places, weights), options | more

    facts = {"B": batch, "N": queries, "H": heads, "D": dim, "shapes": shapes, "points": points, "layout": layout}
    facts |= {"exact": exact, "places": places, "maps": maps}
    text = label(number, facts | options)
    kept = PLACES if exact else frozenset()
    return Call(text, vitkern.deformable_attention, build, tensors, kept, expanded_gradient, number)


def view(layout: str, value: Tensor) -> Tensor:
    """[B, S, H, D] of a value that lies in memory otherwise."""
    if layout == "heads first":
        return value.transpose(1, 2)
    if layout == "channels":
        return value.permute(0, 3, 1, 2)
    return value[:1].expand_as(value) if layout == "batch" else value


def draw(rng: random.Random) -> Call:
    shapes = rng.choice((((6, 4), (3, 2)), ((5, 7),), ((9, 13), (5, 7), (3, 4), (2, 2)), ((1, 1), (1, 6), (5, 1))))
    points: int | tuple[int, ...] = rng.choice((1, 2, 4, 3))
    if rng.random() < 0.3:
        points = tuple(rng.choice((0, 1, 2, 3, 4, 6)) for _ in shapes)
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 5)),
        rng.choice((1, 3, 17, 40)),
        rng.choice((1, 2, 3, 8)),
        rng.choice((1, 4, 8, 10, 16, 30, 32, 33, 48, 64, 72, 128, 256)),
        shapes,
        points,
        layout=rng.choice(("plain", "plain", "heads first", "channels", "batch", "turned")),
        exact=rng.random() < 0.4,
        places=rng.choice(("spread", "spread", "special", "outside", "one")),
        expanded_gradient=rng.random() < 0.2,
        method=rng.choice(("bilinear", "bilinear", "nearest")),
        normalize_weights=rng.random() < 0.3,
    )


TWO: Sizes = ((6, 4), (3, 2))


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 3, 2, 4, TWO),
        make(2, 2, 5, 2, 8, ((2, 5), (3, 1)), (3, 1), exact=True),
        make(3, 1, 3, 2, 3, ((3, 5),), 4, normalize_weights=True),
        make(4, 2, 2, 1, 2, ((1, 1), (2, 3), (4, 2)), (4, 0, 3), layout="heads first", normalize_weights=True),
        make(6, 2, 2, 2, 2, TWO, layout="channels", expanded_gradient=True),
        make(7, 2, 3, 2, 3, TWO, layout="batch"),
        make(19, 1, 2, 1, 3, TWO, 1, normalize_weights=True, exact=True),
        make(5, 1, 3, 2, 3, TWO, 1, method="nearest"),
        make(8, 2, 7, 2, 37, TWO, places="special", exact=True),
        make(9, 2, 7, 2, 20, TWO, places="special", method="nearest"),
        make(10, 2, 9, 3, 80, ((8, 4), (2, 16)), 3, places="grid"),
        make(11, 2, 9, 3, 10, ((8, 4), (2, 16)), 3, places="grid", method="nearest", layout="turned"),
        make(12, 1, 70, 2, 33, ((7, 9), (4, 5), (2, 3), (1, 2)), 4, layout="turned"),
        make(13, 1, 40, 1, 32, ((5, 5),), 4, places="one"),
        make(14, 2, 4, 1, 5, TWO, places="outside"),
        make(15, 2, 0, 2, 4, TWO),
        make(16, 0, 3, 2, 4, TWO),
        make(17, 2, 3, 2, 4, TWO, 0),
        make(18, 1, 20, 2, 256, ((3, 3), (2, 2)), 9, normalize_weights=True),
    ]


def sizes() -> list[Call]:
    return [
        make(1, batch, n, 2, 13, shapes, 4, maps=True)  # no size but the heads is that of the levels, which are fixed
        for batch, n, shapes in ((3, 5, ((6, 8), (9, 7))), (5, 9, ((9, 8), (3, 6))), (4, 7, ((10, 3), (11, 6))))
    ]


ENTRIES = (Entry("deformable_attention", draw, small, sizes, cast=("value",)),)
