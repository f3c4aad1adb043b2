"""soft_merge: argument checks, lowering, and the op."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._op import Op
from vitkern.ops.merge_tokens import rows
from vitkern.reference.soft_merge import soft_merge as definition

NAME = "soft_merge"
NORMALIZE = ("softmax", "sigmoid", "none", "l2", "sinkhorn")


def soft_merge(
    x: Tensor,
    logits: Tensor,
    *,
    axis: str = "token",
    normalize: str = "softmax",
    scale: float = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    renormalize: float | None = None,
    eps: float = 1.0,
    iters: int = 3,
    backend: str | None = None,
) -> Tensor:
    r"""M slots, each a weighted sum of all N tokens: ``y_m = sum_n W_nm x_n`` (TokenLearner, Ryoo et al. 2021; PatchMerger,
    Renggli et al. 2022; slot attention; Sinkhorn pooling).

    With ``s = scale * logits`` the weights are, for ``normalize``

    - ``"softmax"``: the softmax of s over the tokens (``axis="token"``) or over the slots (``axis="slot"``);
    - ``"sigmoid"``: ``1 / (1 + exp(-s))``, and ``"none"``: s itself, on either axis;
    - ``"l2"``: ``s_nm / max(|s_.m|, 1e-12)``, the norm over the tokens;
    - ``"sinkhorn"`` (Cuturi 2013): ``exp(Z + u + v)`` with ``Z = s / eps``, after `iters` rounds of
      ``u_m = -LSE_n(Z + v)``, ``v_n = -LSE_m(Z + u)``: the weights of a token sum to 1, those of a slot to about N / M.

    Args:
        x: ``[B, N, ...]`` of any trailing shape and strides, N at least 1: float32, float64, bfloat16 or float16.
        logits: ``[B, N, M]`` of any strides and any of these dtypes, M at least 1; ``[B, M, N]`` goes in as ``logits.mT``.
            ``-inf`` hides a token from a slot under softmax and Sinkhorn.
        axis: ``"token"`` or ``"slot"``, what the softmax runs over; l2 and Sinkhorn need ``"token"``.
        normalize: see above.
        scale: a float; a learned scale multiplies the logits before the call.
        weight: ``[B, N]``, usually the tokens' sizes, with the softmax over tokens: ``ln weight`` is added to s. Weights that
            are not positive hide their token.
        mask: bool ``[B, N]``, True for a real token; what the others hold never leaks.
        renormalize: a positive float e: y_m is divided by ``max(sum_n W_nm, e)``, a mean in place of a sum.
        eps, iters: of Sinkhorn.
        backend: ``"reference"`` or ``"cpu"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, M, ...]`` in the dtype of x; float32 inside, rounded once. A slot without tokens is 0. Gradients go to x,
        logits and weight; Sinkhorn's run through its rounds. No ``[B, N, M]`` tensor but the logits and their gradient is
        stored.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(x) not in _sharded.PLAIN and _sharded.met(x):
        return _sharded.call(soft_merge, locals())
    args = _lower(x, logits, axis, normalize, scale, weight, mask, renormalize, eps, iters)
    y = _call.run(OP, args, backend)[1]
    return y.to(x.dtype).reshape(y.shape[0], y.shape[1], *x.shape[2:])


def _lower(
    x: Any,
    logits: Any,
    axis: Any = "token",
    normalize: Any = "softmax",
    scale: Any = 1.0,
    weight: Any = None,
    mask: Any = None,
    renormalize: Any = None,
    eps: Any = 1.0,
    iters: Any = 3,
) -> tuple[Any, ...]:
    """The arguments of the op."""
    batch, tokens = _checks.rows(NAME, x)
    _checks.parameter(NAME, "logits", logits, x.device, "x")
    if logits.dim() != 3 or logits.shape[:2] != x.shape[:2]:
        raise ValueError(f"{NAME}: logits must have shape [B, N, M] = {[batch, tokens, 'M']}, got {list(logits.shape)}")
    if tokens < 1:
        raise ValueError(f"{NAME}: x must have at least one token, got {list(x.shape)}")
    if logits.shape[2] < 1:
        raise ValueError(f"{NAME}: logits must have at least one slot, got {list(logits.shape)}")
    if axis not in ("token", "slot"):
        raise ValueError(f"{NAME}: axis must be 'token' or 'slot', got {axis!r}")
    if normalize not in NORMALIZE:
        wanted = "'softmax', 'sigmoid', 'none', 'l2' or 'sinkhorn'"
        raise ValueError(f"{NAME}: normalize must be {wanted}, got {normalize!r}")
    if axis == "slot" and normalize in ("l2", "sinkhorn"):
        raise ValueError(f"{NAME}: axis must be 'token' with normalize={normalize!r}, got 'slot'")
    if weight is not None:
        if axis != "token" or normalize != "softmax":
            raise ValueError(
                f"{NAME}: weight must go with axis='token' and normalize='softmax', got {axis!r} and {normalize!r}"
            )
        _checks.parameter(NAME, "weight", weight, x.device, "x")
        _checks.shape(NAME, "weight", weight, (batch, tokens), "[B, N]")
    if mask is not None:
        _checks.flags(NAME, "mask", mask, (batch, tokens), "x", x.device)
        mask = mask.contiguous()
    if not -math.inf < _checks.number(NAME, "scale", scale) < math.inf:
        raise ValueError(f"{NAME}: scale must be finite, got {scale!r}")
    floor = 0.0 if renormalize is None else _positive("renormalize", renormalize)
    _checks.integer(NAME, "iters", iters, 1)
    return (rows(x), logits, weight, mask, axis, normalize, float(scale), floor, _positive("eps", eps), iters)


def _positive(name: str, value: Any) -> float:
    if not 0 < _checks.number(NAME, name, value) < math.inf:
        raise ValueError(f"{NAME}: {name} must be positive and finite, got {value!r}")
    return float(value)


# the op -----------------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)
    batch, slots = logits.shape[0], logits.shape[2]
    return x.new_empty((batch, slots), dtype=wide), x.new_empty((batch, slots, x.shape[2]), dtype=wide)


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = Op(
    NAME,
    ("Tensor x", "Tensor logits", "Tensor? weight", "Tensor? mask"),
    "str axis, str normalize, float scale, float renormalize, float eps, SymInt iters, str gpu",
    differentiable=(0, 1, 2),
    batched=4,
    definition=definition,
    fake=_fake,
    outputs=("total", "y"),  # y last, and not rounded: the backward is given all outputs but the first
    autocast=False,
)
OP.register()
soft_merge.explain = _explain  # type: ignore[attr-defined]
