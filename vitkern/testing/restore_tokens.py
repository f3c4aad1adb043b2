"""Sampled and hand-picked calls of restore_tokens."""

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
    kept: int,
    n: int,
    *tail: int,
    fill: str = "value",
    nowhere: bool = False,
    layout: str = "plain",
    expanded_gradient: bool = False,
) -> Call:
    """`fill`: value (1.5), token, sample (a row each), position (a row each), full."""
    g = torch.Generator().manual_seed(number)
    tensors = {"y": rows(g, batch, kept, tail, layout)}
    tensors["index"] = shuffled(g, batch, n)[:, :kept].to(torch.int32) - 1
    if nowhere:
        tensors["index"] = torch.where(torch.rand(batch, kept, generator=g) < 0.3, n, tensors["index"])
    shapes = {"token": tail, "sample": (batch, 1, *tail), "position": (n, *tail), "full": (batch, n, *tail)}
    if fill != "value":
        tensors["fill"] = torch.randn(shapes[fill], generator=g, dtype=torch.float64)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        y = view(layout, t["y"])
        return (y, t["index"], t["index"].shape[1] + n - kept, t.get("fill", 1.5)), {}

    facts = {"B": batch, "K": kept, "n": n, "tail": tail, "fill": fill, "nowhere": nowhere, "layout": layout}
    text = label(number, facts)
    parameters = frozenset(("fill",)) if fill == "token" else frozenset()
    return Call(text, vitkern.restore_tokens, build, tensors, parameters, expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    n = rng.choice((1, 2, 7, 40, 197))
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        rng.choice((0, 1, (n + 1) // 2, n)),
        n,
        *draw_tail(rng),
        fill=rng.choice(("value", "token", "token", "sample", "position", "full")),
        nowhere=rng.random() < 0.2,
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 4, 9, 8, fill="token"),
        make(2, 2, 4, 9, 11, fill="token", layout="channels"),
        make(3, 2, 4, 9, 3, 2, fill="full"),
        make(4, 2, 5, 9, 8, fill="position", nowhere=True),
        make(5, 3, 4, 9, 8, fill="sample"),
        make(6, 2, 4, 9, 8),
        make(7, 2, 5, 9, fill="token", nowhere=True),
        make(8, 1, 4, 6, 8, fill="token", layout="batch"),
        make(9, 2, 0, 5, 8, fill="token"),
        make(10, 2, 5, 5, 8, fill="full"),
        make(11, 0, 4, 8, 8, fill="token"),
        make(12, 2, 0, 0, 4, fill="token"),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n - 6, n, c, fill="token") for n, c in ((17, 8), (30, 12), (41, 10))]


ENTRIES = (Entry("restore_tokens", draw, small, sizes),)
