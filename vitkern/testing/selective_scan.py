"""Sampled and hand-picked calls of selective_scan and selective_scan_2d."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label

PARAMETERS = frozenset(("A", "D", "delta_bias", "initial_state", "delta_weight"))


def parameters(g: torch.Generator, lead: tuple[int, ...], channels: int, states: int, given: str) -> dict[str, Tensor]:
    """A below 0, and what `given` names."""
    made = {"A": -torch.rand(*lead, channels, states, generator=g, dtype=torch.float64) - 0.1}
    for name in ("D", "delta_bias"):
        if name in given:
            made[name] = torch.randn(*lead, channels, generator=g, dtype=torch.float64)
    return made


def drawn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def make(
    number: int,
    batch: int,
    length: int,
    channels: int = 6,
    states: int = 3,
    groups: int = 1,
    *,
    route: str = "forward",
    routed: bool = False,
    own: str = "",
    given: str = "",
    lengths: tuple[int, ...] | None = None,
    first: bool = False,
    softplus: bool = True,
    transposed: bool = False,
    return_state: bool = False,
) -> Call:
    """`routed`: everything but u and z has a route axis; `own`: which of these have one. `given`: which of D, z and delta_bias.
    `lengths` of packed sequences."""
    g = torch.Generator().manual_seed(number)
    axis, lead = ((2,), (2,)) if routed else ((), ())
    rows: tuple[int, ...] = (batch, length) if lengths is None else (sum(lengths),)
    of_u, of_z = ((2,) if name in own else () for name in "uz")
    tensors = {"u": drawn(g, *rows[:-1], *of_u, channels, rows[-1]) if transposed else drawn(g, *rows, *of_u, channels)}
    delta = drawn(g, *rows, *axis, channels)
    tensors["delta"] = delta if softplus else delta.abs()
    tensors |= {n: drawn(g, *rows, *axis, groups, states) for n in "BC"}
    tensors |= parameters(g, lead, channels, states, given)
    if "z" in given:
        tensors["z"] = drawn(g, *rows, *of_z, channels)
    if lengths is not None:
        tensors["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0).int()
    if first:
        both = (2,) if route == "both" else ()
        tensors["initial_state"] = drawn(g, len(lengths) if lengths else batch, *both, channels, states)
    options = {"route": route, "delta_softplus": softplus, "return_state": return_state}

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        u = t["u"].movedim(-1, len(rows) - 1) if transposed else t["u"]
        more = {n: v for n, v in t.items() if n not in ("u", "delta", "A", "B", "C")}
        return (u, t["delta"], t["A"], t["B"], t["C"]), options | more

    facts = {
        "B": batch,
        "L": length,
        "C": channels,
        "S": states,
        "G": groups,
        "routed": routed,
        "own": own,
        "given": given,
    }
    facts |= {"lengths": lengths, "first": first, "transposed": transposed}
    return Call(label(number, facts | options), vitkern.selective_scan, build, tensors, PARAMETERS, False, number)


def make_2d(
    number: int,
    batch: int,
    grid: tuple[int, int],
    channels: int = 6,
    states: int = 3,
    groups: int = 1,
    *,
    routes: tuple[str, ...] = ("row", "row_reverse", "col", "col_reverse"),
    given: str = "",
    rank: int = 0,
    **options: Any,
) -> Call:
    g = torch.Generator().manual_seed(number)
    count = len(routes)
    tensors = {"u": drawn(g, batch, *grid, channels), "delta": drawn(g, batch, *grid, count, rank or channels)}
    tensors |= {n: drawn(g, batch, *grid, count, groups, states) for n in "BC"}
    tensors |= parameters(g, (count,), channels, states, given)
    if "z" in given:
        tensors["z"] = drawn(g, batch, *grid, channels)
    if rank:
        tensors["delta_weight"] = drawn(g, count, channels, rank)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        more = {n: v for n, v in t.items() if n not in ("u", "delta", "A", "B", "C")}
        return (t["u"], t["delta"], t["A"], t["B"], t["C"]), {"routes": routes, "delta_softplus": True} | options | more

    facts = {
        "B": batch,
        "grid": grid,
        "C": channels,
        "S": states,
        "G": groups,
        "routes": routes,
        "given": given,
        "rank": rank,
    }
    return Call(label(number, facts | options), vitkern.selective_scan_2d, build, tensors, PARAMETERS, False, number)


def draw(rng: random.Random) -> Call:
    groups = rng.choice((1, 1, 2, 3))
    shape = (groups * rng.choice((1, 3, 8, 17, 40)), rng.choice((1, 2, 4, 16)), groups)
    given = " ".join(n for n in ("D", "z", "delta_bias") if rng.random() < 0.5)
    if rng.random() < 0.4:
        routes = tuple(rng.choice(("row", "row_reverse", "col", "col_reverse")) for _ in range(rng.choice((1, 2, 4))))
        grid = (rng.choice((1, 3, 5)), rng.choice((1, 2, 9)))
        options: dict[str, Any] = {"rank": rng.choice((0, 0, 3)), "reduce": rng.choice(("sum", "mean", "stack"))}
        return make_2d(rng.randrange(2**31), rng.choice((1, 2)), grid, *shape, routes=routes, given=given, **options)
    route = rng.choice(("forward", "backward", "both"))
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2)),
        rng.choice((1, 5, 33, 70)),
        *shape,
        route=route,
        routed=route == "both" and rng.random() < 0.7,
        own=rng.choice(("", "", "u", "z", "uz")) if route == "both" else "",
        given=given,
        lengths=rng.choice((None, None, (3, 0, 40), (1, 7))),
        first=rng.random() < 0.4,
        softplus=rng.random() < 0.7,
        transposed=rng.random() < 0.3,
        return_state=rng.random() < 0.4,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 5, given="D z delta_bias", return_state=True),
        make(2, 2, 4, 6, 2, 2, route="both", routed=True, given="D z delta_bias", first=True, return_state=True),
        make(3, 1, 9, route="backward", lengths=(4, 0, 3), first=True, return_state=True, transposed=True),
        make(4, 2, 4, 3, 1, softplus=False, route="both", given="D"),
        make_2d(5, 2, (2, 3), given="D z delta_bias"),
        make_2d(6, 1, (3, 2), 4, 2, 2, routes=("col", "row_reverse"), rank=2, given="delta_bias", reduce="mean"),
        make_2d(7, 1, (2, 2), 4, 1, routes=("col_reverse", "row"), reduce="stack", given="D"),
        make(8, 1, 67, 40, 4, given="z", return_state=True),
        make(9, 0, 4),
        make(10, 1, 1, 1, 1),
        make(11, 2, 3, 3, 2, route="both", own="u", given="D z", transposed=True),
        make(12, 1, 5, 3, 2, route="both", routed=True, own="uz", given="D z", lengths=(2, 3)),
        make_2d(13, 1, (2, 2), 3, 9, routes=("col", "row"), rank=9, reduce="stack", given="z D"),
    ]


def sizes() -> list[Call]:
    return [make(1, batch, n, 7, 3, given="D z delta_bias") for batch, n in ((2, 5), (4, 9), (6, 12))]


ENTRIES = (Entry("selective_scan", draw, small, sizes),)
