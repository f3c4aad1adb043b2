"""Sampled and hand-picked calls of unmerge_tokens."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import draw_tail, plan_of, random_plan, rows, view
from vitkern.testing.registry import Call, Entry, label


def make(
    number: int,
    batch: int,
    tokens: int,
    slots: int,
    *tail: int,
    dropped: bool = True,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    g = torch.Generator().manual_seed(number)
    tensors = {"y": rows(g, batch, slots, tail, layout), **random_plan(g, batch, tokens, slots, dropped)}

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (view(layout, t["y"]), plan_of(t)), dict(options)

    facts = {"B": batch, "N": tokens, "slots": slots, "tail": tail, "dropped": dropped, "layout": layout}
    text = label(number, facts | options)
    return Call(text, vitkern.unmerge_tokens, build, tensors, frozenset(), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    tokens = rng.choice((1, 2, 7, 40, 197))
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.choice((1, max(1, tokens // 2), tokens)),
        *draw_tail(rng),
        dropped=rng.random() < 0.4,
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        fill=rng.choice((0.0, -1.5)),
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 9, 5, 8),
        make(2, 2, 9, 5, 11, layout="channels", fill=2.0),
        make(3, 2, 9, 5, 3, 2),
        make(4, 2, 7, 7, dropped=False),
        make(5, 1, 6, 1, 8, layout="batch"),
        make(6, 2, 12, 3, 20, fill=-1.0),
        make(7, 1, 1, 1, 4),
        make(8, 2, 8, 0, 4, fill=1.0),
        make(9, 2, 30, 2, 9, dropped=False),
        make(10, 0, 8, 4, 8),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, m, c) for n, m, c in ((17, 9, 8), (30, 20, 12), (41, 7, 10))]


ENTRIES = (Entry("unmerge_tokens", draw, small, sizes),)
