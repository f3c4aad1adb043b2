"""Sampled and hand-picked calls of cluster_kmeans, the op behind cluster_tokens(method="kmeans").

The first calls have weights that do not depend on the tokens (a window of one cell, or temperature 0), so that finite
differences see what the gradient means; the others are held to the reference.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.cluster_kmeans import cluster_kmeans
from vitkern.testing.merge_tokens import view
from vitkern.testing.registry import Call, Entry, label


def make(
    number: int,
    batch: int,
    grid: tuple[int, int, int, int],
    width: int,
    *,
    window: int = 5,
    temperature: float = 0.1,
    iters: int = 2,
    mask: float | None = None,
    layout: str = "plain",
    expanded_gradient: bool = False,
) -> Call:
    """`mask`: the part of the tokens that is real, the rest holding NaN."""
    g = torch.Generator().manual_seed(number)
    tokens = grid[0] * grid[1]
    x = torch.randn(batch, tokens, width, generator=g, dtype=torch.float64)
    start = torch.randint(-16, 17, (batch, grid[2] * grid[3], width), generator=g)  # no gradient: eighths of integers
    tensors = {"x": x, "start": start}
    if mask is not None:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < mask
        x[~tensors["mask"]] = math.nan
    if layout == "channels":
        tensors["x"] = x.movedim(1, -1).contiguous()

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = view(layout, t["x"])
        high = x.shape[1] // grid[1]
        start = t["start"].to(torch.promote_types(x.dtype, torch.float32)) / 8
        return (x, start, t.get("mask"), [high, *grid[1:]], window, temperature, iters), {}

    facts = {"B": batch, "grid": grid, "C": width, "window": window, "temperature": temperature, "iters": iters}
    facts |= {"mask": mask, "layout": layout}
    text = label(number, facts)
    return Call(text, cluster_kmeans, build, tensors, frozenset(), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    high, wide = rng.randint(1, 16), rng.randint(1, 16)
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        (high, wide, rng.randint(1, 8), rng.randint(1, 8)),
        rng.choice((1, 3, 17, 64, 100)),
        window=rng.choice((1, 3, 5, 9)),
        temperature=rng.choice((0.0, 0.01, 0.3)),
        iters=rng.choice((1, 2, 5)),
        mask=rng.choice((None, None, 0.7)),
        layout=rng.choice(("plain", "plain", "channels")),
        expanded_gradient=rng.random() < 0.2,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    fixed: dict[str, Any] = {"temperature": 0.0}
    return [
        make(1, 2, (5, 6, 2, 3), 8, window=1),
        make(2, 2, (5, 6, 3, 3), 8, window=3, **fixed),
        make(3, 2, (4, 4, 2, 2), 5, window=1, iters=1, mask=0.8),
        make(4, 1, (3, 7, 2, 5), 11, window=3, layout="channels", **fixed),
        make(5, 2, (5, 5, 1, 1), 4),
        make(6, 2, (2, 2, 4, 3), 3, window=1),
        make(7, 1, (6, 6, 3, 2), 9, window=5, mask=0.7, **fixed),
        make(8, 2, (7, 9, 3, 4), 8),
        make(9, 2, (8, 8, 4, 4), 17, window=3, iters=5, mask=0.6),
        make(10, 0, (4, 4, 2, 2), 8),
        make(11, 1, (9, 4, 4, 2), 65, temperature=0.01, iters=1),
        make(12, 2, (6, 6, 3, 3), 8, window=3, mask=0.1),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, (high, 4, 3, 2), 8, window=3) for high in (5, 8, 11)]


ENTRIES = (Entry("cluster_kmeans", draw, small, sizes),)
