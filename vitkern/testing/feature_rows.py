"""Sampled and hand-picked calls of feature_rows, the op behind the features of decayed and causal linear attention."""

import random
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.feature_rows import feature_rows
from vitkern.testing.registry import Call, Entry, label

MAPS = ("relu", "elu1", "identity", "leaky_relu", "exp", "softmax", "silu_norm")


def make(
    number: int,
    batch: int,
    tokens: int,
    heads: int = 2,
    d: int = 5,
    *,
    name: str = "elu1",
    masked: bool = False,
    weight: str = "none",
    scale: float = 1.0,
    transposed: bool = False,
    expanded_gradient: bool = False,
) -> Call:
    """`weight`: none, heads, shared. `transposed`: channels stand before the tokens in memory."""
    g = torch.Generator().manual_seed(number)
    shape = (batch, heads, d, tokens) if transposed else (batch, tokens, heads, d)
    tensors = {"x": torch.randn(shape, generator=g, dtype=torch.float64)}
    if masked:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < 0.7
    if weight != "none":
        own = heads if weight == "heads" else 1
        tensors["weight"] = torch.rand(batch, tokens, own, generator=g, dtype=torch.float64) - 0.3

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x = t["x"].permute(0, 3, 1, 2) if transposed else t["x"]
        return (x, t.get("mask"), t.get("weight"), name, 0.3, scale), {}

    facts = {"B": batch, "N": tokens, "H": heads, "D": d, "map": name, "masked": masked, "weight": weight}
    facts |= {"scale": scale, "transposed": transposed}
    return Call(label(number, facts), feature_rows, build, tensors, frozenset(("weight",)), expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    return make(
        rng.randrange(2**31),
        rng.choice((0, 1, 2, 3)),
        rng.randint(0, 40),
        rng.choice((1, 2, 3)),
        rng.choice((1, 3, 8, 16, 17, 33)),
        name=rng.choice(MAPS),
        masked=rng.random() < 0.5,
        weight=rng.choice(("none", "heads", "shared")),
        scale=rng.choice((1.0, 0.25)),
        transposed=rng.random() < 0.3,
    )


def small() -> list[Call]:
    return [
        *(make(i, 2, 5, 2, 9, name=name, masked=i % 2 == 1, scale=0.5) for i, name in enumerate(MAPS)),
        make(10, 2, 6, 3, 4, weight="heads", masked=True),
        make(11, 1, 7, 3, 17, name="silu_norm", weight="shared", scale=-2.0),
        make(12, 2, 5, 2, 8, name="softmax", transposed=True, expanded_gradient=True),
        make(13, 1, 4, 2, 3, name="exp", weight="shared", masked=True, transposed=True),
        make(14, 0, 4),
        make(15, 1, 0),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, n, 3, 4, masked=True, weight="heads") for batch, n in ((2, 5), (6, 9), (8, 12))]


ENTRIES = (Entry("feature_rows", draw, small, sizes),)
