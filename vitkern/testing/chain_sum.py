"""Sampled and hand-picked calls of chain_sum, the op behind the causal forms and the decays along a chain."""

import random
from typing import Any

import torch
from torch import Tensor

from vitkern.ops.chain_sum import chain_sum
from vitkern.testing.registry import Call, Entry, label

PARAMETERS = frozenset(("link", "state"))


def make(
    number: int,
    batch: int,
    tokens: int,
    heads: int = 2,
    depth: int = 5,
    width: int = 6,
    *,
    link: str = "shared",
    state: bool = False,
    order: bool = False,
    lengths: tuple[int, ...] = (),
    reverse: bool = False,
    strict: bool = False,
    block: int = 0,
    transposed: bool = False,
    expanded_gradient: bool = False,
) -> Call:
    """`link`: none, shared, rows, columns, constant (one rate for each head). `lengths`: of packed sequences. `transposed`: heads
    stand before the tokens in memory."""
    g = torch.Generator().manual_seed(number)
    batch, tokens = (1, sum(lengths)) if lengths else (batch, tokens)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lead = (batch, heads, tokens) if transposed else (batch, tokens, heads)
    tensors = {"a": leaf(*lead, depth), "b": leaf(*lead, depth), "c": leaf(*lead, width)}
    if link == "constant":
        tensors["link"] = -torch.rand(heads, generator=g, dtype=torch.float64)
    elif link != "none":
        own = {"shared": 1, "rows": depth, "columns": width}[link]
        tensors["link"] = -torch.rand(batch, tokens, heads, own, generator=g, dtype=torch.float64)
    if state:
        tensors["state"] = leaf(len(lengths) or batch, heads, depth, width)
    if order:
        tensors["order"] = torch.randperm(tokens, generator=g).to(torch.int32)
    if lengths:
        tensors["bounds"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        a, b, c = ((t[n].transpose(1, 2) if transposed else t[n]) for n in "abc")
        links = t["link"].expand(a.shape[:3])[..., None] if link == "constant" else t.get("link")
        rest = (t.get("state"), t.get("order"), t.get("bounds"), link == "columns", reverse, strict, block)
        return (a, b, c, links, *rest), {}

    facts = {"B": batch, "N": tokens, "H": heads, "F": depth, "C": width, "link": link, "state": state, "order": order}
    facts |= {"lengths": lengths, "reverse": reverse, "strict": strict, "block": block, "transposed": transposed}
    return Call(label(number, facts), chain_sum, build, tensors, PARAMETERS, expanded_gradient, number)


def draw(rng: random.Random) -> Call:
    lengths = tuple(rng.randint(0, 9) for _ in range(rng.randint(1, 4))) if rng.random() < 0.3 else ()
    return make(
        rng.randrange(2**31),
        rng.choice((0, 1, 2, 3)),
        rng.randint(0, 40),
        rng.choice((1, 2, 3)),
        rng.choice((1, 3, 8, 17)),
        rng.choice((1, 4, 9, 16, 33)),
        link=rng.choice(("none", "shared", "rows", "columns", "constant")),
        state=rng.random() < 0.5,
        order=rng.random() < 0.3,
        lengths=lengths,
        reverse=rng.random() < 0.5,
        strict=rng.random() < 0.5,
        block=rng.choice((0, 0, 1, 4, 7)),
        transposed=rng.random() < 0.3,
    )


def small() -> list[Call]:
    return [
        make(1, 2, 6),
        make(2, 1, 7, link="rows", state=True, reverse=True),
        make(3, 2, 9, link="columns", strict=True, order=True),
        make(4, 1, 0, lengths=(4, 0, 5), state=True, link="shared", reverse=True, strict=True),
        make(5, 1, 10, link="none", block=4, reverse=True, strict=True, state=True),
        make(6, 2, 5, link="constant", state=True, transposed=True, expanded_gradient=True),
        make(7, 1, 11, 1, 3, 9, link="rows", block=3, state=True),
        make(8, 0, 4),
        make(9, 1, 1, 1, 1, 1, state=True),
        make(10, 1, 9, 1, 3, 40, link="columns", state=True, reverse=True),  # one head, whose columns threads share
    ]


def sizes() -> list[Call]:
    return [make(1, batch, n, 3, 4, 7, state=True) for batch, n in ((2, 5), (6, 9), (8, 12))]


ENTRIES = (Entry("chain_sum", draw, small, sizes),)
