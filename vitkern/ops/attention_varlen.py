"""attention_varlen: packed sequences of any lengths, on the op of attention."""

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from vitkern import backends
from vitkern.bias import PolylinePath
from vitkern.cosine import CosineScore
from vitkern.mask import FromLogits
from vitkern.modulation import Policy
from vitkern.ops import _attention_checks as checks
from vitkern.ops import _attention_slots as slots
from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._attention_definition import places_in_batch
from vitkern.ops.attention import OP, lower, run
from vitkern.rope import Rope
from vitkern.stats import Stats
from vitkern.value import DepthwiseValue

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import AttentionOptions

NAME = "attention_varlen"
LONGEST = 2**30
STATS = ("lse", "key_mean", "row", "index")


@overload
def attention_varlen(  # type: ignore[overload-overlap]
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_stats: tuple[()] = (), **options: "Unpack[AttentionOptions]",
) -> Tensor: ...  # fmt: skip


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_stats: tuple[str, ...], **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, Stats]: ...  # fmt: skip


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, return_stats: tuple[str, ...], **options: "Unpack[AttentionOptions]",
) -> tuple[None, Stats]: ...  # fmt: skip


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
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
    r""":func:`vitkern.attention` of sequences that lie one behind the other: each query sees the keys of its own sequence.

    Args:
        q: ``[Tq, H, D]``; k: ``[Tk, Hk, D]``; v: ``[Tk, Hk, Dv]`` or None where only statistics are wanted.
            Sequence s owns the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1] - 1``; it may have no query, no key, or neither.
        cu_seqlens_q, cu_seqlens_k: int32 ``[S + 1]``, ascending from 0 to Tq and Tk. Their values are never copied to the
            host; on the CPU and with ``VITKERN_CHECK=1`` they are checked.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.
        bias, mask, modulation: as of attention. Tensors are ``[H|1, max_seqlen_q, max_seqlen_k]``, the same for all
            sequences and aligned at the top left, as is an index of pairs. Positions (Causal, SoftCausal, a grid, which holds the
            longest sequence) count inside a sequence. What belongs to tokens (KeyBias and RowBias ``[1, H|1, T]``, ``keep`` of
            Policy ``[1, Tk]``, ids, levels, coordinates, rope, ``rel_h`` and ``rel_w`` per query) is packed as q and k are; Policy
            divides eps by the keys of the own sequence.
            PolylinePath ``[S|1, Hs, Ws, H|1]`` has a map of each sequence, all of Hs Ws tokens.
        extra_kv: ``(k, v) [1, E, Hk, D|Dv]``: further keys of every sequence; with neither topk nor argmax nor ids and levels.
        key_index: integers ``[Tq, K]``: query i sees the keys ``key_index[i]`` of its own sequence alone, which count from 0 there,
            one that is named twice counts twice, -1 names none. Costs a padded batch and a map
            ``[S, max_seqlen_q, max_seqlen_k]``; not with topk, nor with statistics without softmax, nor with Policy.
        lepe: a :class:`vitkern.DepthwiseValue` whose grid has the sides ``(h, w)`` of every sequence, a map of its own; the
            queries and the values are the same tokens.
        return_stats: ``"lse"`` ``[Tq, H]``; ``"key_mean"`` ``[Tk, H]``, over the queries of the key's own sequence (behind
            them the further keys, sequence by sequence); ``"row"`` ``[S, R, H, max_seqlen_k + E]``, the weights of the queries
            ``stat_rows`` of every sequence, 0 where it has none, made from a padded batch; ``"index"`` ``[Tq, H]`` of argmax_k.
        query_weight: ``[Tq]`` or ``[Tq, H]``.
        All else as of attention.

    Returns:
        ``out [Tq, H, Dv]`` (None for ``v=None``), with return_stats ``(out, Stats)``.

    Raises:
        ValueError, TypeError: as attention; NotImplementedError: FromLogits, of which each packed image would have a size of
            its own, two modifiers of one kind that belong to tokens, paths and contextual positions among them, and the other
            statistics have no form for packed sequences.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(attention_varlen, locals())
    lowered, packed = _lower(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, query_weight, key_index, bias=bias, mask=mask,
        modulation=modulation, normalizer=normalizer, cosine=cosine, rope=rope, scale=scale, sink=sink, extra_kv=extra_kv,
        dropout_p=dropout_p, dropout_seed=dropout_seed, topk=topk, return_stats=return_stats, stat_rows=stat_rows,
    )  # fmt: skip
    _check_lepe(lepe, q, v, cu_seqlens_q, cu_seqlens_k)
    out, found = run(lowered, backend, "", packed)
    more = 0 if extra_kv is None else extra_kv[0].shape[1]
    if slots.as_batch(lowered, packed, backend):
        out, found = _packed_again(out, found, packed, len(q), len(k), more)
    if more and found.key_mean is not None:  # the further keys stand in front of those of their sequence
        places = slots.keys_of_all(cu_seqlens_k, len(k), more)
        found = found._replace(key_mean=found.key_mean[:, places.clamp(max=len(k)).argsort(stable=True)])
    out = None if out is None else out[0]
    if lepe is not None and v is not None and out is not None:
        out = out + lepe.of_packed(v.to(out.dtype), backend=_call.beside(backend)).repeat_interleave(
            q.shape[1] // k.shape[1], 1
        )
    return (out, Stats(*(t if t is None else t[0] for t in found))) if return_stats else out


def _packed_again(
    out: Tensor | None, found: Stats, packed: slots.Packed, queries: int, keys: int, more: int
) -> tuple[Tensor | None, Stats]:
    """Output and statistics of a padded batch, as the op gives them of packed sequences."""
    sequences = len(packed.cu_k) - 1
    cu_k = packed.cu_k + more * torch.arange(sequences + 1, device=packed.cu_k.device)
    of_queries = places_in_batch(packed.cu_q, queries, packed.longest[0].shape[1])
    of_keys = places_in_batch(cu_k, keys + more * sequences, packed.longest[1].shape[1] + more)
    places = {"lse": of_queries, "index": of_queries, "key_mean": of_keys}
    again = {
        name: t.flatten(0, 1)[places[name]][None] if name in places else t.transpose(1, 2)[None]
        for name, t in found._asdict().items()
        if t is not None
    }
    return None if out is None else out.flatten(0, 1)[of_queries][None], Stats(**again)


def _lower(
    q: Any,
    k: Any,
    v: Any,
    cu_q: Any,
    cu_k: Any,
    max_q: Any,
    max_k: Any,
    query_weight: Any = None,
    key_index: Any = None,
    **options: Any,
) -> tuple[dict[str, Any], slots.Packed]:
    for name, t in (("q", q), ("k", k), *((("v", v),) if v is not None else ())):
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
    checks.check_rows(options.get("stat_rows"), 0, lengths[0], NAME)
    if options.get("topk") is not None and _checks.integer(NAME, "topk", options["topk"]) > lengths[1]:
        raise ValueError(f"{NAME}: topk must be at most max_seqlen_k = {lengths[1]}, got {options['topk']}")
    lowered = lower(
        q[None], k[None], None if v is None else v[None], **options, query_weight=weight, longest=longest,
        samples=len(cu_q) - 1,
    )  # fmt: skip
    why = slots.unserved(lowered, None)
    if why:
        raise NotImplementedError(f"{NAME}: {why}")
    whole = (len(cu_q) - 1) * lengths[0]
    if any(isinstance(b, PolylinePath) for b in lowered["biases"]) and (len(q) != whole or len(k) != whole):
        raise ValueError(
            f"{NAME}: bias PolylinePath must go with sequences of {lengths[0]} tokens each, got {len(q)} queries and {len(k)} "
            f"keys in {len(cu_q) - 1} sequences"
        )
    if key_index is not None:
        _check_key_index(key_index, q, cu_q, cu_k, lowered)
    return lowered, slots.Packed(cu_q, cu_k, longest, key_index)


def _check_key_index(index: Any, q: Tensor, cu_q: Tensor, cu_k: Tensor, lowered: dict[str, Any]) -> None:
    _checks.integers(NAME, "key_index", index)
    _checks.on_device(NAME, "key_index", index, "q", q.device)
    if index.dim() != 2 or len(index) != len(q):
        raise ValueError(f"{NAME}: key_index must have shape [Tq = {len(q)}, K], got {list(index.shape)}")
    if backends.may_read(index) and index.numel():
        own = cu_k.diff()[torch.bucketize(torch.arange(len(q), device=q.device), cu_q[1:], right=True)]
        if bool((index < -1).any()) or bool((index >= own[:, None]).any()):
            raise ValueError(f"{NAME}: key_index must be -1 or a key of the query's own sequence, counted from 0 there")
    kept = any(isinstance(m, Policy) for m in lowered["modulations"])
    if kept or lowered["topk"] is not None or (lowered["normalizer"] != "softmax" and lowered["stats"]):
        raise NotImplementedError(
            f"{NAME}: key_index goes neither with topk nor with statistics without softmax nor with Policy"
        )


def _check_lepe(lepe: Any, q: Tensor, v: Any, cu_q: Tensor, cu_k: Tensor) -> None:
    if lepe is None:
        return
    sequences = len(cu_q) - 1
    checks.check_lepe(lepe, q[None], None if v is None else v[None], NAME, sequences)
    bounds = [0]
    for height, width in lepe.grid:
        bounds.append(bounds[-1] + height * width + lepe.prefix_tokens)
    for name, cu in (("q", cu_q), ("k", cu_k)):
        if backends.may_read(cu) and cu.tolist() != bounds:
            raise ValueError(
                f"{NAME}: cu_seqlens_{name} must be the bounds {bounds} of the maps of lepe, got {cu.tolist()}"
            )


def _refuse_unpacked(options: dict[str, Any]) -> None:
    """Raises for what has no form for packed sequences."""
    for name in ("bias", "mask", "modulation"):
        given = options.get(name)
        for part in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(part, FromLogits):
                raise NotImplementedError(f"{NAME}: FromLogits has no form for packed sequences")
    hard = options.get("normalizer", "").startswith("argmax") or options.get("topk") is not None
    if options.get("extra_kv") is not None and hard:
        raise NotImplementedError(f"{NAME}: extra_kv goes neither with topk nor with argmax")
    stats = options.get("return_stats", ())
    if any(name not in STATS for name in ((stats,) if isinstance(stats, str) else stats)):
        raise NotImplementedError(f"{NAME}: return_stats of packed sequences may be {', '.join(STATS)}, got {stats!r}")


def _explain(*args: Any, backend: str | None = None, lepe: Any = None, **options: Any) -> Any:
    lowered, packed = _lower(*args, **options)
    found, notes = slots.notes(lowered, packed, backend)
    return *_call.explanation(NAME, OP, tuple(found.values()), backend), notes


attention_varlen.explain = _explain  # type: ignore[attr-defined]
