"""neighborhood_attention, neighborhood_qk, neighborhood_av: argument checks, lowering, and the ops."""

import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.neighborhood_attention import neighborhood_attention as definition
from vitkern.reference.neighborhood_attention import neighborhood_av as av_definition
from vitkern.reference.neighborhood_attention import neighborhood_qk as qk_definition
from vitkern.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import NeighborhoodOptions

NAME, QK_NAME, AV_NAME = "neighborhood_attention", "neighborhood_qk", "neighborhood_av"
BORDERS = ("shift", "zero")
Ints = int | tuple[int, ...]


@overload
def neighborhood_attention(  # type: ignore[overload-overlap]
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Ints,
    *, return_stats: tuple[()] = (), **options: "Unpack[NeighborhoodOptions]",
) -> Tensor: ...  # fmt: skip


@overload
def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: Ints,
    *, return_stats: tuple[str, ...], **options: "Unpack[NeighborhoodOptions]",
) -> tuple[Tensor, Stats]: ...  # fmt: skip


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: bool | tuple[bool, ...] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    border: str = "shift",
    key_mask: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    return_stats: tuple[str, ...] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Attention of every token of a map over the window around it (NAT, Hassani et al. 2023; dilated, DiNAT 2022; strided,
    Generalized Neighborhood Attention 2025), with NATTEN's rule at the border: the window moves inwards and keeps its size.

    ``A_is = scale q_i.k_nbr(i, s) + rpb[h, nbr' - i' + K - 1]``, ``o_i = sum_s softmax(A_i)_s v_nbr(i, s)``, where ``i'`` counts
    tokens of equal ``i mod dilation``.

    Args:
        q: ``[B, *spatial, H, D]``, 1 to 3 spatial axes, any strides. float32, float64, bfloat16 or float16.
        k: ``[B, *spatial, Hk, D]``; Hk divides H (grouped queries).
        v: ``[B, *spatial, Hk, Dv]``.
        kernel_size: K, keys per axis: an int, or one per axis; odd or even (K / 2 before a token and K / 2 - 1 behind it).
        dilation: d, steps between the keys; ``kernel_size * dilation`` may not exceed the map.
        stride: t, neighbours that share a window, ``1 <= t <= K``; ``t = K`` is attention in unshifted windows.
        is_causal: True, or one bool per axis: the keys of an axis end at the token.
        rpb: ``[H, 2 K0 - 1, ...]``, a bias per offset, key minus query in steps of the dilation. Gets a gradient.
        scale: factor of the scores, default ``D ** -0.5``. It does not multiply rpb.
        border: ``"shift"``, or ``"zero"``: the window stays centred, and slots outside the map are zero keys and values
            that take part (not with is_causal).
        key_mask: bool ``[B, *spatial]``, True for a key that may be attended.
        extra_kv: ``(k_e [B|1, E, Hk, D], v_e [B|1, E, Hk, Dv])``, seen by every query, without bias. With gradients.
        return_stats: ``("lse",)`` also returns :class:`vitkern.Stats` with ``lse [B, *spatial, H]``.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, *spatial, H, Dv]`` in the dtype of v, or ``(out, Stats)`` with ``return_stats``.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(neighborhood_attention, locals())
    args = _lower(
        q, k, v, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, rpb=rpb, scale=scale, border=border,
        key_mask=key_mask, extra_kv=extra_kv, return_stats=return_stats,
    )  # fmt: skip
    out, lse = _call.run(OP, args, backend)
    out = _narrow(out, q.dim())
    return (out, Stats(lse=_narrow(lse, q.dim() - 1))) if return_stats else out


