"""sampled_window_attention: argument checks, lowering, and the op."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import DecomposedRelativePosition, RelativePosition
from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.ops._window_checks import check_bias
from vitkern.reference.sampled_window_attention import sampled_window_attention as definition
from vitkern.reference.window_attention import gather, geometry

NAME = "sampled_window_attention"
OUT_OF_RANGE = ("zero", "mask")


def sampled_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, int],
    coords: Tensor,
    *,
    bias: Tensor | RelativePosition | DecomposedRelativePosition | list[Any] | None = None,
    scale: float | None = None,
    out_of_range: str = "zero",
    coords_v: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention of the queries of a window to samples of a map: varied-size windows (VSA, Zhang et al. 2022; RVSA, Wang et al.
    2022).

    ``o_i = sum_j softmax_j(scale q_i.k~_j + bias_ij) v~_j``, where ``k~_j`` and ``v~_j`` are the bilinear means of the four
    cells around a place, cells outside the map 0. The samples are never stored for a whole map in the forward.

    Args:
        q: ``[B, H, W, heads, D]``, any strides, cut into windows without a shift; a map that they do not divide has smaller ones at
            its end, ``nWy = ceil(H / wy)``.
        k: ``[B, Hk, Wk, kv_heads, D]``: a map of its own size; kv_heads divides heads (grouped queries).
        v: ``[B, Hk, Wk, kv_heads, Dv]``.
        window_size: ``(wy, wx)`` in cells of q, or one int for both; N = wy wx.
        coords: ``[B, nWy, nWx, K, G, 2]``, the K places of every window as (x, y) in pixels of k's map, 0 the centre of the
            first column and row. G is 1 (all heads share them), heads, or ``heads * r``: group ``h r + m`` serves the m-th r-th
            of the channels of head h. Any strides; they are computed in float32 at least, whatever the dtype of q.
        bias: added to the scores: a tensor that broadcasts to ``[heads, N, K]``; :class:`vitkern.bias.RelativePosition` between
            positions inside the window, as if sample j stood where query j does (K = N, or with an index ``[N, K]``); or
            :class:`vitkern.bias.DecomposedRelativePosition` likewise, which is stored as ``[B, windows, heads, N, K]``. Or a
            list of one decomposed and one other.
        scale: factor of the scores, default ``D ** -0.5``.
        out_of_range: what a sample a whole cell outside the map, or at a place that is not finite, is: ``"zero"`` a zero key and
            value that takes part, ``"mask"`` hidden (with groups of a head: where all its places in k are such).
        coords_v: places of v, if not those of k. Same shape.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, H, W, heads, Dv]`` in the dtype of v. Gradients go to q, k, v, the places and the bias; they are the same bits in
        every run.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(sampled_window_attention, locals())
    args = _lower(q, k, v, window_size, coords, bias=bias, scale=scale, out_of_range=out_of_range, coords_v=coords_v)
    return _call.run(OP, args, backend)


def _lower(
    q: Any,
    k: Any,
    v: Any,
    window_size: Any,
    coords: Any,
    *,
    bias: Any = None,
    scale: Any = None,
    out_of_range: Any = "zero",
    coords_v: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the op."""
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
    _checks.maps(NAME, q, k, v, same_dtype=not autocast, own_map=True)
    if q.dim() != 5:
        raise ValueError(f"{NAME}: q must have shape [B, H, W, heads, D], got {list(q.shape)}")
    window = _checks.per_axis(NAME, "window_size", window_size, 2)
    if min(window) < 1:
        raise ValueError(f"{NAME}: window_size must be at least 1 on every axis, got {window_size!r}")
    _check_coords("coords", coords, q, k, v, window)
    if coords_v is not None:
        _check_coords("coords_v", coords_v, q, k, v, window)
        _checks.shape(NAME, "coords_v", coords_v, tuple(coords.shape), "that of coords")
    if out_of_range not in OUT_OF_RANGE:
        raise ValueError(f"{NAME}: out_of_range must be 'zero' or 'mask', got {out_of_range!r}")
    of_window, shared, index = _bias(bias, q, window, coords.shape[3])
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.number(NAME, "scale", scale, what="a number or None")
    return q, k, v, coords, coords_v, of_window, shared, index, list(window), scale, out_of_range == "mask"


