"""Ops over several processes: rules for DTensor, and shifted windows of a map whose rows lie on several processes.

Every op of vitkern takes DTensors that are sharded over the batch, over the heads (of grouped queries both numbers must divide),
and windows also over an axis of the map that does not shift, between windows. The public functions register the rules when they
first see a DTensor; a plain tensor beside one counts as the same on every process. Gradients of what all shards share are
``Partial()``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vitkern.ops import _checks, _window_checks
from vitkern.ops.window_attention import window_attention as whole_window_attention

NAME = "distributed.window_attention"
OPTIONS = {"bias", "mask", "cosine", "scale", "normalizer", "pad_order", "pad_kv", "mask_value", "extra_kv", "backend"}


def register_sharding() -> None:
    """Gives DTensor the rules of every op. Only calls of ``torch.ops.vitkern`` that no public function preceded need it."""
    from vitkern.ops import _sharding

    _sharding.register()


class _Passed(torch.autograd.Function):
    """Tensors of the process `step` places ahead in the group, cyclic; every process takes part, in the backward too."""

    @staticmethod
    def forward(ctx: Any, group: Any, step: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.step = group, step
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        whole: Any = group or dist.group.WORLD
        before, ahead = (dist.get_global_rank(whole, (rank + i) % size) for i in (-step, step))
        sent = [t.contiguous() for t in tensors]
        found = [torch.empty_like(t) for t in sent]
        calls = [dist.P2POp(dist.isend, t, before, group) for t in sent]
        calls += [dist.P2POp(dist.irecv, t, ahead, group) for t in found]
        for work in dist.batch_isend_irecv(calls):
            work.wait()
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        return None, None, *_Passed.apply(ctx.group, -ctx.step, *grads)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | Sequence[int | None],
    shift_size: int | Sequence[int] = 0,
    *,
    group: Any = None,
    **options: Any,
) -> Tensor:
    """:func:`vitkern.window_attention` of a map whose rows lie on the processes of a group, a stripe on each, in their order.

    With a shift every process gets the first ``shift`` rows of the next one (the last those of the first), attends to its windows
    and sends those rows of the output back; so do the gradients. Every process of the group must call it, and its backward.

    Args:
        q, k, v: ``[B, rows, ..., H, D]``, this process's stripe: whole windows, so ``rows`` is a multiple of the window's.
        window_size, shift_size: as in :func:`vitkern.window_attention`, of the whole map; the first axis is the one that is cut.
        group: a process group; None is all processes.
        options: ``bias``, ``mask``, ``cosine``, ``scale``, ``normalizer``, ``pad_order``, ``pad_kv``, ``mask_value``, ``extra_kv``
            and ``backend`` of :func:`vitkern.window_attention`.

    Returns:
        ``[B, rows, ..., H, Dv]``, this process's stripe of the output. The gradient of a tensor that every process has whole (a
        table of biases, a scale, pads) is this process's part: the sum over the group is that of the whole map.

    Raises:
        ValueError: a stripe does not hold whole windows, or an option is not among these.
    """
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise ValueError(
            f"{NAME}: a map in stripes takes the options {', '.join(sorted(OPTIONS))}, got {', '.join(unknown)}"
        )
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, t)
        if t.dim() < 4 or t.shape[1] != q.shape[1]:
            raise ValueError(
                f"{NAME}: {name} must have shape [B, rows, ..., heads, head_dim] with the rows of q, got {list(t.shape)}"
            )
    if any(
        isinstance(each, (list, tuple))
        for sizes in (window_size, shift_size)
        if isinstance(sizes, (list, tuple))
        for each in sizes
    ):
        raise ValueError(
            f"{NAME}: a map in stripes has one window for all heads, got {window_size!r} and {shift_size!r}"
        )
    rows, axes = q.shape[1], q.dim() - 3
    if isinstance(window_size, (list, tuple)) and window_size and window_size[0] is None:
        raise ValueError(f"{NAME}: a window over the whole first axis does not fit into a stripe, got {window_size!r}")
    window, shift = _window_checks.check_sides(window_size, shift_size, q.shape[1:-2])
    if rows % window[0]:
        raise ValueError(
            f"{NAME}: every process must hold whole windows of {window[0]} rows, got a stripe of {rows} rows"
        )
    passed = shift[0]
    if not passed or dist.get_world_size(group) == 1:
        return whole_window_attention(q, k, v, window, shift, **options)
    ahead = _Passed.apply(group, 1, *(t[:, :passed] for t in (q, k, v)))
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    own = [t[:, passed:] for t in (q, k, v)]
    if last:  # rows of the map's two ends meet, which the mask of a shift keeps apart
        q, k, v = (torch.cat(pair, 1) for pair in zip(ahead, own, strict=True))
        out = whole_window_attention(q, k, v, window, shift, **options)
        sent, kept = out[:, :passed], out[:, passed:]
    else:
        q, k, v = (torch.cat(pair, 1) for pair in zip(own, ahead, strict=True))
        out = whole_window_attention(q, k, v, window, (0, *shift[1:axes]), **options)
        kept, sent = out[:, :-passed], out[:, -passed:]
    (returned,) = _Passed.apply(group, -1, sent)
    return torch.cat((returned, kept), 1)
