"""selective_scan_2d: scans of a map along several routes, on the op of selective_scan."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _sharded
from vitkern.ops.selective_scan import OP, lowered

NAME = "selective_scan_2d"
NAMED = ("row", "row_reverse", "col", "col_reverse")
REDUCE = ("sum", "mean", "stack")


def selective_scan_2d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    routes: Any = NAMED,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_weight: Tensor | None = None,
    delta_softplus: bool = False,
    reduce: str = "sum",
    backend: str | None = None,
) -> Tensor:
    r"""Selective scans of a map along R routes, added up (VMamba, Liu et al. 2024). Everything is indexed by pixel; a route only
    fixes the order of the visits, so that no turned copy of anything is made.

    Args:
        u: ``[B, Hs, Ws, C]``.
        delta: ``[B, Hs, Ws, R, C]``; with `delta_weight` ``[R, C, K]`` low-rank, ``[B, Hs, Ws, R, K]``: delta is then the product,
            made as it is read.
        A: ``[R, C, S]``; D, delta_bias: ``[R, C]``.
        B, C: ``[B, Hs, Ws, R, G, S]``; a channel c reads group ``c // (C / G)``. Without the axis G there is one group.
        routes: names among ``"row"`` (y Ws + x), ``"row_reverse"``, ``"col"`` (x Hs + y), ``"col_reverse"``, or int32
            permutations ``[Hs Ws]`` of the pixels.
        z: a gate, the shape of u.
        delta_softplus: whether delta + delta_bias goes through a softplus (itself above 20).
        reduce: ``"sum"`` or ``"mean"`` over the routes, in float32 and in their order; ``"stack"`` keeps them apart.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        The shape and dtype of u, with ``"stack"`` ``[B, Hs, Ws, R, C]``. Gradients go to all floating-point arguments.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(u) not in _sharded.PLAIN and _sharded.met(u):
        return _sharded.call(selective_scan_2d, locals())
    args = _lower(u, delta, A, B, C, routes, D, z, delta_bias, delta_weight, delta_softplus, reduce)
    return _call.run(OP, args, backend)[1].unflatten(1, u.shape[1:3])


def _lower(
    u: Any,
    delta: Any,
    a: Any,
    b: Any,
    c: Any,
    routes: Any = NAMED,
    d: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_weight: Any = None,
    delta_softplus: Any = False,
    reduce: Any = "sum",
) -> tuple[Any, ...]:
    """The arguments of the op."""
    _checks.tensor(NAME, "u", u)
    for name, t in (("u", u), ("delta", delta), ("A", a), ("B", b), ("C", c)):
        _checks.parameter(NAME, name, t, u.device, "u")
    if u.dim() != 4:
        raise ValueError(f"{NAME}: u must have shape [B, Hs, Ws, C], got {list(u.shape)}")
    order = _order(routes, u)
    axes, count, channels = tuple(u.shape[:3]), len(order), u.shape[3]
    if delta_weight is not None:
        _checks.parameter(NAME, "delta_weight", delta_weight, u.device, "u")
        rank = delta.shape[-1] if delta.dim() else 0
        _checks.shape(NAME, "delta_weight", delta_weight, (count, channels, rank), "[R, C, K]")
        _checks.shape(NAME, "delta", delta, (*axes, count, rank), "[B, Hs, Ws, R, K]")
    else:
        _checks.shape(NAME, "delta", delta, (*axes, count, channels), "[B, Hs, Ws, R, C]")
    b, c = (t.unsqueeze(-2) if t.dim() == 5 else t for t in (b, c))
    for name, t in (("B", b), ("C", c)):
        if t.dim() != 6 or tuple(t.shape[:4]) != (*axes, count):
            raise ValueError(
                f"{NAME}: {name} must have shape [B, Hs, Ws, R, G, S] = {[*axes, count, 'G', 'S']}, got {list(t.shape)}"
            )
    if a.dim() != 3 or tuple(a.shape[:2]) != (count, channels):
        raise ValueError(f"{NAME}: A must have shape [R, C, S] = {[count, channels, 'S']}, got {list(a.shape)}")
    for name, t, want, text in (
        ("D", d, (count, channels), "[R, C]"), ("delta_bias", delta_bias, (count, channels), "[R, C]"),
        ("z", z, tuple(u.shape), "that of u"),
    ):  # fmt: skip
        if t is not None:
            _checks.parameter(NAME, name, t, u.device, "u")
            _checks.shape(NAME, name, t, want, text)
    if reduce not in REDUCE:
        raise ValueError(f"{NAME}: reduce must be 'sum', 'mean' or 'stack', got {reduce!r}")
    u, delta, b, c, z = (None if t is None else t.flatten(1, 2) for t in (u, delta, b, c, z))
    u, z = (None if t is None else t.unsqueeze(2) for t in (u, z))
    return lowered(NAME, u, delta, a, b, c, d, z, delta_bias, None, delta_weight, order, None, delta_softplus, reduce)


def _order(routes: Any, u: Tensor) -> Tensor:
    """The pixel at each step, int32 [R, Hs Ws]."""
    high, wide = u.shape[1:3]
    if not isinstance(routes, (tuple, list)) or not routes:
        raise TypeError(f"{NAME}: routes must be a tuple of names or index tensors, got {routes!r}")
    pixel = torch.arange(high * wide, dtype=torch.int32, device=u.device)
    chosen = []
    for route in routes:
        if isinstance(route, Tensor):
            if route.dtype != torch.int32 or tuple(route.shape) != (high * wide,) or route.device != u.device:
                raise ValueError(
                    f"{NAME}: routes must be int32 [Hs Ws] = [{high * wide}] on {u.device}, "
                    f"got {route.dtype} {list(route.shape)} on {route.device}"
                )
            if backends.may_read(route) and not torch.equal(route.sort().values, pixel):
                raise ValueError(
                    f"{NAME}: routes must be permutations of the {high * wide} pixels, got {route.tolist()}"
                )
            chosen.append(route)
            continue
        if route not in NAMED:
            raise ValueError(f"{NAME}: routes must be {', '.join(map(repr, NAMED))} or index tensors, got {route!r}")
        order = pixel if route.startswith("row") else pixel.view(high, wide).t().flatten()
        chosen.append(order.flip(0) if route.endswith("reverse") else order)
    return torch.stack(chosen)


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    given = {n.lower() if n in ("A", "B", "C", "D") else n: t for n, t in options.items()}
    return _call.explanation(NAME, OP, _lower(*args, **given), backend)


selective_scan_2d.explain = _explain  # type: ignore[attr-defined]
