"""attention: argument checks and lowering. The reference runs on every device; kernels are not written yet."""

from typing import Any

import torch
from torch import Tensor

from vitkern.cosine import CosineScore
from vitkern.ops import _attention_checks as checks
from vitkern.ops import _call, _checks
from vitkern.reference.attention import attention as definition
from vitkern.rope import Rope

NAME = checks.NAME
OWN = "no kernel is written for this op"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    bias: Any = None,
    mask: Any = None,
    modulation: Any = None,
    normalizer: str = "softmax",
    cosine: CosineScore | None = None,
    rope: Rope | None = None,
    scale: float | Tensor | None = None,
    sink: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor | None] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    topk: int | None = None,
    return_stats: tuple[str, ...] = (),
    stat_rows: tuple[int, ...] | None = None,
    query_weight: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    r"""Masked and biased attention (Vaswani et al. 2017): ``out_i = sum_j P_ij v_j``, ``P`` the normalised scores.

    In this order: ``rope`` turns q and k; scores ``scale q.k``, or cosine; modulations of the scores; biases, which are
    never scaled; masks; ``topk``; the normaliser over what is left; modulations of the weights; dropout; the sum.

    Args:
        q: ``[B, Nq, H, D]``; k: ``[B, Nk, Hk, D]``; v: ``[B, Nk, Hk, Dv]`` or None where only statistics are wanted. Any
            strides, head sizes 1 to 256, Hk divides H. float32, float64, bfloat16 or float16.
        bias: a tensor that broadcasts to ``[B, H, Nq, Nk]``, a modifier of :mod:`vitkern.bias`, or a list of these, which
            is their sum. ``-inf`` hides.
        mask: bool, True may attend; a tensor, a modifier of :mod:`vitkern.mask`, or a list, which is their intersection.
        modulation: of :mod:`vitkern.modulation`, or a list, in its order.
        normalizer: ``"softmax"``, ``"sigmoid"``, ``"relu"``, ``"none"``; ``"argmax_k"``: the first largest key of a row has
            weight 1; ``"argmax_q"``: every key goes to its first largest query.
        cosine: scores ``exp(min(logit_scale, max)) cos(q, k)``; scale must then be None.
        rope: rotary embedding of q and k.
        scale: a number, or a tensor ``[]`` or ``[H]`` with gradient. None is ``D ** -0.5``.
        sink: ``[H]``: one more term ``exp(sink_h)`` in the denominator of the softmax.
        extra_kv: ``(k, v) [B|1, E, Hk, D|Dv]``: further keys behind the others; not turned, visible to all, bias 0 unless
            the bias has Nk + E columns.
        dropout_p, dropout_seed: dropout of the weights, Philox of (seed, sample, head, query, key).
        topk: so many of the largest visible scores of a row stay; ties to the lower key.
        return_stats: ``"lse"`` ``[B, Nq, H]``; ``"key_mean"`` ``[B, Nk, H]``, the attention each key receives; ``"row"``
            ``[B, H, R, Nk]``, the weights of the queries ``stat_rows``; ``"logits_mean"`` ``[B, Nq, Nk]``, the head mean of
            the scores before modulations; ``"probs"``, ``"logits"`` in full; ``"index"`` of argmax_k.
        query_weight: ``[B, Nq]`` or ``[B, Nq, H]``, of key_mean; with gradient.
        backend: ``"reference"``; raises with all reasons if it cannot run.

    Returns:
        ``out [B, Nq, H, Dv]`` in the dtype of v (None for ``v=None``), with return_stats ``(out, Stats)``. A row that sees no
        key gives 0, lse ``-inf`` (its sink with one) and gradients 0. NaN in what a mask hides never leaks. Gradients go
        to every floating-point input and to the tensors of every modifier.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    _call.torch_only(NAME, OWN, backend)
    args = _lower(
        q, k, v, bias, mask, modulation, normalizer, cosine, rope, scale, sink, extra_kv, dropout_p, dropout_seed, topk,
        return_stats, stat_rows, query_weight,
    )  # fmt: skip
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:3]]
        with torch.autocast(device, enabled=False):
            out, found = definition(*cast, *args[3:])
    else:
        out, found = definition(*args)
    return (out, found) if return_stats else out


def _lower(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    mask: Any = None,
    modulation: Any = None,
    normalizer: Any = "softmax",
    cosine: Any = None,
    rope: Any = None,
    scale: Any = None,
    sink: Any = None,
    extra_kv: Any = None,
    dropout_p: Any = 0.0,
    dropout_seed: Any = None,
    topk: Any = None,
    return_stats: Any = (),
    stat_rows: Any = None,
    query_weight: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the reference."""
    checks.tensors(q, k, v)
    stats = (return_stats,) if isinstance(return_stats, str) else tuple(return_stats)
    extra = checks.check_rest(q, k, v, normalizer, sink, extra_kv, topk, stats, stat_rows, query_weight)
    biases = checks.modifiers("bias", bias, checks.BIASES)
    masks = checks.modifiers("mask", mask, checks.MASKS)
    modulations = checks.modifiers("modulation", modulation, checks.MODULATIONS)
    for b in biases:
        checks.check_bias(b, q, k, extra)
    for m in masks:
        checks.check_mask(m, q, k)
    for m in modulations:
        checks.check_modulation(m, q, k, normalizer)
    checks.check_rope(rope, q, k)
    scale = checks.check_scale(scale, cosine, q)
    seed = _checks.dropout(NAME, dropout_p, dropout_seed, q.device)
    if v is None and not stats:
        raise ValueError(f"{NAME}: v must be a tensor unless statistics are asked for, got None")
    return (
        q, k, v, biases, masks, modulations, normalizer, cosine, rope, scale, sink, extra_kv, seed, float(dropout_p),
        topk, stats, tuple(stat_rows or ()), query_weight,
    )  # fmt: skip


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    _lower(*args, **options)
    return _call.torch_only(NAME, OWN, backend)


attention.explain = _explain  # type: ignore[attr-defined]
