"""window_attention: argument checks, lowering of the options, and the two ops (separate and packed q, k, v)."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import RelativePosition
from vitkern.cosine import CosineScore
from vitkern.ops import _call, _checks, _window_gpu
from vitkern.ops._op import Op
from vitkern.ops._window_checks import NAME, check, refuse_unbuilt, signature
from vitkern.reference.window_attention import window_attention as definition
from vitkern.stats import Stats

OPTION_TENSORS = (
    "Tensor? bias",
    "Tensor? index",
    "Tensor? logit_scale",
    "Tensor? k_pad",
    "Tensor? v_pad",
    "Tensor? seed",
)
OPTIONS = (
    "SymInt[] window, SymInt[] shift, bool roll_first, bool pad_visible, float scale, float mask_value, "
    "float cosine_max, float cosine_eps, float dropout_p, str gpu"
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int | tuple[int, ...],
    shift_size: int | tuple[int, ...] = 0,
    *,
    bias: Tensor | RelativePosition | None = None,
    mask: Any = None,
    cosine: CosineScore | None = None,
    scale: float | None = None,
    normalizer: str = "softmax",
    partition: str = "block",
    context_size: Any = None,
    pad_order: str = "pad_roll",
    pad_kv: str | tuple[Tensor, Tensor] | None = None,
    mask_value: float | None = -100.0,
    extra_kv: Any = None,
    shared_q: bool = False,
    lepe: Any = None,
    order: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_stats: tuple[str, ...] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Stats]:
    r"""Softmax attention inside (shifted) windows of a map: the attention of Swin (Liu et al. 2021) and Swin V2 (2022).

    ``softmax(scale q k^T + bias + mask_value [regions differ]) v`` in every window, with the roll, the partition, their
    inverses and the padding in the addressing. Nothing of q, k or v is copied.

    Args:
        q: ``[B, *spatial, H, D]``, 1 to 4 spatial axes, any strides. float32, float64, bfloat16 or float16.
        k: ``[B, *spatial, Hk, D]``; Hk divides H (grouped queries).
        v: ``[B, *spatial, Hk, Dv]``.
        window_size: tokens per axis of a window: an int, or one per axis. It may exceed the map.
        shift_size: cyclic shift per axis, ``0 <= shift < window``.
        bias: added to the scores: a tensor that broadcasts to ``[H, N, N]`` (N tokens of a window, row-major), or
            :class:`vitkern.bias.RelativePosition`. ``-inf`` hides.
        cosine: :class:`vitkern.CosineScore` for Swin V2's scores; ``scale`` must then be None.
        scale: factor of the scores, default ``D ** -0.5``.
        pad_order: ``"pad_roll"`` pads the map to whole windows and then shifts (torchvision, transformers);
            ``"roll_pad"`` shifts first (timm).
        pad_kv: what pads show to real queries: ``None`` nothing; ``"zero"`` zero keys and values that take part;
            ``(k_pad [Hk, D], v_pad [Hk, Dv])`` these (padding before the projection gives its bias), with gradients.
        mask_value: added where a shift brought tokens of different regions together. ``None`` hides exactly.
        dropout_p: probability of dropping a weight. The pattern is a function of ``dropout_seed``, image, head, query
            and key alone (Philox), so every back-end draws the same.
        dropout_seed: an int, or a one-element int64 tensor; ``None`` draws one from torch's generator.
        return_stats: ``("lse",)`` also returns :class:`vitkern.Stats` with ``lse [B, *spatial, H]``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, *spatial, H, Dv]`` in the dtype of v, or ``(out, Stats)`` with ``return_stats``.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
        NotImplementedError: an option that is not built yet (see "Not yet" in the README).
    """
    args = _lower(
        q,
        k,
        v,
        window_size,
        shift_size,
        bias=bias,
        cosine=cosine,
        scale=scale,
        pad_order=pad_order,
        pad_kv=pad_kv,
        mask_value=mask_value,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        mask=mask,
        normalizer=normalizer,
        partition=partition,
        context_size=context_size,
        extra_kv=extra_kv,
        shared_q=shared_q,
        lepe=lepe,
        order=order,
        return_stats=return_stats,
    )
    out, lse = _call.run(PLAIN, args, backend)
    return (out, Stats(lse=lse)) if return_stats else out


def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: int | tuple[int, ...],
    shift_size: int | tuple[int, ...] = 0,
    *,
    return_stats: tuple[str, ...] = (),
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Stats]:
    """:func:`window_attention` of a packed projection ``qkv [B, *spatial, 3, H, D]`` (any strides).

    The options are those of :func:`window_attention`. The gradient is one packed tensor, so that neither direction
    copies.
    """
    _checks.tensor(NAME, "qkv", qkv)
    if not 5 <= qkv.dim() <= 8 or qkv.shape[-3] != 3:
        raise ValueError(
            f"{NAME}: qkv must have shape [B, *spatial, 3, heads, head_dim] with 1 to 4 spatial axes, got {list(qkv.shape)}"
        )
    args = _lower(*qkv.unbind(-3), window_size, shift_size, **options)
    out, lse = _call.run(PACKED, (qkv, *args[3:]), backend)
    return (out, Stats(lse=lse)) if return_stats else out


# lowering ---------------------------------------------------------------------------------------------------------------


_lowered: dict[Any, tuple[Any, ...]] = {}  # what checks and sizes alone decide, by everything they depend on


def _lower(
    q: Any,
    k: Any,
    v: Any,
    window_size: Any,
    shift_size: Any = 0,
    *,
    bias: Any = None,
    cosine: Any = None,
    scale: Any = None,
    pad_order: Any = "pad_roll",
    pad_kv: Any = None,
    mask_value: Any = -100.0,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    return_stats: Any = (),
    **unbuilt: Any,
) -> tuple[Any, ...]:
    """The arguments of the op. Checks that depend on shapes alone are made once per combination of shapes."""
    if unbuilt or return_stats:
        refuse_unbuilt(unbuilt, return_stats)
    if isinstance(window_size, list):
        window_size = tuple(window_size)
    if isinstance(shift_size, list):
        shift_size = tuple(shift_size)
    arguments = (q, k, v, window_size, shift_size, bias, cosine, scale, pad_order, pad_kv, mask_value)
    if torch.compiler.is_compiling():
        fixed = check(*arguments)
    else:
        key = tuple(map(signature, arguments)) + (torch.is_autocast_enabled(),)
        fixed = _lowered.get(key) or _remember(key, arguments)
    window, shift, roll_first, scale, mask_value = fixed
    table, index = bias, None
    if isinstance(bias, RelativePosition):
        table, index = bias.table, bias.rows(tuple(window), q.device)
    elif bias is not None:
        n = math.prod(window)
        table = bias.expand(q.shape[-2], n, n)
    tau, cosine_max, cosine_eps = None, 0.0, 0.0
    if cosine is not None:
        tau, cosine_max, cosine_eps = cosine.logit_scale.reshape(-1), float(cosine.max), float(cosine.eps)
    k_pad, v_pad = pad_kv if isinstance(pad_kv, tuple) else (None, None)
    seed = _checks.dropout(NAME, dropout_p, dropout_seed, q.device)
    options = (
        window,
        shift,
        roll_first,
        pad_kv is not None,
        scale,
        mask_value,
        cosine_max,
        cosine_eps,
        float(dropout_p),
    )
    return (q, k, v, table, index, tau, k_pad, v_pad, seed, *options)


def _remember(key: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(_lowered) >= 4096:
        _lowered.clear()
    _lowered[key] = fixed = check(*arguments)
    return fixed


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, PLAIN, _lower(*args, **options), backend)


def _explain_packed(qkv: Tensor, *args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    lowered = _lower(*qkv.unbind(-3), *args, **options)
    return _call.explanation(NAME, PACKED, (qkv, *lowered[3:]), backend)


# the ops ----------------------------------------------------------------------------------------------------------------


def _packed_definition(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return definition(*qkv.unbind(-3), *rest)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=accumulate)


def _packed_fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(*qkv.unbind(-3), *rest)


PLAIN = Op(
    NAME,
    ("Tensor q", "Tensor k", "Tensor v", *OPTION_TENSORS),
    OPTIONS,
    differentiable=(0, 1, 2, 3, 5, 6, 7),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=_window_gpu.PLAIN,
)
PACKED = Op(
    f"{NAME}_qkvpacked",
    ("Tensor qkv", *OPTION_TENSORS),
    OPTIONS,
    differentiable=(0, 1, 3, 4, 5),
    batched=1,
    definition=_packed_definition,
    fake=_packed_fake,
    gpu=_window_gpu.PACKED,
)
PLAIN.register()
PACKED.register()
window_attention.explain = _explain  # type: ignore[attr-defined]
window_attention_qkvpacked.explain = _explain_packed  # type: ignore[attr-defined]
