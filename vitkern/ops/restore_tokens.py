"""restore_tokens: argument checks, lowering, and the op."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.ops.merge_tokens import rows
from vitkern.reference.restore_tokens import restore_tokens as definition

NAME = "restore_tokens"


def restore_tokens(
    y: Tensor, index: Tensor, n: int, fill: float | Tensor = 0.0, *, backend: str | None = None
) -> Tensor:
    r"""Rows back to their positions, the fill elsewhere: the inverse of :func:`vitkern.select_tokens` and
    :func:`vitkern.drop_tokens` (MAE, He et al. 2022; token routing).

    ``out[index] = y``, and ``out[i] = fill`` for a position i that is not in index. No sort: one pass inverts the index.

    Args:
        y: ``[B, K, ...]`` of any trailing shape and strides. A fused token has no position: leave it out, ``y[:, :-1]``.
        index: integers ``[B, K]``, distinct in a sample; ``n`` for a row that goes nowhere.
        n: the length of the result.
        fill: a number; a mask token of y's trailing shape, with ones in front or without; or ``[B|1, n|1, ...]``, one row
            for every position (token routing passes the x that the tokens were taken from). With gradient.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, n, ...]`` in the dtype of y. The gradient of y is a gather; that of a mask token the float32 sum over the
        positions it fills, sample by sample, in the order of positions.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(y) not in _sharded.PLAIN and _sharded.met(y):
        return _sharded.call(restore_tokens, locals())
    out = _call.run(OP, _lower(y, index, n, fill), backend)
    return out.reshape(out.shape[0], out.shape[1], *y.shape[2:])


def _lower(y: Any, index: Any, n: Any, fill: Any = 0.0) -> tuple[Any, ...]:
    """The arguments of the op."""
    _checks.tensor(NAME, "y", y)
    _checks.floating(NAME, "y", y)
    if y.dim() < 2:
        raise ValueError(f"{NAME}: y must have shape [B, K, ...], got {list(y.shape)}")
    _checks.integers(NAME, "index", index)
    _checks.shape(NAME, "index", index, tuple(y.shape[:2]), "[B, K]")
    _checks.on_device(NAME, "index", index, "y", y.device)
    _checks.integer(NAME, "n", n, 0)
    if backends.may_read(index) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high > n:
            raise ValueError(f"{NAME}: index must lie in [0, n] = [0, {n}], got {low} to {high}")
        times = torch.zeros(len(index), n + 1, dtype=torch.int32, device=index.device)
        times.scatter_add_(1, index.long(), torch.ones_like(index, dtype=torch.int32))
        if bool((times[:, :n] > 1).any()):
            raise ValueError(f"{NAME}: index must hold distinct positions in every sample")
    value, each, mask_token = 0.0, None, None
    if not isinstance(fill, Tensor):
        value = _checks.number(NAME, "fill", fill, what="a number or a tensor")
    else:
        each, mask_token = _fill(fill, y, n)
    return (rows(y), index.to(torch.int32).contiguous(), each, mask_token, n, value)


def _fill(fill: Tensor, y: Tensor, n: int) -> tuple[Tensor | None, Tensor | None]:
    """fill as [B, n, C], or as a mask token [C]."""
    _checks.parameter(NAME, "fill", fill, y.device, "y")
    tail = tuple(y.shape[2:])
    shape = (1,) * (y.dim() - fill.dim()) + tuple(fill.shape)
    wanted = (
        len(shape) == y.dim() and shape[2:] == tail and _checks.fits(shape[0], y.shape[0]) and _checks.fits(shape[1], n)
    )
    if not wanted:
        raise ValueError(
            f"{NAME}: fill must be a number, of y's trailing shape {list(tail)} or "
            f"[B, n, ...] = {[y.shape[0], n, *tail]}, got {list(fill.shape)}"
        )
    fill = rows(fill.reshape(shape))
    if shape[0] == 1 and shape[1] == 1:
        return None, fill[0, 0]
    return fill.expand(y.shape[0], n, -1), None


# the op -----------------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    from vitkern.triton_kernels import restore_tokens as kernels

    return kernels


def _fake(y: Tensor, index: Tensor, fill: Any, mask_token: Any, n: int, *rest: Any) -> Tensor:
    return y.new_empty((y.shape[0], n, y.shape[2]))


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = Op(
    NAME,
    ("Tensor y", "Tensor index", "Tensor? fill", "Tensor? mask_token"),
    "SymInt n, float value, str gpu",
    differentiable=(0, 2, 3),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("x",),
    autocast=False,
)
OP.register()
restore_tokens.explain = _explain  # type: ignore[attr-defined]
