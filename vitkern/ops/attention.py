"""attention: argument checks, lowering, and the op."""

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from vitkern import backends
from vitkern.cosine import CosineScore
from vitkern.modulation import ElementwiseMask
from vitkern.ops import _attention_checks as checks
from vitkern.ops import _attention_definition as definition
from vitkern.ops import _attention_modifier_checks as modifier_checks
from vitkern.ops import _attention_slots as slots
from vitkern.ops import _call, _checks, _dropout, _sharded
from vitkern.ops._attention_named import named_keys
from vitkern.ops._attention_stats import mean_logits, rows_of, rows_of_winners
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.attention import attention as reference
from vitkern.rope import Rope
from vitkern.stats import Stats
from vitkern.value import DepthwiseValue

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import AttentionOptions

NAME = checks.NAME


@overload
def attention(  # type: ignore[overload-overlap]
    q: Tensor, k: Tensor, v: Tensor, *, return_stats: tuple[()] = (), **options: "Unpack[AttentionOptions]"
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_stats: tuple[str, ...], **options: "Unpack[AttentionOptions]"
) -> tuple[Tensor, Stats]: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: None, *, return_stats: tuple[str, ...], **options: "Unpack[AttentionOptions]"
) -> tuple[None, Stats]: ...


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
    key_index: Tensor | None = None,
    lepe: DepthwiseValue | None = None,
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
            is their sum. ``-inf`` hides. The gradient of a view that repeats itself (stride 0, made by expand) is summed in
            the kernel; the view itself gets equal shares of that sum.
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
        key_index: integers ``[B|1, Nq, K]``: query i sees the keys ``key_index[:, i]`` alone, one that is named twice counts
            twice, -1 names none. Costs a map ``[B, Nq, Nk]``.
        lepe: a :class:`vitkern.DepthwiseValue`, a depthwise convolution of v that is added to the output.
        dropout_p, dropout_seed: dropout of the weights, Philox of (seed, sample, head, query, key).
        topk: so many of the largest visible scores of a row stay; ties to the lower key.
        return_stats: ``"lse"`` ``[B, Nq, H]``; ``"key_mean"`` ``[B, Nk, H]``, the attention each key receives; ``"row"``
            ``[B, H, R, Nk]``, the weights of the queries ``stat_rows``; ``"logits_mean"`` ``[B, Nq, Nk]``, the head mean of
            the scores before modulations; ``"probs"``, ``"logits"`` in full; ``"index"`` of argmax_k.
        query_weight: ``[B, Nq]`` or ``[B, Nq, H]``, of key_mean; with gradient.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run. ``"probs"``
            and ``"logits"`` have no kernel, the value table of ContextualPosition has one beside TalkingHeads on CPUs alone.

    Returns:
        ``out [B, Nq, H, Dv]`` in the dtype of v (None for ``v=None``), with return_stats ``(out, Stats)``. A row that sees no
        key gives 0, lse ``-inf`` (its sink with one) and gradients 0. NaN in what a mask hides never leaks. Gradients go
        to every floating-point input and to the tensors of every modifier.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(attention, locals())
    lowered = lower(
        q, k, v, bias, mask, modulation, normalizer, cosine, rope, scale, sink, extra_kv, dropout_p, dropout_seed, topk,
        return_stats, stat_rows, query_weight, key_index=key_index,
    )  # fmt: skip
    checks.check_lepe(lepe, q, v)
    out, found = run(lowered, backend, slots.unserved(lowered, backend))
    if lepe is not None and v is not None and out is not None:
        added = lepe.of(v if out.dtype == v.dtype else v.to(out.dtype), backend=_call.beside(backend))
        out = out + added.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return (out, found) if return_stats else out


def run(
    lowered: dict[str, Any], backend: str | None, why: str, packed: slots.Packed | None = None
) -> tuple[Tensor | None, Stats]:
    """The call by the op; by the reference where that is named or, as `why` says, no kernel serves it."""
    device = lowered["q"].device.type
    if _checks.autocast(device):
        dtype = torch.get_autocast_dtype(device)
        cast = {
            name: t if t is None or t.dtype == torch.float64 else t.to(dtype)
            for name, t in lowered.items()
            if name in "qkv"
        }
        if lowered["extra_kv"] is not None:
            cast["extra_kv"] = tuple(t if t is None else t.to(dtype) for t in lowered["extra_kv"])
        with torch.autocast(device, enabled=False):
            return run(lowered | cast, backend, why, packed)
    if why:
        _call.torch_only(NAME, why, backend)
    if why or (packed is None and backends.forced(backend) == "reference"):
        return reference(*lowered.values())
    found = slots.slots(lowered, packed, backend)
    if type(found["q"]) not in _sharded.PLAIN:
        found = {n: _sharded.like(t, found["q"]) if isinstance(t, Tensor) else t for n, t in found.items()}
    wanted, result = lowered["stats"], {}
    numbered = slots.numbered(lowered)
    if lowered["v"] is not None or numbered or "lse" in wanted or "key_mean" in wanted or "index" in wanted:
        out, lse, key_mean = _call.run(OP, tuple(found.values()), backend)
        result = {"lse": lse, "key_mean": key_mean, "index": lse}
    if numbered:
        if "key_mean" in wanted:
            with torch.no_grad():
                places = slots.ranks(found["q"], found["cu_q"])
                key_mean = _call.run(OP, tuple((found | {"query_weight": places}).values()), backend)[2]
        result["row"] = rows_of_winners(key_mean, found, lowered["stat_rows"])
    elif "row" in wanted:
        result["row"] = rows_of(found, lowered["stat_rows"])
    if "logits_mean" in wanted:
        result["logits_mean"] = mean_logits(found)
    if "index" in wanted:
        result["index"] = result["index"].to(torch.int32)
    stats = Stats(**{name: result[name] for name in wanted})
    return (None if lowered["v"] is None else out), stats


