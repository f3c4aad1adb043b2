"""Sampled and hand-picked calls of reconstruct_tokens."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import rows, view
from vitkern.testing.registry import Call, Entry, label


def make(
    number: int,
    batch: int,
    tokens: int,
    clusters: int,
    width: int,
    depth: int,
    *,
    layout: str = "plain",
    own: bool = False,
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`depth`: the channels of x and centers; `own`: the centers are some of the tokens themselves."""
    g = torch.Generator().manual_seed(number)
    tensors = {
        "y": rows(g, batch, clusters, (width,), layout),
        "x": rows(g, batch, tokens, (depth,), layout),
        "centers": rows(g, batch, clusters, (depth,), layout),
    }
    if own:
        tensors["centers"] = tensors["x"][:, :clusters].clone()

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(view(layout, t[n]) for n in ("y", "x", "centers")), dict(options)

    facts = {"B": batch, "N": tokens, "M": clusters, "C": width, "E": depth, "layout": layout, "own": own}
    text = label(number, facts | options)
    return Call(text, vitkern.reconstruct_tokens, build, tensors, frozenset(), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        rng.choice((1, 2, 7, 40, 197, 300)),
        rng.choice((1, 2, 5, 21, 70)),
        rng.choice((1, 3, 8, 17, 64, 100)),
        rng.choice((1, 3, 8, 17, 64, 100)),
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        k=rng.choice((1, 2, 5, 20, 1000)),
        temperature=rng.choice((0.0, 0.01, 0.1, 1.0)),
        norm=rng.choice(("l1", "l2")),
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 9, 5, 8, 8, k=3, temperature=0.1),
        make(2, 2, 9, 5, 11, 3, k=2, temperature=0.3, norm="l2"),
        make(3, 2, 7, 6, 3, 5, temperature=0.1),
        make(4, 2, 7, 6, 4, 9, temperature=0.0, k=2),
        make(5, 1, 8, 5, 2, 8, k=4, temperature=0.5, layout="channels"),
        make(6, 2, 6, 4, 5, 4, k=3, temperature=0.2, norm="l2", layout="batch"),
        make(7, 1, 1, 1, 4, 4),
        make(8, 2, 30, 9, 20, 17, k=5, temperature=1.0),
        make(9, 1, 20, 12, 9, 4, k=6, temperature=0.5, own=True),
        make(10, 0, 8, 4, 8, 8),
        make(11, 2, 0, 4, 8, 8),
        make(12, 1, 60, 40, 20, 65, temperature=0.05, norm="l2"),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, m, c, 6, k=3, temperature=0.1) for n, m, c in ((17, 9, 8), (30, 20, 12), (41, 7, 10))]


ENTRIES = (Entry("reconstruct_tokens", draw, small, sizes),)
