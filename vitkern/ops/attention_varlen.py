"""attention_varlen: packed sequences of any lengths, on the op of attention."""

from typing import Any

import torch
from torch import Tensor

from vitkern import bias as biases
from vitkern import mask as masks
from vitkern import modulation as modulations
from vitkern.cosine import CosineScore
from vitkern.ops import _attention_slots as slots
from vitkern.ops import _call, _checks
from vitkern.ops.attention import OP, lower, run
from vitkern.rope import Rope
from vitkern.stats import Stats

NAME = "attention_varlen"
UNPACKED = (biases.PolylinePath, biases.ContextualPosition, masks.FromLogits, modulations.Policy)
LONGEST = 2**30
STATS = ("lse", "key_mean", "row", "index")


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    bias: Any = None,
    mask: Any = None,
    modulation: Any = None,
    normalizer: str = "softmax",
    cosine: CosineScore | None = None,
    rope: Rope | None = None,
    scale: float | Tensor | None = None,
    sink: Tensor | None = None,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    topk: int | None = None,
    return_stats: tuple[str, ...] = (),
    stat_rows: tuple[int, ...] | None = None,
    query_weight: Tensor | None = None,
    backend: str | None = None,
) -> Any:
    r""":func:`vitkern.attention` of sequences that lie one behind the other: each query sees the keys of its own sequence.

    Args:
        q: ``[Tq, H, D]``; k: ``[Tk, Hk, D]``; v: ``[Tk, Hk, Dv]``. Sequence s owns the rows ``cu_seqlens[s]`` to
            ``cu_seqlens[s + 1] - 1``; it may have no query, no key, or neither.
        cu_seqlens_q, cu_seqlens_k: int32 ``[S + 1]``, ascending from 0 to Tq and Tk. Their values are never copied to the
            host; on the CPU and with ``VITKERN_CHECK=1`` they are checked.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        bias, mask, modulation: as of attention. Tensors are ``[H|1, max_seqlen_q, max_seqlen_k]``, the same for all
            sequences and aligned at the top left. Positions (Causal, a grid, SoftCausal) count inside a sequence. What belongs
            to tokens (KeyBias and RowBias ``[1, H|1, T]``, ids, levels, coordinates, rope, ``rel_h`` and ``rel_w`` per query)
            is packed as q and k are.
        extra_kv: ``(k, v) [1, E, Hk, D|Dv]``: further keys of every sequence; with neither topk nor argmax nor ids and levels.
        return_stats: ``"lse"`` ``[Tq, H]``; ``"key_mean"`` ``[Tk, H]``, over the queries of the key's own sequence (behind
            them the further keys, sequence by sequence); ``"row"`` ``[S, R, H, max_seqlen_k + E]``, the weights of the queries
            ``stat_rows`` of every sequence, 0 where it has none, made from a padded batch; ``"index"`` ``[Tq, H]`` of argmax_k.
        query_weight: ``[Tq]`` or ``[Tq, H]``.
        All else as of attention.

    Returns:
        ``out [Tq, H, Dv]``, with return_stats ``(out, Stats)``.

    Raises:
        ValueError, TypeError: as attention; NotImplementedError: PolylinePath, ContextualPosition, FromLogits,
            Policy, two modifiers of one kind that belong to tokens, and the other statistics have no form for packed sequences.
    """
    lowered, packed = _lower(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query_weight, bias=bias, mask=mask,
        modulation=modulation, normalizer=normalizer, cosine=cosine, rope=rope, scale=scale, sink=sink, extra_kv=extra_kv,
        dropout_p=dropout_p, dropout_seed=dropout_seed, topk=topk, return_stats=return_stats, stat_rows=stat_rows,
    )  # fmt: skip
    out, found = run(lowered, backend, "", packed)
    assert out is not None
    if (
        extra_kv is not None and found.key_mean is not None
    ):  # the further keys stand in front of those of their sequence
        places = slots.keys_of_all(cu_seqlens_k, len(k), extra_kv[0].shape[1])
        found = found._replace(key_mean=found.key_mean[:, places.clamp(max=len(k)).argsort(stable=True)])
    return (out[0], Stats(*(t if t is None else t[0] for t in found))) if return_stats else out[0]


