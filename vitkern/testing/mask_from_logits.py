"""Sampled and hand-picked calls of mask_from_logits, the op behind mask.FromLogits.

What rounding decides is nobody's error: where the sides are stretched by powers of two, logits in eighths make every step exact,
ties included; elsewhere the threshold is no ratio of small integers, so that no cell comes near it, and no logit is infinite (a
weight of 0 may be rounded).
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

from vitkern.mask import FromLogits
from vitkern.ops.mask_from_logits import mask_from_logits
from vitkern.testing.registry import Call, Entry, label


def words(
    logits: Tensor, open_rows: Tensor | None, *, around: tuple[int, int, int, int], backend: str | None, **options: Any
) -> Tensor:
    first, left = around[::2]
    rows, cols = (first, first + logits.shape[1]), (left, left + math.prod(options["size"]))
    m = FromLogits(logits, open_rows=open_rows, rows=rows, cols=cols, **options)
    return mask_from_logits(m, rows[1] + around[1], cols[1] + around[3], backend=backend)


def make(
    number: int,
    batch: int,
    queries: int,
    sides: tuple[int, int],
    size: tuple[int, int],
    *,
    shift: int = 0,
    open_rows: bool = False,
    layout: str = "plain",
    damage: str = "none",
    around: tuple[int, int, int, int] = (0, 0, 0, 0),
    **options: Any,
) -> Call:
    """`shift`: eighths added to all logits. `damage`: none, nan, inf (some logits). `layout`: plain, transposed, sliced, expanded.
    `around`: queries before and behind, keys before and behind."""
    g = torch.Generator().manual_seed(number)
    exact = all(math.log2(a / b).is_integer() for a, b in zip(sides, size, strict=True))
    logits = torch.randint(-24, 25, (batch, queries, *sides), generator=g).double().add(shift).div(8)
    if damage == "nan" or (damage == "inf" and exact):
        hit = torch.rand(logits.shape, generator=g) < 0.1
        sign = torch.randint(0, 2, logits.shape, generator=g).mul(2).sub(1)
        logits = torch.where(hit, sign * {"nan": math.nan, "inf": math.inf}[damage], logits)
    tensors = {"logits": logits}
    if layout == "transposed":
        tensors["logits"] = logits.mT.contiguous()
    elif layout == "expanded":
        tensors["logits"] = logits[:1]
    elif layout == "sliced":
        tensors["logits"] = torch.stack((logits, logits + 1), -1)
    if open_rows:
        tensors["open_rows"] = torch.rand(batch, queries, generator=g) < 0.4
    options = {"size": size, "threshold": 0.0 if exact else math.sqrt(0.5), "around": around} | options

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = t["logits"]
        if layout == "expanded":
            x = x.expand(batch, *x.shape[1:])
        elif layout != "plain":
            x = x.mT if layout == "transposed" else x[..., 0]
        return (x, t.get("open_rows")), options

    facts = {"B": batch, "Q": queries, "sides": sides, "shift": shift, "open": open_rows, "layout": layout}
    return Call(label(number, facts | {"damage": damage} | options), words, build, tensors, seed=number)


def draw(rng: random.Random) -> Call:
    sides = rng.choice(((8, 8), (16, 4), (5, 7), (rng.randint(1, 20), rng.randint(1, 20))))
    step = rng.choice((0.5, 1, 2, 4))
    free = (rng.randint(1, 30), rng.randint(1, 30))
    exact = rng.random() < 0.5 and all(n * step >= 1 and n * step % 1 == 0 for n in sides)
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        rng.choice((1, 3, 10)),
        sides,
        (int(sides[0] * step), int(sides[1] * step)) if exact else free,
        shift=rng.choice((0, 0, -20, -60)),
        open_rows=rng.random() < 0.3,
        layout=rng.choice(("plain", "plain", "transposed", "sliced", "expanded")),
        around=rng.choice(((0, 0, 0, 0), (0, 0, 5, 0), (0, 3, 33, 0), (2, 0, 0, 40), (1, 1, 7, 8))),
        damage=rng.choice(("none", "none", "none", "nan", "inf")),
        empty=rng.choice(("full", "full", "none")),
        inclusive=rng.random() < 0.6,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 3, (4, 4), (4, 4)),
        make(2, 2, 5, (4, 6), (8, 12), inclusive=False, shift=-20),
        make(3, 1, 4, (8, 8), (4, 2), empty="none", shift=-40),
        make(4, 2, 6, (5, 7), (9, 4), open_rows=True, layout="transposed"),
        make(5, 3, 2, (3, 5), (7, 11), layout="sliced", damage="nan"),
        make(6, 1, 3, (4, 4), (8, 8), damage="nan", inclusive=False, empty="none"),
        make(7, 2, 3, (4, 4), (8, 8), damage="inf", open_rows=True),
        make(8, 1, 40, (2, 2), (1, 1), shift=-24),  # rows of one cell, many of which see nothing
        make(9, 2, 2, (1, 1), (3, 5), open_rows=True, empty="none"),
        make(10, 0, 3, (4, 4), (2, 2)),
        make(11, 1, 2, (1, 40), (1, 20), threshold=-math.inf, inclusive=False),
        make(12, 2, 2, (4, 4), (4, 4), damage="inf", layout="transposed"),
        make(13, 2, 2, (4, 4), (4, 8), damage="inf"),
        make(14, 1, 2, (33, 3), (11, 30), shift=-30, layout="transposed"),
        *(make(15 + n, 2, 3, (1, 32), (1, n), shift=-20) for n in (31, 32, 33, 63, 64, 65)),  # words that are not full
        make(21, 2, 3, (4, 4), (8, 8), around=(2, 1, 31, 3), open_rows=True, shift=-30),  # EoMT: a block in the middle
        make(22, 3, 2, (4, 4), (4, 4), around=(0, 1, 1, 0), empty="none", shift=-60, layout="expanded"),
        make(24, 2, 0, (4, 4), (8, 8), around=(3, 1, 0, 2)),  # no maps
        make(23, 2, 3, (4, 6), (8, 12), around=(1, 0, 70, 50), damage="nan", inclusive=False),
        make(25, 2, 3, (5, 100), (4, 37)),  # cells whose neighbours lie in several vectors
        make(26, 1, 2, (40, 64), (16, 24), inclusive=False),
        make(27, 2, 2, (9, 200), (9, 40), damage="inf"),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, queries, (6, 5), (9, 9), shift=-10) for batch, queries in ((2, 3), (3, 5), (5, 4))]


ENTRIES = (Entry("mask_from_logits", draw, small, sizes, gradient=False),)
