"""merge_tokens: argument checks, lowering, and the op."""

from typing import Any, overload

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _cuda, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.merge_tokens import merge_tokens as definition
from vitkern.tokens import MergePlan

NAME = "merge_tokens"
REDUCTIONS = _cuda.REDUCTIONS


@overload
def merge_tokens(
    x: Tensor,
    plan: MergePlan,
    *,
    weight: Tensor | None = None,
    reduce: str = "mean",
    include_dst: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def merge_tokens(
    x: tuple[Tensor, ...],
    plan: MergePlan,
    *,
    weight: Tensor | None = None,
    reduce: str | tuple[str, ...] = "mean",
    include_dst: bool = True,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]: ...


def merge_tokens(
    x: Tensor | tuple[Tensor, ...],
    plan: MergePlan,
    *,
    weight: Tensor | None = None,
    reduce: str | tuple[str, ...] = "mean",
    include_dst: bool = True,
    backend: str | None = None,
) -> tuple[Any, Tensor]:
    r"""One output per slot of a plan: the tokens of the slot, reduced (Bolya et al. 2023).

    Args:
        x: ``[B, N, ...]`` of any trailing shape and strides, or a tuple of such tensors, which one plan merges.
        plan: from :func:`vitkern.merge_plan`.
        weight: ``[B, N]``, usually the tokens' sizes; with gradient. Without it every token counts 1.
        reduce: ``"mean"`` (weighted), ``"sum"`` (weighted), ``"max"`` (elementwise, ties share the gradient),
            ``"first"`` (the destination) or ``"mlerp"`` (Kim et al. 2024): the weighted mean u, as long as the longest token
            of the slot: ``u max_i |x_i| / max(|u|, 1e-12)``; the norm is over all trailing axes. A tuple with a tuple ``x``.
        include_dst: False leaves the first token of every slot out of means, sums and sizes.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``(y, size)``: ``y [B, n_out, ...]`` in the dtype of x (a tuple for a tuple), ``size [B, n_out]``: the sum of the
        weights of each slot, float32. A slot of size 0 gives 0 and gradients 0. Sums are float32, rounded once.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(x) not in _sharded.PLAIN and _sharded.met(x):
        return _sharded.call(merge_tokens, locals())
    several = isinstance(x, (tuple, list))
    each = tuple(x) if several else (x,)
    names = tuple(reduce) if isinstance(reduce, (tuple, list)) else (reduce,) * len(each)
    if not each or len(names) != len(each):
        raise ValueError(f"{NAME}: reduce must have one entry per tensor of x ({len(each)}), got {reduce!r}")
    merged = []
    size: Any = None
    for t, name in zip(each, names, strict=True):
        args = _lower(t, plan, weight, name, include_dst)
        y, found = _call.run(OP, args, backend)
        size = found if size is None else size
        merged.append(y.reshape(y.shape[0], y.shape[1], *t.shape[2:]))
    if size.requires_grad and not (weight is not None and weight.requires_grad):
        size = size.detach()  # a function of the weights alone
    return (tuple(merged) if several else merged[0]), size


def _lower(x: Any, plan: Any, weight: Any = None, reduce: Any = "mean", include_dst: bool = True) -> tuple[Any, ...]:
    """The arguments of the op."""
    _checks.tensor(NAME, "x", x)
    _checks.floating(NAME, "x", x)
    if not isinstance(plan, MergePlan):
        raise TypeError(f"{NAME}: plan must be a vitkern.MergePlan, got {type(plan).__name__}")
    if x.dim() < 2 or x.shape[:2] != plan.token_map.shape:
        raise ValueError(
            f"{NAME}: x must have the batch and length of the plan, {list(plan.token_map.shape)}, got {list(x.shape)}"
        )
    _checks.on_device(NAME, "x", x, "the plan", plan.token_map.device)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduce must be 'mean', 'sum', 'max', 'first' or 'mlerp', got {reduce!r}")
    if not include_dst and reduce not in ("mean", "sum"):
        raise ValueError(f"{NAME}: include_dst=False must go with reduce='mean' or 'sum', got {reduce!r}")
    if weight is not None:
        _checks.parameter(NAME, "weight", weight, x.device, "x")
        _checks.shape(NAME, "weight", weight, tuple(x.shape[:2]), "[B, N]")
    return (rows(x), plan.token_map, plan.perm, plan.offsets, weight, reduce, bool(include_dst))


def rows(x: Tensor) -> Tensor:
    """x as [B, N, C]."""
    if x.dim() == 3:
        return x
    return x[..., None] if x.dim() == 2 else x.flatten(2)


# the op -----------------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    from vitkern.triton_kernels import merge_tokens as kernels

    return kernels


def _fake(
    x: Tensor, token_map: Tensor, perm: Tensor, offsets: Tensor, weight: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    slots = offsets.shape[1] - 1
    dtype = torch.float32 if weight is None else torch.promote_types(weight.dtype, torch.float32)
    return x.new_empty((x.shape[0], slots, x.shape[2])), x.new_empty((x.shape[0], slots), dtype=dtype)


def _explain(
    x: Any, plan: Any, weight: Any = None, reduce: Any = "mean", *rest: Any, backend: str | None = None, **options: Any
) -> _call.Found:
    first, name = (t[0] if isinstance(t, (tuple, list)) else t for t in (x, reduce))
    return _call.explanation(NAME, OP, _lower(first, plan, weight, name, *rest, **options), backend)


OP = Op(
    NAME,
    ("Tensor x", "Tensor token_map", "Tensor perm", "Tensor offsets", "Tensor? weight"),
    "str reduce, bool include_dst, str gpu",
    differentiable=(0, 4),
    batched=5,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton, _cuda.MERGE),
    outputs=("y", "size"),
    autocast=False,
)
OP.register()
merge_tokens.explain = _explain  # type: ignore[attr-defined]
