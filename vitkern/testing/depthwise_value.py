"""Sampled and hand-picked calls of depthwise_value, the op behind DepthwiseValue."""

import random
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.depthwise_value import depthwise_value
from vitkern.testing.registry import Call, Entry, label


def make(
    number: int,
    batch: int,
    grid: tuple[int, int],
    heads: int = 2,
    d: int = 5,
    *,
    sides: tuple[int, int] = (3, 3),
    shared: bool = False,
    bias: bool = True,
    layout: str = "plain",
    expanded_gradient: bool = False,
) -> Call:
    """`shared`: one kernel for all heads. `layout`: plain, heads (they stand before the tokens in memory), channels (so do they),
    packed (beside queries and keys)."""
    g = torch.Generator().manual_seed(number)
    count = d if shared else heads * d
    shape = {
        "plain": (batch, *grid, heads, d),
        "heads": (batch, heads, *grid, d),
        "channels": (batch, heads, d, *grid),
        "packed": (batch, *grid, 3, heads, d),
    }[layout]
    tensors = {
        "v": torch.randn(shape, generator=g, dtype=torch.float64),
        "weight": torch.randn(count, 1, *sides, generator=g, dtype=torch.float64),
    }
    if bias:
        tensors["bias"] = torch.randn(count, generator=g, dtype=torch.float64)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        v = t["v"]
        if layout == "packed":
            v = v[:, :, :, 2]
        elif layout != "plain":
            v = v.movedim(1, 3) if layout == "heads" else v.permute(0, 3, 4, 1, 2)
        return (v.flatten(1, 2), t["weight"], t.get("bias"), tuple(v.shape[1:3])), {}

    facts = {"B": batch, "grid": grid, "H": heads, "D": d, "sides": sides, "shared": shared, "bias": bias}
    text = label(number, facts | {"layout": layout})
    return Call(text, depthwise_value, build, tensors, frozenset(("weight", "bias")), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    return make(
        rng.randrange(2**31),
        rng.choice((0, 1, 2, 3)),
        (rng.randint(1, 20), rng.randint(1, 12)),
        rng.choice((1, 2, 3)),
        rng.choice((1, 3, 8, 16, 17, 33, 70)),
        sides=rng.choice(((1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (1, 3))),
        shared=rng.random() < 0.3,
        bias=rng.random() < 0.7,
        layout=rng.choice(("plain", "heads", "channels", "packed")),
    )


def small() -> list[Call]:
    return [
        make(1, 2, (4, 5), 2, 9),
        make(2, 2, (3, 4), 3, 4, shared=True, layout="heads"),
        make(3, 1, (5, 3), 2, 17, sides=(5, 5), bias=False, layout="packed"),
        make(4, 2, (2, 3), 1, 3, sides=(7, 7), layout="channels"),
        make(5, 1, (3, 3), 2, 4, sides=(3, 1), expanded_gradient=True),
        make(6, 0, (2, 2)),
        make(10, 2, (0, 3)),
        make(7, 1, (1, 1), shared=True, bias=False),
        make(8, 1, (19, 2), 1, 6, sides=(5, 5)),
        make(9, 2, (17, 3), 2, 3, layout="heads"),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, grid, 3, 4) for batch, grid in ((2, (5, 7)), (6, (9, 10)), (8, (12, 11)))]


ENTRIES = (Entry("depthwise_value", draw, small, sizes),)
