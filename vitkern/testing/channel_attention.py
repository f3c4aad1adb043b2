"""Sampled and hand-picked calls of channel_attention."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label

LAYOUTS = ("plain", "packed", "channels", "batch")
NORMALIZERS = ("softmax", "softmax", "relu", "none", "plus1")


def leaf(g: torch.Generator, layout: str, batch: int, axes: tuple[int, ...], heads: int, width: int) -> Tensor:
    """The leaf that `view` turns into [batch, *axes, heads, width]."""
    shape = {
        "plain": (batch, *axes, heads, width),
        "packed": (batch, *axes, 2, heads, width),
        "channels": (batch, heads, width, *axes),
        "batch": (1, *axes, heads, width),
    }[layout]
    return torch.randn(shape, generator=g, dtype=torch.float64)


def view(layout: str, t: Tensor, batch: int) -> Tensor:
    if layout == "packed":
        return t.select(-3, 1)
    if layout == "channels":
        return t.movedim((1, 2), (-2, -1))
    return t.expand(batch, *t.shape[1:]) if layout == "batch" else t


def make(
    number: int,
    batch: int,
    axes: tuple[int, ...],
    heads: int = 2,
    d: int = 8,
    e: int | None = None,
    *,
    group: int = 1,
    layout: str = "plain",
    temperature: bool = True,
    masked: bool = False,
    lengths: tuple[int, ...] | None = None,
    ordered: bool = False,
    weights: int = 0,
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`lengths` of packed sequences, with batch 1. `group`: heads of q to one of k.
    `weights`: how many top-k softmaxes are mixed."""
    g = torch.Generator().manual_seed(number)
    sides = {"q": d, "k": e or d, "v": e or d}
    tensors = {
        name: leaf(g, layout, batch, axes, heads * group if name == "q" else heads, width)
        for name, width in sides.items()
    }
    if temperature:
        tensors["temperature"] = torch.rand(heads * group, 1, 1, generator=g, dtype=torch.float64) + 0.5
    if masked:
        tensors["key_mask"] = torch.rand((batch, *axes), generator=g) < 0.7
    if lengths is not None:
        tensors["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0).int()
    if ordered:
        drawn = [torch.randperm(axes[0], generator=g) for _ in range(batch)]
        tensors["order"] = torch.stack(drawn).int() if lengths is None else drawn[0].int()
    if weights:
        tensors["topk_weight"] = torch.rand(weights, generator=g, dtype=torch.float64) + 0.1

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        size = t["key_mask"].shape[0] if masked else batch
        q, k, v = (view(layout, t[name], size) for name in "qkv")
        given = {n: t[n] for n in t if n not in ("q", "k", "v")}
        if lengths is not None:
            q, k, v = q[0], k[0], v[0]
            given |= {"key_mask": t["key_mask"][0]} if masked else {}
        return (q, k, v), options | given

    facts = {"B": batch, "axes": axes, "H": heads, "G": group, "D": d, "E": e, "layout": layout, "masked": masked}
    facts |= {"lengths": lengths, "ordered": ordered, "weights": weights, "temperature": temperature}
    text = label(number, facts | options)
    parameters = frozenset(("temperature", "topk_weight"))
    return Call(text, vitkern.channel_attention, build, tensors, parameters, expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    options: dict[str, Any] = {"normalizer": rng.choice(NORMALIZERS)}
    widths = (1, 2, 7, 8, 16, 17, 24, 32, 40, 48, 64, 70)
    d = rng.choice(widths)
    e = d if rng.random() < 0.7 else rng.choice(widths)
    tokens = rng.choice((1, 2, 7, 63, 65, 197, 1300))
    shape = rng.choice(("tokens", "tokens", "grid", "windows", "runs", "packed"))
    alone = tokens == 1 or shape not in ("tokens", "grid")  # a unit vector of one token: its gradient is 0 less 0
    if rng.random() < 0.3 or alone:
        options |= {"normalize": False, "scale": rng.choice((tokens**-0.5, 0.5 / tokens))}
    elif rng.random() < 0.3:
        options["scale"] = rng.choice((0.3, 4.0, -2.0))
    axes: tuple[int, ...] = (tokens,)
    lengths, batch = None, rng.choice((1, 2, 3))
    if shape == "packed":
        lengths, batch = tuple(rng.choice((0, 1, 5, 70, 300)) for _ in range(rng.choice((1, 2, 4)))), 1
        axes = (sum(lengths),)
    elif shape in ("grid", "windows"):
        axes = (rng.choice((3, 5, 9, 14)), rng.choice((1, 4, 13)))
    if shape == "windows":
        options["window_size"] = rng.choice((4, (3, 5), (9, 4), (2, 1)))
    if shape == "runs":
        options["window_size"] = rng.choice((3, 8, 100))
    return make(
        rng.randrange(2**31),
        batch,
        axes,
        rng.choice((1, 2, 3, 8)),
        d,
        e,
        group=rng.choice((1, 1, 1, 2, 3)),
        layout=rng.choice(LAYOUTS if lengths is None else LAYOUTS[:3]),
        temperature=rng.random() < 0.7,
        masked=rng.random() < 0.3,
        lengths=lengths,
        ordered=shape in ("runs", "packed") and rng.random() < 0.5,
        expanded_gradient=rng.random() < 0.2,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel. Top-k stands here alone: where two logits are close, rounding
    chooses another channel."""
    return [
        make(1, 2, (9,), 2, 8),
        make(2, 2, (7,), 3, 8, layout="packed", masked=True),
        make(3, 2, (9,), 2, 5, 11, layout="channels", normalizer="plus1", ordered=True, window_size=4),
        make(4, 1, (12,), 2, 8, lengths=(5, 0, 1, 6), ordered=True, normalizer="relu", masked=True, normalize=False),
        make(5, 2, (7,), 1, 6, normalize=False, normalizer="none", scale=1 / 7, temperature=False),
        make(6, 2, (9,), 2, 6, topk=(2, 3, 5), weights=3),
        make(7, 2, (3, 4), 2, 8, 5, topk=2, layout="batch", normalize=False, scale=0.3),
        make(8, 2, (4, 16), 2, 16, layout="channels", scale=-2.0),
        make(9, 1, (5,), 2, 6, topk=(1, 4), weights=2, normalizer="relu", layout="channels"),
        make(10, 2, (3, 5), 3, 8, layout="packed", masked=True, window_size=(2, 3)),
        make(11, 0, (8,), 2, 8),
        make(12, 1, (8, 70), 2, 17, 9, layout="channels", masked=True),
        make(13, 1, (1100,), 3, 40, 33, layout="packed"),
        make(14, 1, (40,), 1, 200, 130),
        make(15, 1, (1,), 1, 1, expanded_gradient=True),
        make(16, 2, (9,), 2, 6, 5, group=2, masked=True),
        make(17, 1, (3, 4), 1, 5, group=3, layout="channels", topk=2, window_size=2, normalize=False, scale=0.3),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, (n,), 5, 8) for batch, n in ((2, 17), (3, 30), (4, 41))]


ENTRIES = (Entry("channel_attention", draw, small, sizes, cast=("q", "k", "v")),)
