"""Sampled and hand-picked calls of merge_plan: integers, equal bit for bit. Scores are few, so that ties are many."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label


def planned(match: vitkern.Match, *, backend: str | None = None, **options: Any) -> tuple[Tensor, ...]:
    plan = vitkern.merge_plan(match, backend=backend, **options)
    return plan.token_map, plan.perm, plan.offsets, plan.lengths


def make(
    number: int,
    batch: int,
    tokens: int,
    *,
    roles: tuple[int, ...] = (0, 1),
    values: int = 8,
    r: int | str | None = None,
    threshold: float | None = None,
    limit: int | None = None,
    **options: Any,
) -> Call:
    """Random roles out of `roles`, scores out of `values` numbers; `r="batch"`: one per sample, as is `threshold`."""
    g = torch.Generator().manual_seed(number)
    role = torch.tensor(roles, dtype=torch.int8)[torch.randint(0, len(roles), (batch, tokens), generator=g)]
    score = torch.randint(-values, values + 1, (batch, tokens), generator=g).double() / values
    dst = torch.arange(tokens, dtype=torch.int32).repeat(batch, 1)
    for b in range(batch):
        places = (role[b] == 1).nonzero()[:, 0]
        if len(places):
            dst[b] = places[torch.randint(0, len(places), (tokens,), generator=g)].to(torch.int32)
        else:
            score[b] = -math.inf
    alone = (role != 0) | (torch.rand(batch, tokens, generator=g) < 0.1)
    tensors = {"score": score.masked_fill(alone, -math.inf), "dst": dst, "role": role}
    eligible = int((tensors["score"] > -math.inf).sum(1).min()) if batch else 0
    if r == "batch":
        tensors["r"] = torch.randint(0, eligible + 1, (batch,), generator=g)
    if threshold is not None:
        tensors["threshold"] = torch.full((batch,), threshold, dtype=torch.float64)
    most = eligible if limit is None else limit

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        match = vitkern.Match(t["score"].float(), t["dst"], t["role"], most, 4 in roles)
        given = t.get("r", min(r, most) if isinstance(r, int) else r)
        return (match,), dict(options, r=given, threshold=t.get("threshold"), clip=True)

    facts = {"B": batch, "N": tokens, "roles": roles, "values": values, "r": r, "threshold": threshold, "limit": limit}
    text = label(number, facts | options)
    return Call(text, planned, build, tensors, frozenset(("score", "threshold")), seed=number)


def draw(rng: random.Random) -> Call:
    tokens = rng.choice((1, 2, 5, 33, 64, 197, 400))
    kind = rng.choice(("r", "r", "batch", "threshold", "all", "n_max"))
    options: dict[str, Any] = {"order": rng.choice(("split", "score", "position"))}
    roles = rng.choice(((0, 1), (0, 0, 0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4)))
    if kind == "r" or (kind == "threshold" and rng.random() < 0.5):
        options["r"] = rng.randint(0, tokens) if 4 not in roles else 0
    if kind == "batch":
        options["r"] = "batch"
    if kind == "threshold":
        options["threshold"] = rng.choice((-math.inf, -0.5, 0.0, 0.25, math.inf, math.nan))
    if kind == "n_max":
        options |= {"r": 0, "n_max": tokens}
    values = rng.choice((1, 8, 1000))
    return make(rng.randrange(2**31), rng.choice((1, 2, 3)), tokens, roles=roles, values=values, **options)


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 17, r=3),
        make(2, 2, 26, r=4, order="score", roles=(0, 1, 2, 3)),
        make(3, 2, 30, r="batch", order="position", roles=(0, 1, 2, 3, 4)),
        make(4, 3, 29, threshold=0.25, roles=(0, 1, 2, 3, 4)),
        make(5, 2, 40, roles=(0, 1, 4)),
        make(6, 2, 40, r=5, threshold=0.5, n_max=36, order="score"),
        make(7, 1, 1, r=0),
        make(8, 2, 24, threshold=math.nan),
        make(9, 2, 24, r=10**9, values=1),
        make(10, 0, 12, r=0),
        make(11, 2, 12, roles=(3,), r=0),
        make(12, 2, 12, roles=(4,), threshold=0.0),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, tokens, r="batch", roles=(0, 1, 2, 3), limit=tokens) for tokens in (17, 30, 41)]


ENTRIES = (Entry("merge_plan", draw, small, sizes, gradient=False),)
