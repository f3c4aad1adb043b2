"""Sampled and hand-picked calls of select_tokens."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import draw_tail, rows, view
from vitkern.testing.registry import Call, Entry, label


def shuffled(g: torch.Generator, batch: int, count: int) -> Tensor:
    """The integers 1 to count in another order for every sample: int64 [batch, count]."""
    order = [torch.randperm(count, generator=g) + 1 for _ in range(batch)]
    return torch.stack(order) if batch else torch.empty(0, count, dtype=torch.int64)


def make(
    number: int,
    batch: int,
    tokens: int,
    k: int | None,
    *tail: int,
    masked: bool = False,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """Scores are distinct multiples of 1 / tokens, some negative: rounding changes no choice."""
    g = torch.Generator().manual_seed(number)
    tensors = {"x": rows(g, batch, tokens, tail, layout)}
    tensors["score"] = shuffled(g, batch, tokens).double() / tokens - 0.3
    if masked:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < 0.8

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (view(layout, t["x"]), t["score"], k), dict(options, mask=t.get("mask"))

    facts = {"B": batch, "N": tokens, "k": k, "tail": tail, "masked": masked, "layout": layout}
    text = label(number, facts | options)
    return Call(text, vitkern.select_tokens, build, tensors, frozenset(("score",)), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    tokens = rng.choice((1, 2, 7, 40, 197))
    protect = rng.choice((0, 1, 1, 2))
    most = tokens - min(protect, tokens)
    options: dict[str, Any] = {"fuse_rest": rng.choice((False, "sum", "sum", "mean"))}
    if rng.random() < 0.3:
        options = {"threshold": rng.choice((-0.1501, 0.0013, 0.3517))}
        if rng.random() < 0.5:
            options["n_max"] = rng.randint(min(protect, tokens), tokens)
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.randint(0, most),
        *draw_tail(rng),
        masked=rng.random() < 0.2,
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        protect=protect,
        order=rng.choice(("position", "score")),
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 9, 4, 8),
        make(2, 2, 9, 4, 11, fuse_rest=True, layout="channels"),
        make(3, 2, 9, 4, 8, fuse_rest="mean", order="score"),
        make(4, 2, 9, 3, 3, 2, protect=2, order="score"),
        make(5, 2, 9, None, 8, threshold=0.2, n_max=6),
        make(6, 2, 9, 5, 8, threshold=0.1),
        make(7, 2, 9, 6, 9, masked=True, fuse_rest=True),
        make(8, 1, 6, 5, 8, fuse_rest=True, layout="batch"),
        make(9, 2, 1, 0, 4),
        make(10, 2, 8, 0, 8, protect=0, fuse_rest="mean"),
        make(11, 0, 8, 4, 8),
        make(12, 2, 5, 0, 4, protect=5),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, 5, c, fuse_rest=True) for n, c in ((17, 8), (30, 12), (41, 10))]


ENTRIES = (Entry("select_tokens", draw, small, sizes, last="merge_tokens_bwd"),)
