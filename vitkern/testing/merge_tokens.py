"""Sampled and hand-picked calls of merge_tokens."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label

WIDTHS = (1, 3, 8, 17, 64, 100)


def random_plan(g: torch.Generator, batch: int, tokens: int, slots: int, dropped: bool) -> dict[str, Tensor]:
    """The tensors of a plan whose destinations stand anywhere in their slots; some slots may be empty."""
    token_map = torch.randint(0, slots + (1 if dropped or slots == 0 else 0), (batch, tokens), generator=g)
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(batch)]) if batch else token_map.clone()
    perm = order.gather(1, token_map.gather(1, order).argsort(dim=1, stable=True))
    counts = torch.nn.functional.one_hot(token_map, slots + 1).sum(1)[:, :slots]
    offsets = torch.cat((counts.new_zeros(batch, 1), counts.cumsum(1)), 1)
    named = {"token_map": token_map, "perm": perm, "offsets": offsets}
    return {name: t.to(torch.int32).contiguous() for name, t in named.items()}


def plan_of(t: dict[str, Tensor]) -> vitkern.MergePlan:
    slots = t["offsets"].shape[1] - 1
    return vitkern.MergePlan(t["token_map"], t["perm"], t["offsets"], t["offsets"][:, -1] * 0 + slots, slots)


def rows(g: torch.Generator, batch: int, tokens: int, tail: tuple[int, ...], layout: str) -> Tensor:
    """The leaf that `view` turns into [batch, tokens, *tail]. `layout`: plain, channels (first), batch (expanded)."""
    shape = (batch, tokens, *tail)
    if layout == "channels":
        shape = (batch, *tail, tokens)
    if layout == "batch":
        shape = (1, tokens, *tail, batch)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def view(layout: str, t: Tensor) -> Tensor:
    if layout == "channels":
        return t.movedim(-1, 1)
    return t.select(-1, 0).expand(t.shape[-1], *t.shape[1:-1]) if layout == "batch" else t


def make(
    number: int,
    batch: int,
    tokens: int,
    slots: int,
    *tail: int,
    weight: str = "none",
    dropped: bool = True,
    layout: str = "plain",
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`weight`: none, sizes (1 to 5), zeros (some 0)."""
    g = torch.Generator().manual_seed(number)
    tensors = {"x": rows(g, batch, tokens, tail, layout), **random_plan(g, batch, tokens, slots, dropped)}
    if weight != "none":
        tensors["weight"] = torch.randint(0 if weight == "zeros" else 1, 6, (batch, tokens), generator=g).double()

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (view(layout, t["x"]), plan_of(t)), dict(options, weight=t.get("weight"))

    facts = {
        "B": batch,
        "N": tokens,
        "slots": slots,
        "tail": tail,
        "weight": weight,
        "dropped": dropped,
        "layout": layout,
    }
    text = label(number, facts | options)
    return Call(text, vitkern.merge_tokens, build, tensors, frozenset(("weight",)), expanded_gradient, number)


def draw_tail(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(((), (rng.choice(WIDTHS),), (rng.choice(WIDTHS),), (3, 5)))


def draw(rng: random.Random) -> Call:
    tokens = rng.choice((1, 2, 7, 40, 197))
    reduce = rng.choice(("mean", "mean", "sum", "max", "first", "mlerp"))
    tail = draw_tail(rng)
    options = {"include_dst": rng.random() < 0.7} if reduce in ("mean", "sum") else {}
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.choice((1, max(1, tokens // 2), tokens)),
        *tail,
        weight=rng.choice(("none", "sizes", "zeros")),
        dropped=rng.random() < 0.4,
        layout=rng.choice(("plain", "plain", "channels", "batch")),
        expanded_gradient=rng.random() < 0.2,
        reduce=reduce,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 9, 5, 8, weight="sizes"),
        make(2, 2, 9, 5, 11, weight="sizes", reduce="sum", layout="channels"),
        make(3, 2, 9, 5, 8, reduce="max"),
        make(13, 2, 9, 5, 8, weight="zeros", reduce="mlerp"),
        make(4, 2, 9, 5, 3, 2, weight="sizes", reduce="first"),
        make(5, 2, 9, 4, 9, weight="sizes", include_dst=False),
        make(6, 2, 7, 3, 8, reduce="sum", include_dst=False, dropped=False),
        make(7, 2, 7, 7, weight="sizes"),
        make(8, 1, 6, 1, 8, layout="batch"),
        make(9, 2, 8, 4, 8, weight="zeros"),
        make(10, 0, 8, 4, 8),
        make(11, 2, 8, 0, 4),
        make(14, 2, 9, 3, 11, reduce="mlerp", layout="channels"),
        make(12, 1, 60, 2, 20, weight="sizes", dropped=False),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, n, m, c, weight="sizes") for n, m, c in ((17, 9, 8), (30, 20, 12), (41, 7, 10))]


ENTRIES = (Entry("merge_tokens", draw, small, sizes),)
