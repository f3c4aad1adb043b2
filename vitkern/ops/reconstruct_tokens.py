"""reconstruct_tokens: argument checks, lowering, and the op."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._op import Op
from vitkern.reference.reconstruct_tokens import reconstruct_tokens as definition

NAME = "reconstruct_tokens"
OWN = "weights are multiplied by PyTorch"


def reconstruct_tokens(
    y: Tensor,
    x: Tensor,
    centers: Tensor | None = None,
    *,
    k: int = 20,
    temperature: float = 0.01,
    norm: str = "l1",
    backend: str | None = None,
) -> Tensor:
    r"""Spreads the outputs of clusters back over the tokens (Liang et al. 2022).

    .. math:: w_{nm} = \exp(-\tau \max(\|x_n - c_m\|^2, 0)), \qquad \text{out}_n = \sum_m p_{nm} y_m

    The entries of a row that are at least its k-th largest stay (all ties, all where k >= M), the others count 0, and
    p is the row divided by its sum (``"l1"``) or its Euclidean norm (``"l2"``, as published: the rows do not sum to 1).
    The row minimum of the distances is subtracted first, so that no row vanishes. No matrix ``[N, M]`` exists.

    Args:
        y: ``[B, M, C]``, what the clusters became.
        x: ``[B, N, E]``, the tokens as they were when they were clustered. Without ``centers``: weights ``[B, N, M]``,
            and out is their product with y, summed in float32.
        centers: ``[B, M, E]`` in the dtype of x.
        k: how many centres a token is made from.
        temperature: :math:`\tau`, at least 0.
        norm: ``"l1"`` or ``"l2"``.
        backend: ``"reference"`` or ``"cpu"``; raises with all reasons if it cannot run. Weights go through PyTorch's
            product, which is the reference.

    Returns:
        ``[B, N, C]`` in the dtype of y, with gradients to y, x and centers (or y and the weights); the set of entries
        that stay is a constant.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(y) not in _sharded.PLAIN and _sharded.met(y):
        return _sharded.call(reconstruct_tokens, locals())
    if centers is None:
        return _weighted(y, x, backend)
    return _call.run(OP, _lower(y, x, centers, k, temperature, norm), backend)


def _lower(y: Any, x: Any, centers: Any, k: Any = 20, temperature: Any = 0.01, norm: Any = "l1") -> tuple[Any, ...]:
    """The arguments of the op."""
    for name, t in (("y", y), ("x", x), ("centers", centers)):
        _rows(name, t, y)
    if centers.dtype != x.dtype:
        raise TypeError(f"{NAME}: centers must have the dtype of x ({x.dtype}), got {centers.dtype}")
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise TypeError(f"{NAME}: x must be float64 exactly where y is ({y.dtype}), got {x.dtype}")
    want = (y.shape[0], y.shape[1], x.shape[2])
    _checks.shape(NAME, "centers", centers, want, "[B, M, E] of y and x")
    if y.shape[1] < 1:
        raise ValueError(f"{NAME}: y must have at least one cluster, got {list(y.shape)}")
    _checks.integer(NAME, "k", k, 1)
    _checks.number(NAME, "temperature", temperature, 0)
    if norm not in ("l1", "l2"):
        raise ValueError(f"{NAME}: norm must be 'l1' or 'l2', got {norm!r}")
    return (y, x, centers, k, float(temperature), norm == "l2")


def _rows(name: str, t: Any, y: Tensor) -> None:
    """[B, rows, channels] on the device of y."""
    _checks.parameter(NAME, name, t, t.device if t is y else y.device)
    if t.dim() != 3 or t.shape[0] != y.shape[0]:
        raise ValueError(f"{NAME}: {name} must have shape [B, rows, channels] with the batch of y, got {list(t.shape)}")


def _weighted(y: Any, weights: Any, backend: str | None) -> Tensor:
    _check_weighted(y, weights)
    _call.torch_only(NAME, OWN, backend)
    acc = torch.promote_types(torch.promote_types(y.dtype, weights.dtype), torch.float32)
    return (weights.to(acc) @ y.to(acc)).to(y.dtype)


def _check_weighted(y: Any, weights: Any) -> None:
    _rows("y", y, y)
    _rows("weights", weights, y)
    if weights.shape[2] != y.shape[1]:
        raise ValueError(
            f"{NAME}: weights must have shape [B, N, M] with the M = {y.shape[1]} of y, got {list(weights.shape)}"
        )


# the op -----------------------------------------------------------------------------------------------------------------


def _fake(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return y.new_empty((x.shape[0], x.shape[1], y.shape[2]))


def _explain(y: Any, x: Any, centers: Any = None, *, backend: str | None = None, **options: Any) -> _call.Found:
    if centers is None:
        _check_weighted(y, x)
        return _call.torch_only(NAME, OWN, backend)
    return _call.explanation(NAME, OP, _lower(y, x, centers, **options), backend)


OP = Op(
    NAME,
    ("Tensor y", "Tensor x", "Tensor centers"),
    "SymInt k, float temperature, bool l2, str gpu",
    differentiable=(0, 1, 2),
    batched=3,
    definition=definition,
    fake=_fake,
    outputs=("out",),
    autocast=False,
)
OP.register()
reconstruct_tokens.explain = _explain  # type: ignore[attr-defined]