def neighborhood_qk(
    q: Tensor,
    k: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: bool | tuple[bool, ...] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    border: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """The scores of :func:`neighborhood_attention`, stored: ``[B, *spatial, H, n]`` in the dtype of q, n the product of
    kernel_size, slots row-major, -inf where a slot is not visible. Arguments as there; gradients to q, k and rpb."""
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(neighborhood_qk, locals())
    args = _lower_qk(
        q, k, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, rpb=rpb, scale=scale, border=border
    )
    return _narrow(_call.run(QK, args, backend), q.dim())


def neighborhood_av(
    attention: Tensor,
    v: Tensor,
    kernel_size: Ints,
    *,
    dilation: Ints = 1,
    stride: Ints = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str = "shift",
    backend: str | None = None,
) -> Tensor:
    """``o_i = sum_s a_is v_nbr(i, s)`` of weights ``[B, *spatial, H, n]``, slots as in :func:`neighborhood_qk`: the second half of
    :func:`neighborhood_attention`, ``[B, *spatial, H, Dv]``. What stands in a slot that is not visible does not matter. Gradients
    to both tensors."""
    if type(attention) not in _sharded.PLAIN and _sharded.met(attention):
        return _sharded.call(neighborhood_av, locals())
    args = _lower_av(attention, v, kernel_size, dilation=dilation, stride=stride, is_causal=is_causal, border=border)
    return _narrow(_call.run(AV, args, backend), v.dim())


# lowering ---------------------------------------------------------------------------------------------------------------


def _lower(
    q: Any,
    k: Any,
    v: Any,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    stride: Any = 1,
    is_causal: Any = False,
    rpb: Any = None,
    scale: Any = None,
    border: Any = "shift",
    key_mask: Any = None,
    extra_kv: Any = None,
    return_stats: Any = (),
) -> tuple[Any, ...]:
    """The arguments of the op: maps of three axes."""
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
    _checks.maps(NAME, q, k, v, same_dtype=not autocast)
    sizes = _sizes(NAME, q, kernel_size, dilation, stride, is_causal, border)
    if tuple(return_stats) not in ((), ("lse",)):
        raise ValueError(f"{NAME}: return_stats must be () or ('lse',), got {return_stats!r}")
    if key_mask is not None:
        _checks.tensor(NAME, "key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{NAME}: key_mask must be bool, got {key_mask.dtype}")
        _checks.shape(NAME, "key_mask", key_mask, tuple(q.shape[:-2]), "[B, *spatial]")
        _checks.on_device(NAME, "key_mask", key_mask, "q", q.device)
        key_mask = _widen(key_mask, q.dim() - 3)
    k_extra, v_extra = _extras(extra_kv, k, v)
    bias = _bias(NAME, rpb, q, kernel_size)
    maps = (_widen(t, q.dim() - 3) for t in (q, k, v))
    return (*maps, bias, key_mask, k_extra, v_extra, *sizes, _scale(NAME, scale, q))


def _lower_qk(
    q: Any,
    k: Any,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    stride: Any = 1,
    is_causal: Any = False,
    rpb: Any = None,
    scale: Any = None,
    border: Any = "shift",
) -> tuple[Any, ...]:
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
    _checks.maps(QK_NAME, q, k, k, same_dtype=not autocast)
    sizes = _sizes(QK_NAME, q, kernel_size, dilation, stride, is_causal, border)
    bias = _bias(QK_NAME, rpb, q, kernel_size)
    return (*(_widen(t, q.dim() - 3) for t in (q, k)), bias, *sizes, _scale(QK_NAME, scale, q))


def _lower_av(
    a: Any,
    v: Any,
    kernel_size: Any,
    *,
    dilation: Any = 1,
    stride: Any = 1,
    is_causal: Any = False,
    border: Any = "shift",
) -> tuple[Any, ...]:
    for name, t in (("attention", a), ("v", v)):
        _checks.tensor(AV_NAME, name, t)
    autocast = _checks.autocast(a.device.type)
    _checks.maps(AV_NAME, v, v, v, same_dtype=True)
    _checks.floating(AV_NAME, "attention", a)
    _checks.on_device(AV_NAME, "attention", a, "v", v.device)
    if a.dtype != v.dtype and not autocast:
        raise TypeError(f"{AV_NAME}: attention must have the dtype of v ({v.dtype}), got {a.dtype}")
    sizes = _sizes(AV_NAME, v, kernel_size, dilation, stride, is_causal, border)
    slots = math.prod(sizes[0])
    if a.dim() != v.dim() or a.shape[:-2] != v.shape[:-2] or a.shape[-1] != slots or a.shape[-2] % v.shape[-2]:
        want = f"[B, *spatial, H, n] = {[*v.shape[:-2], 'H', slots]} with H a multiple of {v.shape[-2]}"
        raise ValueError(f"{AV_NAME}: attention must have shape {want}, got {list(a.shape)}")
    return (*(_widen(t, v.dim() - 3) for t in (a, v)), *sizes)


def _widen(t: Tensor, axes: int) -> Tensor:
    """The map with three axes instead of `axes`."""
    for _ in range(3 - axes):
        t = t.unsqueeze(1)
    return t


def _narrow(t: Tensor, rank: int) -> Tensor:
    """The map with as many axes as it came with."""
    while t.dim() > rank:
        t = t.squeeze(1)
    return t


def _sizes(
    op: str, q: Tensor, kernel: Any, dilation: Any, stride: Any, causal: Any, border: Any
) -> tuple[list[int], list[int], list[int], list[int], bool]:
    """kernel, dilation, stride and causality of three axes, and whether the border is of zeros."""
    axes = q.dim() - 3
    if axes > 3:
        raise ValueError(f"{op}: a map must have 1 to 3 axes, got {list(q.shape)}")
    named = (("kernel_size", kernel), ("dilation", dilation), ("stride", stride))
    kernel, dilation, stride = (list(_checks.per_axis(op, name, value, axes)) for name, value in named)
    causal = list(causal) if isinstance(causal, (tuple, list)) else [causal] * axes
    if len(causal) != axes or not all(isinstance(c, bool) for c in causal):
        raise TypeError(f"{op}: is_causal must be a bool or one per axis ({axes}), got {causal!r}")
    if border not in BORDERS:
        raise ValueError(f"{op}: border must be 'shift' or 'zero', got {border!r}")
    if border == "zero" and any(causal):
        raise ValueError(f"{op}: border='zero' must come without is_causal, got {causal!r}")
    for length, size, step, shared in zip(q.shape[1:-2], kernel, dilation, stride, strict=True):
        if size < 1 or step < 1:
            raise ValueError(f"{op}: kernel_size and dilation must be at least 1, got {kernel} and {dilation}")
        if size * step > length:
            raise ValueError(
                f"{op}: kernel_size times dilation must not exceed the map, got {size} * {step} for an axis of {length}"
            )
        if not 1 <= shared <= size:
            raise ValueError(f"{op}: stride must lie in [1, kernel_size] = [1, {size}], got {shared}")
    more = [1] * (3 - axes)
    return more + kernel, more + dilation, more + stride, [0] * (3 - axes) + [int(c) for c in causal], border == "zero"


def _bias(op: str, rpb: Any, q: Tensor, kernel_size: Any) -> Tensor | None:
    if rpb is None:
        return None
    _checks.parameter(op, "rpb", rpb, q.device)
    axes = q.dim() - 3
    sides = tuple(2 * size - 1 for size in _checks.per_axis(op, "kernel_size", kernel_size, axes))
    _checks.shape(op, "rpb", rpb, (q.shape[-2], *sides), "[H, 2 K - 1 per axis]")
    return rpb[(slice(None),) + (None,) * (3 - axes)]


def _extras(extra_kv: Any, k: Tensor, v: Tensor) -> tuple[Any, Any]:
    if extra_kv is None:
        return None, None
    if not isinstance(extra_kv, (tuple, list)) or len(extra_kv) != 2:
        raise TypeError(f"{NAME}: extra_kv must be None or a pair of tensors, got {type(extra_kv).__name__}")
    for name, t, like in (("extra_kv[0]", extra_kv[0], k), ("extra_kv[1]", extra_kv[1], v)):
        _checks.parameter(NAME, name, t, k.device)
        if t.dim() != 4 or not _checks.fits(t.shape[0], k.shape[0]) or t.shape[2:] != like.shape[-2:]:
            want = f"[B|1, E, {like.shape[-2]}, {like.shape[-1]}] with B = {k.shape[0]}"
            raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")
    if extra_kv[0].shape[:2] != extra_kv[1].shape[:2]:
        raise ValueError(
            f"{NAME}: both of extra_kv must have the same keys, got {list(extra_kv[0].shape)} and {list(extra_kv[1].shape)}"
        )
    return tuple(extra_kv)


def _scale(op: str, scale: Any, q: Tensor) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else _checks.number(op, "scale", scale)


# the ops ----------------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    from vitkern.triton_kernels import neighborhood_attention as kernels

    return kernels


def _qk_triton() -> Any:
    from vitkern.triton_kernels import neighborhood_qk as kernels

    return kernels


def _av_triton() -> Any:
    from vitkern.triton_kernels import neighborhood_av as kernels

    return kernels


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=accumulate)


