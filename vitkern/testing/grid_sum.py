"""Sampled and hand-picked calls of grid_sum, the op behind the decays on a grid."""

import random
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.grid_sum import grid_sum
from vitkern.testing.registry import Call, Entry, label

PARAMETERS = frozenset(("row", "col"))


def make(
    number: int,
    batch: int,
    grid: tuple[int, int],
    heads: int = 2,
    depth: int = 5,
    width: int = 6,
    *,
    constant: bool = False,
    turned: bool = False,
    swapped: bool = False,
    expanded_gradient: bool = False,
) -> Call:
    """`constant`: one rate for each head and axis. `turned`: the mask is transposed. `swapped`: the axes of the map
    are exchanged in memory."""
    g = torch.Generator().manual_seed(number)
    sides = grid[::-1] if swapped else grid
    tensors = {
        name: torch.randn(batch, *sides, heads, n, generator=g, dtype=torch.float64)
        for name, n in (("a", depth), ("b", depth), ("c", width))
    }
    for name in ("row", "col"):
        shape = (heads,) if constant else (batch, *sides, heads)
        tensors[name] = 0.2 - torch.rand(*shape, generator=g, dtype=torch.float64)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c = ((t[n].transpose(1, 2) if swapped else t[n]) for n in "abc")
        links = ((t[n].transpose(1, 2) if swapped else t[n]) for n in ("row", "col"))
        if constant:
            links = (t[n].expand(a.shape[:4]) for n in ("row", "col"))
        return (a, b, c, *links, turned), {}

    facts = {
        "B": batch,
        "grid": grid,
        "H": heads,
        "F": depth,
        "C": width,
        "constant": constant,
        "turned": turned,
        "swapped": swapped,
    }
    return Call(label(number, facts), grid_sum, build, tensors, PARAMETERS, expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    return make(
        rng.randrange(2**31),
        rng.choice((0, 1, 2)),
        (rng.randint(0, 7), rng.randint(0, 11)),
        rng.choice((1, 2, 3)),
        rng.choice((1, 3, 8, 17)),
        rng.choice((1, 4, 9, 16, 17)),
        constant=rng.random() < 0.3,
        turned=rng.random() < 0.5,
        swapped=rng.random() < 0.3,
    )


def small() -> list[Call]:
    return [
        make(1, 2, (2, 3), depth=3, width=4),
        make(2, 1, (3, 4), turned=True, swapped=True, depth=2),
        make(3, 1, (1, 5), turned=True),
        make(4, 1, (5, 1), constant=True),
        make(5, 1, (3, 3), 1, 3, 9, expanded_gradient=True),
        make(6, 0, (2, 2)),
        make(7, 1, (1, 1), 1, 1, 1),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, grid, 4, 7, 8) for batch, grid in ((2, (3, 5)), (3, (4, 6)), (6, (2, 9)))]


ENTRIES = (Entry("grid_sum", draw, small, sizes),)