def _check_coords(name: str, coords: Any, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, ...]) -> None:
    _checks.parameter(NAME, name, coords, q.device)
    counts = [-(-length // w) for length, w in zip(q.shape[1:3], window, strict=True)]
    want = [q.shape[0], *counts]
    if coords.dim() != 6 or coords.shape[5] != 2 or list(coords.shape[:3]) != want or coords.shape[3] < 1:
        raise ValueError(
            f"{NAME}: {name} must have shape [B, nWy, nWx, K, G, 2] = {[*want, 'K', 'G', 2]}, got {list(coords.shape)}"
        )
    groups, heads = coords.shape[4], q.shape[3]
    parts = 1 if groups == 1 else groups // heads
    if groups != 1 and (groups < 1 or groups % heads or k.shape[4] % parts or v.shape[4] % parts):
        raise ValueError(
            f"{NAME}: the groups of {name} must be 1, heads ({heads}) or heads * r with r dividing the head sizes "
            f"{k.shape[4]} and {v.shape[4]}, got {groups}"
        )


def _bias(bias: Any, q: Tensor, window: tuple[int, ...], samples: int) -> tuple[Any, Any, Any]:
    """A bias of every window [B, nW, heads, N, K], one of all [heads, N, K] or a table, and the table's index."""
    n, heads = math.prod(window), q.shape[3]
    given = list(bias) if isinstance(bias, (list, tuple)) else [bias]
    decomposed = [b for b in given if isinstance(b, DecomposedRelativePosition)]
    others = [b for b in given if not isinstance(b, DecomposedRelativePosition)]
    if len(decomposed) > 1 or len(others) > 1:
        kinds = [type(b).__name__ for b in given]
        raise ValueError(
            f"{NAME}: a list as bias must hold at most one DecomposedRelativePosition and one other, got {kinds}"
        )
    of_window, shared, index = None, others[0] if others else None, None
    for b in decomposed:
        _check_decomposed(b, q, n, samples)
        token, _, _ = geometry(list(q.shape[1:3]), window, (0, 0), False, q.device)
        rows = gather(q, token, None).flatten(0, 1).transpose(1, 2)  # [B nW, N, heads, D]
        dense = b.dense(rows, rows).expand(rows.shape[0], heads, n, samples)
        of_window = dense.unflatten(0, (q.shape[0], len(token)))
    check_bias(NAME, shared, q, window, samples)
    if isinstance(shared, RelativePosition):
        index, shared = shared.rows(tuple(window), q.device), shared.table
    elif shared is not None:
        shared = shared.expand(heads, n, samples)
    return of_window, shared, index


def _check_decomposed(bias: DecomposedRelativePosition, q: Tensor, n: int, samples: int) -> None:
    if math.prod(bias.k_grid) != samples or math.prod(bias.q_grid or (n,)) != n:
        raise ValueError(
            f"{NAME}: bias.q_grid must have the queries of a window ({n}) and bias.k_grid its samples ({samples}), "
            f"got {bias.q_grid} and {bias.k_grid}"
        )
    for axis, name in enumerate(("rel_h", "rel_w")):
        table, side = getattr(bias, name), bias.k_grid[axis]
        _checks.parameter(NAME, f"bias.{name}", table, q.device)
        if bias.q_grid is not None:
            want = (2 * max(bias.q_grid[axis], side) - 1, q.shape[4])
            _checks.shape(NAME, f"bias.{name}", table, want, "[2 max(query, sample) - 1, D]")
        elif (
            table.dim() != 4
            or table.shape[1] != n
            or not _checks.fits(table.shape[2], q.shape[3])
            or table.shape[3] != side
        ):
            raise ValueError(
                f"{NAME}: bias.{name} must have shape [B nW or 1, N, heads or 1, side] = "
                f"{['B nW', n, q.shape[3], side]}, got {list(table.shape)}"
            )


# the op -----------------------------------------------------------------------------------------------------------------


class _Sampled(Op):
    """Under autocast q, k and v are cast, the places are not: one in half precision is off by a good part of a cell."""

    def cast(self, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
        dtype = torch.get_autocast_dtype(device)
        return (*(t if t.dtype == torch.float64 else t.to(dtype) for t in args[:3]), *args[3:])


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return v.new_empty((*q.shape[:-1], v.shape[-1]))


def _triton() -> Any:
    from vitkern.triton_kernels import sampled_window_attention as kernels

    return kernels


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = _Sampled(
    NAME,
    (
        "Tensor q",
        "Tensor k",
        "Tensor v",
        "Tensor coords",
        "Tensor? coords_v",
        "Tensor? of_window",
        "Tensor? bias",
        "Tensor? index",
    ),
    "SymInt[] window, float scale, bool mask, str gpu",
    differentiable=(0, 1, 2, 3, 4, 5, 6),
    batched=6,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out",),
)
OP.register()
sampled_window_attention.explain = _explain  # type: ignore[attr-defined]
