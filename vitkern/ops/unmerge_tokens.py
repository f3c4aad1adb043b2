"""unmerge_tokens: argument checks, lowering, and the op."""

from typing import Any

from torch import Tensor

from vitkern.ops import _call, _checks, _cuda, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.ops.merge_tokens import rows
from vitkern.reference.unmerge_tokens import unmerge_tokens as definition
from vitkern.tokens import MergePlan

NAME = "unmerge_tokens"


def unmerge_tokens(y: Tensor, plan: MergePlan, *, fill: float = 0.0, backend: str | None = None) -> Tensor:
    r"""Every token of a plan gets a copy of its slot's output (Bolya and Hoffman 2023).

    Args:
        y: ``[B, n_out, ...]`` of any trailing shape and strides.
        plan: from :func:`vitkern.merge_plan`.
        fill: what a token without a slot gets.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, N, ...]`` in the dtype of y. The gradient of a slot is the float32 sum over its tokens, in the plan's order.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(y) not in _sharded.PLAIN and _sharded.met(y):
        return _sharded.call(unmerge_tokens, locals())
    x = _call.run(OP, _lower(y, plan, fill), backend)
    return x.reshape(x.shape[0], x.shape[1], *y.shape[2:])


def _lower(y: Any, plan: Any, fill: float = 0.0) -> tuple[Any, ...]:
    """The arguments of the op."""
    _checks.tensor(NAME, "y", y)
    _checks.floating(NAME, "y", y)
    if not isinstance(plan, MergePlan):
        raise TypeError(f"{NAME}: plan must be a vitkern.MergePlan, got {type(plan).__name__}")
    want = (plan.token_map.shape[0], plan.n_out)
    if y.dim() < 2 or tuple(y.shape[:2]) != want:
        raise ValueError(f"{NAME}: y must have the batch and slots of the plan, {list(want)}, got {list(y.shape)}")
    _checks.on_device(NAME, "y", y, "the plan", plan.token_map.device)
    return (rows(y), plan.token_map, plan.perm, plan.offsets, float(fill))


def _triton() -> Any:
    from vitkern.triton_kernels import unmerge_tokens as kernels

    return kernels


def _fake(y: Tensor, token_map: Tensor, *rest: Any) -> Tensor:
    return y.new_empty((*token_map.shape, y.shape[2]))


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = Op(
    NAME,
    ("Tensor y", "Tensor token_map", "Tensor perm", "Tensor offsets"),
    "float fill, str gpu",
    differentiable=(0,),
    batched=4,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton, _cuda.UNMERGE),
    outputs=("x",),
    autocast=False,
)
OP.register()
unmerge_tokens.explain = _explain  # type: ignore[attr-defined]
