"""Sampled and hand-picked calls of drop_tokens."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import draw_tail, rows, view
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.select_tokens import shuffled


def make(
    number: int,
    batch: int,
    tokens: int,
    ratio: float,
    *tail: int,
    groups: int = 0,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`groups`: how many noises there are, without a seed; 0 for one per unprotected token."""
    g = torch.Generator().manual_seed(number)
    tensors = {"x": rows(g, batch, tokens, tail, layout)}
    if "seed" not in options:
        tensors["noise"] = shuffled(g, batch, groups or tokens - options.get("protect", 0))

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        noise = t["noise"].float() if "noise" in t else None
        return (view(layout, t["x"]), ratio), dict(options, noise=noise)

    facts = {"B": batch, "N": tokens, "ratio": ratio, "tail": tail, "layout": layout}
    text = label(number, facts | options)
    return Call(text, vitkern.drop_tokens, build, tensors, frozenset(), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    tokens = rng.choice((1, 2, 7, 40, 197))
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.choice((0.1, 0.5, 0.75)),
        *draw_tail(rng),
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        protect=rng.choice((0, 1)),
        order=rng.choice(("noise", "position")),
        min_keep=rng.choice((0, 1)),
        **rng.choice(({}, {"seed": 5})),
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 8, 0.75, 8),
        make(2, 2, 9, 0.5, 11, protect=1, layout="channels"),
        make(3, 2, 9, 0.5, 8, seed=3, order="position"),
        make(4, 2, 12, 0.4, 3, 2, groups=3, structure="row", grid=(3, 4)),
        make(5, 2, 13, 0.4, 8, groups=4, structure="col", grid=(3, 4), protect=1),
        make(6, 2, 12, 0.6, 8, groups=2, structure="channel", grid=(2, 6), order="position"),
        make(7, 2, 6, 0.9, 8, min_keep=1),
        make(8, 1, 6, 0.9, 8, layout="batch"),
        make(9, 2, 1, 0.5, 4),
        make(10, 0, 8, 0.5, 8),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, 0.75, c) for n, c in ((17, 8), (30, 12), (41, 10))]


ENTRIES = (Entry("drop_tokens", draw, small, sizes, last="merge_tokens_bwd"),)
