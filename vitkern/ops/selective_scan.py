"""selective_scan: argument checks, lowering, and the op, which is that of selective_scan_2d too."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.selective_scan import selective_scan as definition

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import ScanOptions

NAME = "selective_scan"
ROUTES = ("forward", "backward", "both")


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    *, return_state: Literal[False] = False, **options: "Unpack[ScanOptions]",
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    *, return_state: Literal[True], **options: "Unpack[ScanOptions]",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    *, return_state: bool, **options: "Unpack[ScanOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    route: str = "forward",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Any:
    r"""The scan of a selective state space model (Mamba, Gu and Dao 2023; Vim, Zhu et al. 2024):
    ``h_l = exp(d_l A) h_(l-1) + d_l u_l B_l``, ``y_l = <C_l, h_l> + D u_l``, ``out = y silu(z)``, with
    ``d = delta + delta_bias``, of which `delta_softplus` takes the softplus (d itself above 20).

    Args:
        u: ``[B, L, C]``, any strides: ``[B, C, L]`` goes in as ``u.mT``.
        delta: the same shape.
        A: ``[C, S]``, real and normally negative.
        B, C: ``[B, L, G, S]``; a channel c reads group ``c // (C / G)``. ``[B, L, S]`` is one group.
        D, delta_bias: ``[C]``.
        z: a gate, the shape of u.
        route: ``"forward"``; ``"backward"`` visits the tokens from the last to the first; ``"both"`` adds the two. For ``"both"``
            u, delta, B, C and z may have an axis of two routes behind L, and A, D and delta_bias one in front; else the routes
            share them.
        cu_seqlens: int32 ``[W + 1]``: packed sequences, ``[T, C]`` and so on without the batch; each has a state of its own.
        initial_state: ``[B, C, S]``, for ``"both"`` ``[B, 2, C, S]``; of packed sequences W in place of B.
        return_state: whether the state behind the last visit is returned, of the same shape.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        The shape (without an axis of routes) and dtype of u; float32 inside and rounded once; with `return_state` the pair of it
        and the state in float32. Gradients go to all floating-point arguments, through the state as well.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(u) not in _sharded.PLAIN and _sharded.met(u):
        return _sharded.call(selective_scan, locals())
    args = _lower(u, delta, A, B, C, D, z, delta_bias, delta_softplus, route, cu_seqlens, initial_state)
    state, out = _call.run(OP, args, backend)
    packed = cu_seqlens is not None
    out = out[0] if packed else out
    if not isinstance(return_state, bool):
        raise TypeError(f"{NAME}: return_state must be a bool, got {return_state!r}")
    if not return_state:
        return out
    state = state[0].transpose(0, 1) if packed else state[:, :, 0]
    return out, state if route == "both" else state[:, 0]


