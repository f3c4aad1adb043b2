"""attention: argument checks, lowering, and the op."""

import functools
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import ContextualPosition, KeyBias
from vitkern.cosine import CosineScore
from vitkern.mask import Causal
from vitkern.ops import _attention_checks as checks
from vitkern.ops import _call, _checks
from vitkern.ops._op import Op
from vitkern.reference.attention import attention as reference
from vitkern.reference.attention import wider
from vitkern.reference.window_attention import normalize
from vitkern.rope import Rope
from vitkern.stats import Stats

NAME = checks.NAME


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
        backend: ``"reference"`` or ``"cpu"``; raises with all reasons if it cannot run. Modulations, topk, the hard choices
            and all statistics but lse have no kernel yet.

    Returns:
        ``out [B, Nq, H, Dv]`` in the dtype of v (None for ``v=None``), with return_stats ``(out, Stats)``. A row that sees no
        key gives 0, lse ``-inf`` (its sink with one) and gradients 0. NaN in what a mask hides never leaks. Gradients go
        to every floating-point input and to the tensors of every modifier.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    args = _lower(
        q, k, v, bias, mask, modulation, normalizer, cosine, rope, scale, sink, extra_kv, dropout_p, dropout_seed, topk,
        return_stats, stat_rows, query_weight,
    )  # fmt: skip
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        cast = [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args[:3]]
        with torch.autocast(device, enabled=False):
            out, found = _run((*cast, *args[3:]), backend)
    else:
        out, found = _run(args, backend)
    return (out, found) if return_stats else out


def _run(args: tuple[Any, ...], backend: str | None) -> tuple[Tensor | None, Stats]:
    why = _unserved(*args)
    if why:
        _call.torch_only(NAME, why, backend)
        return reference(*args)
    out, lse = _call.run(OP, _served(*args), backend)
    return out, Stats(lse=lse if "lse" in args[15] else None)


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


def _unserved(
    q: Tensor, k: Tensor, v: Any, biases: Any, masks: Any, modulations: Any, normalizer: str, cosine: Any, rope: Any,
    scale: Any, sink: Any, extra_kv: Any, seed: Any, dropout_p: float, topk: Any, stats: Any, *rest: Any,
) -> str:  # fmt: skip
    """Why no kernel serves the call, "" if the op does: the arguments are those of the reference."""
    if v is None:
        return "no kernel makes statistics alone"
    if normalizer.startswith("argmax"):
        return f"no kernel has normalizer={normalizer!r}"
    if modulations:
        return f"no kernel has modulation.{type(modulations[0]).__name__}"
    if topk is not None:
        return "no kernel has topk"
    others = [name for name in stats if name != "lse"]
    if others:
        return f"no kernel has return_stats {others[0]!r}"
    if any(isinstance(b, ContextualPosition) and b.v_table is not None for b in biases):
        return "no kernel has the value table of bias.ContextualPosition"
    if any(getattr(b, "place", "logit") == "prob" for b in biases):
        return "no kernel has bias.ManhattanDecay with place='prob'"
    return ""


def _served(
    q: Tensor, k: Tensor, v: Tensor, biases: Any, masks: Any, modulations: Any, normalizer: str, cosine: Any, rope: Any,
    scale: Any, sink: Any, extra_kv: Any, seed: Any, dropout_p: float, topk: Any, stats: Any, *rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the op: rotations, unit vectors and further keys are made here, modifiers take their dense form."""
    acc = torch.promote_types(q.dtype, torch.float32)
    keys = k.shape[1]
    offsets = [m.offset for m in masks if isinstance(m, Causal)]
    seen = [m if isinstance(m, Tensor) else m.dense(q, k) for m in masks if not isinstance(m, Causal)]
    dense = [b if isinstance(b, Tensor) else b.dense(q, k) for b in biases if not isinstance(b, KeyBias)]
    of_keys = [b.dense(q, k) for b in biases if isinstance(b, KeyBias)]
    if rope is not None:
        q, k = rope.turn(q, rope.q_range), rope.turn(k, rope.k_range)
    if extra_kv is not None:
        more = extra_kv[0].shape[1]
        if offsets:
            seen.append(Causal(min(offsets)).dense(q, k))
            offsets = []
        k, v = (torch.cat((t, e.expand(t.shape[0], -1, -1, -1)), 1) for t, e in zip((k, v), extra_kv, strict=True))
        dense, of_keys = ([wider(t, keys, more, 0.0) for t in each] for each in (dense, of_keys))
        seen = [wider(t, keys, more, True) for t in seen]
    factor = None
    if cosine is not None:
        q, k = (normalize(t.to(acc), cosine.eps).to(t.dtype) for t in (q, k))
        factor = cosine.logit_scale.reshape(-1).to(acc).clamp(max=cosine.max).exp()
    elif isinstance(scale, Tensor):
        factor = scale.to(acc).expand(q.shape[2])
    return (
        q, k, v, _joined(dense, torch.add), _joined(of_keys, torch.add), _joined(seen, torch.logical_and), factor, sink, seed,
        normalizer, 1.0 if factor is not None else float(scale), bool(offsets), min(offsets) if offsets else 0, dropout_p,
    )  # fmt: skip


def _joined(parts: list[Tensor], join: Any) -> Tensor | None:
    """All parts in one tensor of four axes, None for no part."""
    if not parts:
        return None
    whole = functools.reduce(join, parts)
    return whole[(None,) * (4 - whole.dim())]


# the op -----------------------------------------------------------------------------------------------------------------


def definition(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hk, D]
    v: Tensor,  # [B, Nk, Hk, Dv]
    bias: Tensor | None,  # [B|1, H|1, Nq|1, Nk|1]
    key_bias: Tensor | None,  # [B|1, H|1, 1, Nk]
    mask: Tensor | None,  # bool [B|1, H|1, Nq|1, Nk|1]
    factor: Tensor | None,  # [H], in place of scale
    sink: Tensor | None,  # [H]
    seed: Tensor | None,  # [1] int64
    normalizer: str,
    scale: float,
    causal: bool,  # key j is seen by query i where j <= i + offset
    offset: int,
    dropout_p: float,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # out [B, Nq, H, Dv], lse [B, Nq, H], which is 0 but for softmax
    biases = tuple(b for b in (bias, key_bias) if b is not None)
    masks = tuple(m for m in (mask, Causal(offset) if causal else None) if m is not None)
    stats = ("lse",) if normalizer == "softmax" else ()
    out, found = reference(
        q, k, v, biases, masks, (), normalizer, None, None, scale if factor is None else factor, sink, None, seed,
        dropout_p, None, stats,
    )  # fmt: skip
    acc = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_zeros(q.shape[:3], dtype=acc) if found.lse is None else found.lse.contiguous()
    return out, lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=acc)


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    lowered = _lower(*args, **options)
    why = _unserved(*lowered)
    if why:
        return _call.torch_only(NAME, why, backend)
    return _call.explanation(NAME, OP, _served(*lowered), backend)


OP = Op(
    NAME,
    (
        "Tensor q", "Tensor k", "Tensor v", "Tensor? bias", "Tensor? key_bias", "Tensor? mask", "Tensor? factor",
        "Tensor? sink", "Tensor? seed",
    ),
    "str normalizer, float scale, bool causal, SymInt offset, float dropout_p, str gpu",
    differentiable=(0, 1, 2, 3, 4, 6, 7),
    batched=3,
    definition=definition,
    fake=_fake,
    autocast=False,
)  # fmt: skip
OP.register()
attention.explain = _explain  # type: ignore[attr-defined]
