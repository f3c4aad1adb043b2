"""Sampled and hand-picked calls of soft_merge."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import WIDTHS, rows, view
from vitkern.testing.registry import Call, Entry, label

KINDS = (
    ("token", "softmax"),
    ("slot", "softmax"),
    ("token", "sigmoid"),
    ("slot", "none"),
    ("token", "l2"),
    ("token", "sinkhorn"),
)


def make(
    number: int,
    batch: int,
    tokens: int,
    slots: int,
    *tail: int,
    weight: str = "none",
    masked: bool = False,
    transposed: bool = False,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`transposed`: the logits come as [B, M, N]. `weight`: none, sizes (1 to 5), zeros (some 0)."""
    g = torch.Generator().manual_seed(number)
    tensors = {"x": rows(g, batch, tokens, tail, layout)}
    logits = torch.randn(batch, tokens, slots, generator=g, dtype=torch.float64)
    if options.get("normalize") == "none" and options.get("renormalize"):
        logits = logits.abs()  # sums far from 0, where a mean is well conditioned
    tensors["logits"] = logits.mT.contiguous() if transposed else logits
    if weight != "none":
        tensors["weight"] = torch.randint(0 if weight == "zeros" else 1, 6, (batch, tokens), generator=g).double()
    if masked:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < 0.7

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        scores = t["logits"].mT if transposed else t["logits"]
        return (view(layout, t["x"]), scores), dict(options, weight=t.get("weight"), mask=t.get("mask"))

    facts = {"B": batch, "N": tokens, "M": slots, "tail": tail, "weight": weight, "masked": masked}
    facts |= {"transposed": transposed, "layout": layout}
    text = label(number, facts | options)
    return Call(text, vitkern.soft_merge, build, tensors, frozenset(("weight",)), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    axis, normalize = rng.choice(KINDS)
    options: dict[str, Any] = {"axis": axis, "normalize": normalize, "scale": rng.choice((1.0, 1.0, 0.3, 2.5))}
    if rng.random() < 0.4:
        options["renormalize"] = 1e-6
    if normalize == "sinkhorn":
        options |= {"eps": rng.choice((1.0, 0.5)), "iters": rng.choice((1, 3, 5))}
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        rng.choice((2 if normalize == "sinkhorn" else 1, 2, 7, 40, 197)),  # of one token its gradient is 0 less 0
        rng.choice((1, 2, 8, 17, 70)),
        *rng.choice(((), (rng.choice(WIDTHS),), (rng.choice(WIDTHS),), (3, 5), (300,))),
        weight=rng.choice(("none", "sizes", "zeros")) if (axis, normalize) == ("token", "softmax") else "none",
        masked=rng.random() < 0.3,
        transposed=rng.random() < 0.4,
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 9, 3, 8, weight="sizes"),
        make(2, 2, 9, 3, 11, axis="slot", renormalize=1e-6, transposed=True, layout="channels"),
        make(3, 2, 9, 3, 8, normalize="sigmoid", masked=True, renormalize=1e-6),
        make(4, 2, 9, 3, 3, 2, axis="slot", normalize="none", masked=True, scale=0.5),
        make(5, 2, 9, 3, 9, normalize="l2", masked=True, scale=-2.0),
        make(6, 2, 7, 4, 8, normalize="sinkhorn", eps=0.5, masked=True),
        make(7, 2, 9, 10, 8, weight="sizes", masked=True, transposed=True, renormalize=2.0),
        make(8, 1, 6, 2, 8, normalize="sinkhorn", iters=1, layout="batch", renormalize=1e-6),
        make(9, 2, 1, 1),
        make(10, 0, 8, 4, 8),
        make(11, 2, 150, 3, 20, normalize="sinkhorn", transposed=True),
        make(12, 1, 70, 66, 260, weight="zeros"),
        make(13, 2, 70, 1, 8, axis="slot", normalize="none", masked=True, layout="channels", renormalize=1e-6),
        make(14, 2, 70, 1, 20, normalize="l2", masked=True, layout="channels"),
        make(15, 2, 9, 1, 300, weight="zeros", renormalize=2.0),
        make(16, 2, 9, 1, 8, normalize="l2", masked=True, scale=1e-14),
        make(17, 2, 600, 1, 5, layout="channels", weight="sizes"),
        make(18, 1, 9, 1, 8, normalize="sigmoid", masked=True),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, m, c, weight="sizes") for n, m, c in ((17, 9, 8), (30, 20, 12), (41, 7, 10))]


ENTRIES = (Entry("soft_merge", draw, small, sizes),)