def _lower(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    query_weight: Any = None,
    **options: Any,
) -> tuple[dict[str, Any], slots.Packed]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, t)
        if t.dim() != 3:
            raise ValueError(f"{NAME}: {name} must have shape [T, heads, head_dim], got {list(t.shape)}")
    for name, t in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _checks.tensor(NAME, name, t)
        _checks.on_device(NAME, name, t, "q", q.device)
        if t.dtype != torch.int32 or t.dim() != 1 or not len(t):
            raise TypeError(f"{NAME}: {name} must be int32 [S + 1], got {t.dtype} {list(t.shape)}")
    if len(cu_q) != len(cu_k):
        raise ValueError(f"{NAME}: cu_seqlens_k must have the length of cu_seqlens_q ({len(cu_q)}), got {len(cu_k)}")
    lengths = []
    for name, n, cu, t in (("q", max_q, cu_q, q), ("k", max_k, cu_k, k)):
        lengths.append(_checks.integer(NAME, f"max_seqlen_{name}", n))
        if not 0 <= lengths[-1] < LONGEST:
            raise ValueError(f"{NAME}: max_seqlen_{name} must lie in [0, 2^30), got {n}")
        _checks.offsets(NAME, f"cu_seqlens_{name}", cu, len(t), lengths[-1], f"max_seqlen_{name}")
    longest = tuple(
        t.new_empty((1, 1, *t.shape[1:])).expand(1, n, *t.shape[1:]) for t, n in zip((q, k), lengths, strict=True)
    )
    weight = query_weight[None] if isinstance(query_weight, Tensor) else query_weight
    _refuse_unpacked(options)
    for row in options.get("stat_rows") or ():
        if not 0 <= _checks.integer(NAME, "stat_rows", row, what="ints") < lengths[0]:
            raise ValueError(f"{NAME}: stat_rows must be queries of [0, {lengths[0]}), got {row}")
    lowered = lower(q[None], k[None], v[None], **options, query_weight=weight, longest=longest)
    why = slots.unserved(lowered, None)
    if why:
        raise NotImplementedError(f"{NAME}: {why}")
    return lowered, slots.Packed(cu_q, cu_k, longest)


def _refuse_unpacked(options: dict[str, Any]) -> None:
    """Raises for what has no form for packed sequences."""
    for name in ("bias", "mask", "modulation"):
        given = options.get(name)
        for part in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(part, UNPACKED):
                raise NotImplementedError(f"{NAME}: {type(part).__name__} has no form for packed sequences")
            if isinstance(part, biases.DecomposedRelativePosition) and part.q_grid is not None:
                raise NotImplementedError(
                    f"{NAME}: DecomposedRelativePosition must be given per query (q_grid=None) for packed sequences"
                )
    hard = options.get("normalizer", "").startswith("argmax") or options.get("topk") is not None
    if options.get("extra_kv") is not None and hard:
        raise NotImplementedError(f"{NAME}: extra_kv goes neither with topk nor with argmax")
    stats = options.get("return_stats", ())
    if any(name not in STATS for name in ((stats,) if isinstance(stats, str) else stats)):
        raise NotImplementedError(f"{NAME}: return_stats of packed sequences may be {', '.join(STATS)}, got {stats!r}")


def _explain(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, *, backend: str | None = None, **options: Any
) -> Any:
    lowered, packed = _lower(q, k, v, cu_q, cu_k, max_q, max_k, **options)
    found, notes = slots.notes(lowered, packed, backend)
    return *_call.explanation(NAME, OP, tuple(found.values()), backend), notes


attention_varlen.explain = _explain  # type: ignore[attr-defined]