def lower(
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
    longest: tuple[Tensor, Tensor] | None = None,
    samples: int | None = None,
    key_index: Any = None,
) -> dict[str, Any]:
    """The arguments of the reference, by name. `longest`: of packed sequences, a q and a k of the greatest lengths, which are
    what a modifier that is not packed must fit; `samples`: how many there are."""
    checks.tensors(q, k, v)
    stats = checks.names_of_stats(return_stats)
    extra = checks.check_rest(q, k, v, normalizer, sink, extra_kv, topk, stats, stat_rows, query_weight)
    if extra_kv is not None:  # parameters of float32 beside tokens of bfloat16
        extra_kv = (extra_kv[0].to(k.dtype), None if v is None else extra_kv[1].to(v.dtype))
    biases = modifier_checks.modifiers("bias", bias, modifier_checks.BIASES)
    masks = modifier_checks.modifiers("mask", mask, modifier_checks.MASKS)
    modulations = modifier_checks.modifiers("modulation", modulation, modifier_checks.MODULATIONS)
    for b in biases:
        own_q, own_k = longest or (q, k)
        count = q.shape[0] if samples is None else samples
        of_bias = slots.seen_by(b, q, k, longest)
        modifier_checks.check_bias(b, *of_bias, v, extra, own_q.shape[1], own_k.shape[1], count)
    for m in masks:
        modifier_checks.check_mask(m, *slots.seen_by(m, q, k, longest))
    for m in modulations:
        modifier_checks.check_modulation(m, *slots.seen_by(m, q, k, longest), normalizer)
    modifier_checks.check_policy(modulations, sink, extra_kv, stats)
    if key_index is not None:
        checks.check_key_index(key_index, q, k, normalizer, stats, topk)
        named = named_keys(key_index, q, k.shape[1])
        masks = (*masks, named > 0)
        if normalizer == "softmax":
            biases = (*biases, named.log())
        elif not normalizer.startswith("argmax"):
            modulations = (*modulations, ElementwiseMask(named, "prob"))
    checks.check_rope(rope, q, k)
    scale = checks.check_scale(scale, cosine, q)
    seed = _dropout.stream(NAME, dropout_p, dropout_seed, q.device)
    if v is None and not stats:
        raise ValueError(f"{NAME}: v must be a tensor unless statistics are asked for, got None")
    return {
        "q": q, "k": k, "v": v, "biases": biases, "masks": masks, "modulations": modulations, "normalizer": normalizer,
        "cosine": cosine, "rope": rope, "scale": scale, "sink": sink, "extra_kv": extra_kv, "seed": seed,
        "dropout_p": float(dropout_p), "topk": topk, "stats": stats, "stat_rows": tuple(stat_rows or ()),
        "query_weight": query_weight,
    }  # fmt: skip


def _explain(*args: Any, backend: str | None = None, lepe: Any = None, **options: Any) -> Any:
    lowered = lower(*args, **options)
    why = slots.unserved(lowered, backend)
    if why:
        return _call.torch_only(NAME, why, backend)
    found, notes = slots.notes(lowered, None, backend)
    return *_call.explanation(NAME, OP, tuple(found.values()), backend), notes


def _triton() -> Any:
    from vitkern.triton_kernels import attention as kernels

    return kernels


OP = Op(
    NAME,
    tuple(f"{'Tensor' if name in 'qkv' else 'Tensor?'} {name}" for name in definition.TENSORS),
    "str normalizer, float scale, bool causal, SymInt offset, float dropout_p, SymInt topk, str rule, SymInt path_width, "
    "bool path_transposed, SymInt max_q, SymInt max_k, float policy_eps, bool policy_diagonal, "
    "SymInt grid_height, SymInt grid_width, SymInt grid_prefix, SymInt grid_step, str gpu",
    differentiable=tuple(i for i, name in enumerate(definition.TENSORS) if name not in definition.WHOLE),
    batched=0,  # a bias or a mask may have a batch of its own
    definition=definition.definition,
    fake=definition.fake,
    gpu=Gpu(_triton),
    outputs=("out", "lse", "key_mean"),
    autocast=False,
    summed=tuple((definition.TENSORS.index(name), axes) for name, axes in definition.REPEATED.items()),
)
OP.register()
attention.explain = _explain  # type: ignore[attr-defined]