def _lower(
    u: Any,
    delta: Any,
    a: Any,
    b: Any,
    c: Any,
    d: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: Any = False,
    route: Any = "forward",
    cu_seqlens: Any = None,
    initial_state: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the op."""
    if route not in ROUTES:
        raise ValueError(f"{NAME}: route must be 'forward', 'backward' or 'both', got {route!r}")
    count, packed = (2 if route == "both" else 1), cu_seqlens is not None
    lead = 1 if packed else 2
    for name, t in (("u", u), ("delta", delta), ("A", a), ("B", b), ("C", c)):
        _checks.parameter(NAME, name, t, u.device if isinstance(u, Tensor) else torch.device("cpu"), "u")
    u = _own(u, count, lead, "u")
    channels = u.shape[-1]
    bounds = _bounds(cu_seqlens, u)
    delta, b, c = (_routed(t, count, u, lead, n) for t, n in ((delta, "delta"), (b, "B"), (c, "C")))
    if delta.shape[-1] != channels:
        raise ValueError(f"{NAME}: delta must have the channels of u ({channels}), got {delta.shape[-1]}")
    a, d, delta_bias = (
        t if t is None else _parameter(n, t, count, u, s)
        for n, t, s in (("A", a, 1), ("D", d, 0), ("delta_bias", delta_bias, 0))
    )
    if z is not None:
        _checks.parameter(NAME, "z", z, u.device, "u")
        z = _own(z, count, lead, "z")
        _checks.shape(NAME, "z", z, (*u.shape[:lead], z.shape[lead], channels), "that of u")
    if packed:
        u, delta, b, c, z = (t if t is None else t[None] for t in (u, delta, b, c, z))
    windows = 1 if bounds is None else len(bounds) - 1
    if initial_state is not None:
        _checks.parameter(NAME, "initial_state", initial_state, u.device, "u")
        rows = windows if packed else u.shape[0]
        want = (rows, *((count,) if count == 2 else ()), channels, a.shape[2])
        _checks.shape(NAME, "initial_state", initial_state, want, "[B, (2,) C, S]")
        initial_state = initial_state if count == 2 else initial_state[:, None]
        initial_state = initial_state.transpose(0, 1)[None] if packed else initial_state[:, :, None]
    return lowered(
        NAME,
        u,
        delta,
        a,
        b,
        c,
        d,
        z,
        delta_bias,
        initial_state,
        None,
        _order(route, u, bounds),
        bounds,
        delta_softplus,
        "sum",
    )


def lowered(name: str, u: Tensor, delta: Any, a: Any, b: Any, c: Any, d: Any, z: Any, delta_bias: Any, state: Any, weight: Any,
            routes: Tensor, bounds: Any, softplus: Any, reduce: str) -> tuple[Any, ...]:  # fmt: skip
    """The checks that both functions share: groups, states, and flags."""
    if b.shape != c.shape:
        raise ValueError(f"{name}: C must have the shape of B, {list(b.shape)}, got {list(c.shape)}")
    groups, states = b.shape[-2:]
    if groups < 1 or u.shape[-1] % groups:
        raise ValueError(f"{name}: the groups of B must divide the channels ({u.shape[-1]}), got {groups}")
    if states != a.shape[-1] or not 1 <= states <= 256:
        raise ValueError(f"{name}: B must have the 1 to 256 states of A ({a.shape[-1]}), got {states}")
    if not isinstance(softplus, bool):
        raise TypeError(f"{name}: delta_softplus must be a bool, got {softplus!r}")
    for title, t in (("B", b), ("C", c), ("z", z)):
        if t is not None and t.dtype != u.dtype:
            raise TypeError(f"{name}: {title} must have the dtype of u ({u.dtype}), got {t.dtype}")
    return (u, delta, a, b, c, d, z, delta_bias, state, weight, routes, bounds, softplus, reduce)


def _own(t: Tensor, count: int, lead: int, name: str) -> Tensor:
    """[..., L, 1 or R, C] of u or z."""
    if t.dim() == lead + 1:
        return t.unsqueeze(lead)
    if t.dim() == lead + 2 and count == 2 and t.shape[lead] == 2:
        return t
    wanted = "[T, C]" if lead == 1 else "[B, L, C]"
    raise ValueError(
        f"{NAME}: {name} must have shape {wanted}, with 2 routes behind {wanted[-5]} for route='both', got {list(t.shape)}"
    )


def _bounds(cu_seqlens: Any, u: Tensor) -> Tensor | None:
    if cu_seqlens is None:
        return None
    _checks.tensor(NAME, "cu_seqlens", cu_seqlens)
    _checks.on_device(NAME, "cu_seqlens", cu_seqlens, "u", u.device)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise TypeError(f"{NAME}: cu_seqlens must be int32 [W + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    _checks.offsets(NAME, "cu_seqlens", cu_seqlens, u.shape[0], u.shape[0], "u")
    return cu_seqlens


def _routed(t: Tensor, count: int, u: Tensor, lead: int, name: str) -> Tensor:
    """[..., L, R, C] or [..., L, R, G, S] of delta, B or C, whose route axis and single group may be left out."""
    tail = 1 if name == "delta" else 2
    if t.shape[:lead] != u.shape[:lead]:
        raise ValueError(f"{NAME}: {name} must have the tokens of u, {list(u.shape[:lead])}, got {list(t.shape)}")
    if tail == 2 and t.dim() == lead + 1:
        t = t.unsqueeze(-2)
    if t.dim() == lead + tail:
        return t.unsqueeze(lead).expand(*u.shape[:lead], count, *t.shape[lead:])
    if t.dim() == lead + 1 + tail and count == 2 and t.shape[lead] == 2:
        return t
    wanted = "[B, L, C]" if tail == 1 else "[B, L, G, S]"
    raise ValueError(
        f"{NAME}: {name} must have shape {wanted}, with 2 routes behind L for route='both', got {list(t.shape)}"
    )


def _parameter(name: str, t: Any, count: int, u: Tensor, tail: int) -> Tensor:
    """[R, C] or [R, C, S] of A, D or delta_bias, whose route axis may be left out."""
    _checks.parameter(NAME, name, t, u.device, "u")
    if t.dim() == tail + 1 and t.shape[0] == u.shape[-1]:
        return t.expand(count, *t.shape)
    if t.dim() == tail + 2 and count == 2 and tuple(t.shape[:2]) == (2, u.shape[-1]):
        return t
    wanted = f"[C, S] = [{u.shape[-1]}, 'S']" if tail else f"[C] = [{u.shape[-1]}]"
    raise ValueError(
        f"{NAME}: {name} must have shape {wanted}, with 2 routes in front for route='both', got {list(t.shape)}"
    )


def _order(route: str, u: Tensor, bounds: Tensor | None) -> Tensor:
    """The token at each step, int32 [R, L]; a packed sequence is turned around by itself."""
    step = torch.arange(u.shape[1], dtype=torch.int32, device=u.device)
    if bounds is None:
        back = u.shape[1] - 1 - step
    else:
        own = torch.searchsorted(bounds, step, right=True)
        back = bounds[own - 1] + bounds[own.clamp(max=len(bounds) - 1)] - 1 - step
    chosen = {"forward": (step,), "backward": (back,), "both": (step, back)}[route]
    return torch.stack(chosen).to(torch.int32)


# the op -----------------------------------------------------------------------------------------------------------------


def _fake(u: Tensor, delta: Tensor, a: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    bounds, reduce = rest[8], rest[10]
    wide = torch.promote_types(u.dtype, torch.float32)
    windows = 1 if bounds is None else bounds.shape[0] - 1
    state = u.new_empty((u.shape[0], a.shape[0], windows, *a.shape[1:]), dtype=wide)
    return state, u.new_empty((*delta.shape[: 3 if reduce == "stack" else 2], u.shape[3]))


def _explain(*args: Any, backend: str | None = None, return_state: bool = False, **options: Any) -> _call.Found:
    given = {n.lower() if n in ("A", "B", "C", "D") else n: t for n, t in options.items()}
    return _call.explanation(NAME, OP, _lower(*args, **given), backend)


def _triton() -> Any:
    from vitkern.triton_kernels import selective_scan as kernels

    return kernels


OP = Op(
    NAME,
    (
        "Tensor u", "Tensor delta", "Tensor a", "Tensor b", "Tensor c", "Tensor? d", "Tensor? z", "Tensor? delta_bias",
        "Tensor? initial_state", "Tensor? delta_weight", "Tensor routes", "Tensor? cu_seqlens",
    ),
    "bool softplus, str reduce, str gpu",
    differentiable=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    batched=2,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("state", "out"),
    autocast=False,
)  # fmt: skip
OP.register()
selective_scan.explain = _explain  # type: ignore[attr-defined]
