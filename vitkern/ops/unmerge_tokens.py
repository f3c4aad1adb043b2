"""unmerge_tokens: argument checks, lowering, and the op."""

from typing import Any

from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _cuda
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
    x = _call.run(OP, _lower(y, plan, fill), backend, _triton_refusals, _cuda.unmerge_refusals)
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
    if y.device != plan.token_map.device:
        raise ValueError(f"{NAME}: y must be on the device of the plan ({plan.token_map.device}), got {y.device}")
    return (rows(y), plan.token_map, plan.perm, plan.offsets, float(fill))


def _triton_refusals(args: tuple[Any, ...]) -> list[str]:
    missing = backends.triton_missing()
    if missing:
        return [missing]
    from vitkern.triton_kernels import unmerge_tokens as kernels

    return kernels.supported(*args)


def _fake(y: Tensor, token_map: Tensor, *rest: Any) -> Tensor:
    return y.new_empty((*token_map.shape, y.shape[2]))


def _gpu(*args: Any) -> Tensor:
    *inputs, gpu = args
    chosen = _call.choose(gpu, tuple(inputs), _triton_refusals, _cuda.unmerge_refusals)
    if chosen == "cuda":
        return _cuda.unmerge(*inputs)
    if chosen == "triton":
        from vitkern.triton_kernels import unmerge_tokens as kernels

        return kernels.fwd(*inputs)
    return definition(*args)


def _gpu_backward(dx: Any, *args: Any) -> Tensor | None:
    *inputs, gpu, need = args
    chosen = _call.choose(gpu, tuple(inputs), _triton_refusals, _cuda.unmerge_refusals)
    if chosen == "cuda":
        return _cuda.unmerge_backward(dx, *inputs, need)
    if chosen == "triton":
        from vitkern.triton_kernels import unmerge_tokens as kernels

        return kernels.bwd(dx, *inputs, need)
    return OP.reference_backward(dx, *args)


def _explain(*args: Any, backend: str | None = None, **options: Any) -> tuple[str, dict[str, list[str]]]:
    return _call.explanation(NAME, _lower(*args, **options), backend, _triton_refusals, _cuda.unmerge_refusals)


OP = Op(
    NAME,
    ("Tensor y", "Tensor token_map", "Tensor perm", "Tensor offsets"),
    "float fill, str gpu",
    differentiable=(0,),
    batched=4,
    definition=definition,
    fake=_fake,
    cuda_forward=_gpu,
    cuda_backward=_gpu_backward,
    outputs=("x",),
    autocast=False,
)
OP.register()
unmerge_tokens.explain = _explain  # type: ignore[attr-defined]