def _qk_fake(q: Tensor, k: Tensor, rpb: Tensor | None, kernel: list[int], *rest: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], math.prod(kernel)))


def _av_fake(a: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty((*a.shape[:-1], v.shape[-1]))


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


def _explain_qk(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(QK_NAME, QK, _lower_qk(*args, **options), backend)


def _explain_av(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(AV_NAME, AV, _lower_av(*args, **options), backend)


WINDOW = "SymInt[] kernel, SymInt[] dilation, SymInt[] stride, SymInt[] causal, bool zero"
OP = Op(
    NAME,
    ("Tensor q", "Tensor k", "Tensor v", "Tensor? rpb", "Tensor? key_mask", "Tensor? k_extra", "Tensor? v_extra"),
    f"{WINDOW}, float scale, str gpu",
    differentiable=(0, 1, 2, 3, 5, 6),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
)
QK = Op(
    QK_NAME,
    ("Tensor q", "Tensor k", "Tensor? rpb"),
    f"{WINDOW}, float scale, str gpu",
    differentiable=(0, 1, 2),
    batched=2,
    definition=qk_definition,
    fake=_qk_fake,
    gpu=Gpu(_qk_triton),
    outputs=("scores",),
)
AV = Op(
    AV_NAME,
    ("Tensor attention", "Tensor v"),
    f"{WINDOW}, str gpu",
    differentiable=(0, 1),
    batched=2,
    definition=av_definition,
    fake=_av_fake,
    gpu=Gpu(_av_triton),
    outputs=("out",),
)
for op in (OP, QK, AV):
    op.register()
neighborhood_attention.explain = _explain  # type: ignore[attr-defined]
neighborhood_qk.explain = _explain_qk  # type: ignore[attr-defined]
neighborhood_av.explain = _explain_av  # type: ignore[attr-defined]
