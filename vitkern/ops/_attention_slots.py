"""attention: how typed modifiers become the arguments of the op."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.bias import (
    ContextualPosition,
    DecomposedRelativePosition,
    EuclideanDistance,
    KeyBias,
    ManhattanDecay,
    PolylinePath,
    RowBias,
)
from vitkern.mask import BlockCausal, Causal, FromLogits, Segments, unpacked
from vitkern.modulation import ElementwiseMask, Policy, SoftCausal, TalkingHeads
from vitkern.ops import _attention_positions as positions
from vitkern.ops import _attention_tables as tables
from vitkern.ops import _sharded
from vitkern.ops._attention_definition import MIXTURES, OPTIONS, TENSORS, batch_of_alike, padded, places_inside
from vitkern.ops._attention_named import batch_of_named
from vitkern.ops._op import once, once_each
from vitkern.ops.mask_from_logits import mask_from_logits
from vitkern.reference.attention import wider
from vitkern.reference.window_attention import normalize

PER_TOKEN = (KeyBias, RowBias, DecomposedRelativePosition, EuclideanDistance, Segments, BlockCausal, Policy)
MIXED_HEADS = 128
KERNEL_STATS = ("lse", "key_mean", "row", "logits_mean", "index")


def on_cpu(q: Tensor, backend: str | None) -> bool:
    """Whether the call may use the slots that only the CPU's kernel has."""
    return q.device.type == "cpu" and backends.forced(backend) != "triton"


def unserved(lowered: dict[str, Any], backend: str | None) -> str:
    """Why no kernel serves the call, "" if the op does."""
    policies = [m for m in lowered["modulations"] if isinstance(m, Policy)]
    mixtures = sum(isinstance(m, TalkingHeads) for m in lowered["modulations"])
    if mixtures and (mixtures > 1 or policies or lowered["q"].shape[2] > MIXED_HEADS):
        return f"modulation.TalkingHeads has a kernel once in a call, without Policy, of at most {MIXED_HEADS} heads"
    stored = [name for name in lowered["stats"] if name not in KERNEL_STATS]
    if stored:
        return f"return_stats {stored[0]!r} stores the whole map of scores, which no kernel does"
    values = sum(isinstance(b, ContextualPosition) and b.v_table is not None for b in lowered["biases"])
    if values > 1:
        return "bias.ContextualPosition has a kernel with one table of values in a call"
    if values and mixtures and not on_cpu(lowered["q"], backend):
        return "only the CPU's kernel has the value table of bias.ContextualPosition beside modulation.TalkingHeads"
    return ""


@dataclass(frozen=True)
class Packed:
    """Sequences one behind the other in one row: their bounds, and a q and a k of the greatest lengths."""

    cu_q: Tensor
    cu_k: Tensor
    longest: tuple[Tensor, Tensor]
    key_index: Tensor | None = None  # [Tq, K]


@dataclass(frozen=True)
class Place:
    """What the modifiers of a call meet: the tokens, or those of the longest sequence; `extended`: further keys; `native`: tables
    of offsets have slots; `axes`: tables meet q itself. `mapped` collects those that become maps."""

    q: Tensor
    k: Tensor
    longest: tuple[Tensor, Tensor] | None
    extended: bool
    native: bool
    axes: bool
    mapped: list[Any]

    def dense(self, modifier: Any) -> Tensor:
        self.mapped.append(modifier)
        return modifier.dense(*seen_by(modifier, self.q, self.k, self.longest))


def notes(lowered: dict[str, Any], packed: Packed | None, backend: str | None) -> tuple[dict[str, Any], list[str]]:
    """The op's arguments, and a sentence for every modifier that becomes a map of scores."""
    mapped: list[Any] = []
    found = slots(lowered, packed, backend, mapped)
    names = [type(m).__name__ for m in mapped if not isinstance(m, ElementwiseMask)]
    said = [f"{name} takes its dense form, a map of scores" for name in dict.fromkeys(names)]
    if packed is not None and found["path_row"] is None and as_batch(lowered, packed, backend):
        said.append("the sequences become a padded batch, with a mask of it")
    return found, said


def seen_by(modifier: Any, q: Tensor, k: Tensor, longest: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The q and k that a modifier must fit: of packed sequences all tokens, or the longest one."""
    return (q, k) if longest is None or isinstance(modifier, PER_TOKEN) else longest


def slots(
    lowered: dict[str, Any], packed: Packed | None, backend: str | None, mapped: list[Any] | None = None
) -> dict[str, Any]:
    """The op's arguments by name. Rotations, unit vectors and further keys are made here; a modifier that has no slot, or
    whose slot is taken, or that meets further keys, takes its dense form. `mapped` receives them. Packed sequences whose queries
    name keys become a padded batch."""
    q, k, v, scale = (lowered[name] for name in ("q", "k", "v", "scale"))
    acc = torch.promote_types(q.dtype, torch.float32)
    found: dict[str, Any] = dict.fromkeys((*TENSORS, *OPTIONS))
    found |= {"sink": lowered["sink"], "seed": lowered["seed"], "normalizer": lowered["normalizer"]}
    found |= {"dropout_p": lowered["dropout_p"], "topk": lowered["topk"] or 0, "rule": "none", "path_width": 0}
    found |= {"path_transposed": False, "causal": False, "offset": 0, "max_q": 0, "max_k": 0}
    found |= {"policy_eps": 0.0, "policy_diagonal": False} | dict.fromkeys(tables.GRID, 0)
    extra = lowered["extra_kv"]
    longest = None
    if packed is not None:
        longest = packed.longest
        found |= {"cu_q": packed.cu_q, "cu_k": packed.cu_k, "max_q": longest[0].shape[1], "max_k": longest[1].shape[1]}
    biases, cpu = lowered["biases"], on_cpu(q, backend)
    context = positions.chosen(biases) if biases else None
    if context is not None:
        positions.place(
            found, context, q, k, v is not None, 0 if extra is None else extra[0].shape[1], longest is not None
        )
        place = next(i for i, b in enumerate(biases) if b is context)  # it may be there twice
        biases = (*biases[:place], *biases[place + 1 :])
    native = extra is None
    axes = (
        native and cpu and lowered["rope"] is None and lowered["cosine"] is None and longest is None
    )  # q is what tables meet
    at = Place(q, k, longest, extra is not None, native, axes, [] if mapped is None else mapped)
    dense, of_keys, of_weights = _place_biases(found, biases, at)
    seen, words = _place_masks(found, lowered["masks"], at, 0 if extra is None else extra[0].shape[1], backend)
    if packed is None:
        dense, apart = _keys_apart(dense)
        seen, hidden = _keys_apart(seen, len(words))
        of_keys += apart + [torch.zeros_like(t, dtype=acc).masked_fill(~t, -math.inf) for t in hidden]
    factors: list[Tensor] = []
    early: dict[str, list[Tensor]] = {"logit": [], "prob": []}  # in front of a mixture of heads
    mixtures = next((m for m in lowered["modulations"] if isinstance(m, TalkingHeads)), None)
    mixed = [] if mixtures is None else _mixes(mixtures)
    ahead = mixtures is not None
    for m in lowered["modulations"]:
        if m is mixtures:
            found |= {name: getattr(m, name) for name in MIXTURES}
            ahead = False
            continue
        if isinstance(m, Policy):
            found |= {"policy": m.keep, "policy_eps": float(m.eps), "policy_diagonal": m.keep_diagonal}
            continue
        soft = isinstance(m, SoftCausal)
        if m.place in mixed and (ahead or soft):
            early[m.place].append(at.dense(m).to(acc))
        elif not (native and (tables.place(found, m) or (not mixed and _place_ratio(found, m, acc)))):
            (factors if m.place == "logit" else of_weights).append(at.dense(m).to(acc))
    rope = lowered["rope"]
    if rope is not None:
        q, k = rope.turn(q, rope.q_range), rope.turn(k, rope.k_range)
    if v is None:
        v = k[..., :1]  # what the statistics do not see
    if extra is not None:
        values = k.new_zeros(extra[0].shape)[..., : v.shape[3]] if extra[1] is None else extra[1]
        more, own = extra[0].shape[1], k.shape[1] if longest is None else longest[1].shape[1]
        dense = [wider(t, own, more, 0.0) for t in dense]
        factors, of_weights = ([wider(t, own, more, 1.0) for t in each] for each in (factors, of_weights))
        early = {name: [wider(t, own, more, 1.0) for t in each] for name, each in early.items()}
        seen = [wider(t, own, more, True) for t in seen]
        k, v = (
            torch.cat((t, e.expand(len(q), -1, -1, -1)), 1) for t, e in zip((k, v), (extra[0], values), strict=True)
        )
        of_keys = [wider(t, k.shape[1] - more, more, 0.0) for t in of_keys]
        if longest is not None:  # in front of the own keys, where the columns of all sequences meet
            places = keys_of_all(found["cu_k"], own=k.shape[1] - more, more=more)
            k, v, of_keys = k[:, places], v[:, places], [t[..., places] for t in of_keys]
            if found["position_k"] is not None:
                found["position_k"] = found["position_k"][:, places]
            dense, seen, factors, of_weights = (
                [t.roll(more, -1) for t in x] for x in (dense, seen, factors, of_weights)
            )
            early = {name: [t.roll(more, -1) for t in each] for name, each in early.items()}
            found["cu_k"] = found["cu_k"] + more * torch.arange(len(found["cu_k"]), device=k.device, dtype=torch.int32)
            found["max_k"] += more
    if lowered["cosine"] is not None:
        cosine = lowered["cosine"]
        q, k = (_unit(t, acc, cosine.eps) for t in (q, k))
        found["factor"] = cosine.logit_scale.reshape(-1).to(acc).clamp(max=cosine.max).exp()
    elif isinstance(scale, Tensor):
        found["factor"] = scale.to(acc).expand(q.shape[2])
    found |= {"q": q, "k": k, "v": v, "bias": joined(dense, torch.add), "key_bias": joined(of_keys, torch.add)}
    bits = joined(words, torch.bitwise_and)
    if seen and bits is not None:
        seen, bits = [*seen, unpacked(bits, k.shape[1])], None
    found |= {"mask": joined(seen, torch.logical_and) if bits is None else bits}
    found |= {"scale": 1.0 if found["factor"] is not None else float(scale)}
    found |= {"gain": joined(factors, torch.mul), "weight": joined(of_weights, torch.mul)}
    if mixed:
        found |= {"early_gain": joined(early["logit"], torch.mul), "early_weight": joined(early["prob"], torch.mul)}
    if "key_mean" in lowered["stats"]:
        found["query_weight"] = shares(lowered["query_weight"], q, found["cu_q"])
    elif numbered(lowered):
        found["query_weight"] = ranks(q, found["cu_q"])
    if packed is None or not as_batch(lowered, packed, backend):
        return found
    if packed.key_index is not None:
        return batch_of_named(found, packed.key_index, 0 if extra is None else extra[0].shape[1])
    return padded(found)[0] if found["path_row"] is None else batch_of_alike(found)


def as_batch(lowered: dict[str, Any], packed: Packed, backend: str | None) -> bool:
    """Whether the sequences are a batch in the kernels: those of a path, which are alike, and padded ones whose queries name keys,
    or, but on CPUs, that have contextual positions without Policy, whose share follows the number of keys."""
    kinds = {type(m) for m in (*lowered["biases"], *lowered["modulations"])}
    context = ContextualPosition in kinds and Policy not in kinds and not on_cpu(lowered["q"], backend)
    return packed.key_index is not None or PolylinePath in kinds or context


def keys_of_all(cu: Tensor, own: int, more: int) -> Tensor:
    """Where each key of the packed sequences lies, `more` further ones before the own ones of each: below `own` its own place,
    from there on one of the further keys."""
    count = len(cu) - 1
    i = torch.arange(own + count * more, device=cu.device)
    s = torch.bucketize(i, (cu + more * torch.arange(count + 1, device=cu.device))[1:], right=True)
    inside = i - cu[s] - s * more  # from 0 in its sequence
    return torch.where(inside < more, own + inside, i - (s + 1) * more)


def _unit(x: Tensor, acc: torch.dtype, eps: float) -> Tensor:
    """Unit vectors; a row that is not finite stays as it is, and gets no gradient here."""
    whole = x.isfinite().all(-1, keepdim=True)
    unit = normalize(x.to(acc).masked_fill(~whole, 0.0), eps).to(x.dtype)
    return torch.where(whole, unit, x.detach())


def _place_biases(found: dict[str, Any], biases: Any, at: Place) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Fills the slots of the typed biases; returns the dense biases, those of the keys alone, and factors of the weights."""
    dense, of_keys, of_weights = [], [], []
    relative: list[Any] = []
    of_rows: list[RowBias] = []
    longest, extended = at.longest, at.extended
    for b in biases:
        if isinstance(b, Tensor):
            dense.append(b)
        elif isinstance(b, KeyBias):
            of_keys.append(b.dense(at.q, at.k))
        elif isinstance(b, RowBias) and not extended:
            of_rows.append(b)
        elif not extended and _adds_per_query(b, at) and (not relative or _keys_of(b) == _keys_of(relative[0])):
            relative.append(b)
        elif at.native and tables.place(found, b):
            pass
        elif isinstance(b, ManhattanDecay) and b.place == "prob":
            of_weights.append(at.dense(b).exp())
        elif isinstance(b, PolylinePath) and found["path_row"] is None and not extended:
            found |= {"path_row": b.row.flatten(1, 2), "path_col": b.col.flatten(1, 2)}
            found |= {"path_width": b.row.shape[2], "path_transposed": b.transpose}
        elif isinstance(b, EuclideanDistance) and found["slope"] is None and not extended:
            found |= {"slope": b.slope, "q_xy": b.q_xy, "k_xy": b.k_xy}
        elif isinstance(b, EuclideanDistance) and found["q_xy"] is b.q_xy and found["k_xy"] is b.k_xy:
            found["slope"] = found["slope"] + b.slope
        else:
            _refuse_second(b, longest)
            dense.append(at.dense(b))
    if relative or (of_rows and longest is not None):
        of_rows = _place_relative(found, relative, of_rows, bool(dense), at)
    if of_rows and dense:
        at.mapped.extend(of_rows)
    return dense + [b.dense(at.q, at.k) for b in of_rows], of_keys, of_weights


def _adds_per_query(b: Any, at: Place) -> bool:
    """Whether the bias is a sum of what each query adds to the rows and to the columns of the keys."""
    alike = isinstance(b, ManhattanDecay) and b.place == "logit" and at.longest is None  # else a table of offsets
    return alike or isinstance(b, DecomposedRelativePosition)


def _keys_of(b: Any) -> tuple[int, int]:
    return tuple(b.grid if isinstance(b, ManhattanDecay) else b.k_grid)


def _place_relative(
    found: dict[str, Any], relative: list[Any], of_rows: list[RowBias], beside: bool, at: Place
) -> list[RowBias]:
    """Fills the slots of what each query adds with the sum of all, or with the tables of the one; `beside`: there are maps.
    Returns the biases of rows that found no place there."""
    one = relative[0] if len(relative) == 1 and isinstance(relative[0], DecomposedRelativePosition) else None
    if one is not None and at.axes and not (of_rows and beside) and _place_axes(found, one):
        return of_rows
    acc = torch.promote_types(at.q.dtype, torch.float32)
    places = () if at.longest is None else (places_inside(found["cu_q"], at.q.shape[1]),)
    parts = [b.per_query(at.q, *places) for b in relative]
    rows = [p[0] for p in parts] + [b.vector.to(acc).transpose(1, 2)[..., None] for b in of_rows]
    columns = [p[1] for p in parts] or [at.q.new_zeros((), dtype=acc).expand(1, at.q.shape[1], 1, found["max_k"])]
    found["rel_y"], found["rel_x"] = (functools.reduce(torch.add, _sharded.alike(t)) for t in (rows, columns))
    return []


def _keys_apart(parts: list[Tensor], beside: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Of several tensors, with the number `beside` them, those that differ between queries, and those of the keys alone, with four
    axes: together they would be a map of every sample and head."""
    if len(parts) + beside < 2:
        return parts, []
    alone = [t.dim() > 0 and t.shape[-1] > 1 and (t.dim() == 1 or t.shape[-2] == 1) for t in parts]
    apart = [t[(None,) * (4 - t.dim())] for t, of_keys in zip(parts, alone, strict=True) if of_keys]
    return [t for t, of_keys in zip(parts, alone, strict=True) if not of_keys], apart


def _place_axes(found: dict[str, Any], b: DecomposedRelativePosition) -> bool:
    """Whether the tables of a modifier whose queries and keys share the grid of the call went into their slots."""
    geometry = dict(zip(tables.GRID, (*b.k_grid, 0, 1), strict=True))
    if b.q_grid != b.k_grid or (found["grid_height"] and any(found[n] != geometry[n] for n in geometry)):
        return False
    found |= geometry | {"rel_y": b.rel_h, "rel_x": b.rel_w}
    return True


def _mixes(m: TalkingHeads) -> list[str]:
    """The places in which heads mix."""
    pairs = (("logit", m.pre_weight, m.pre_bias), ("prob", m.post_weight, m.post_bias))
    return [place for place, weight, offset in pairs if weight is not None or offset is not None]


def _place_ratio(found: dict[str, Any], modifier: Any, acc: torch.dtype) -> bool:
    """Whether the modifier is a SoftCausal, whose ratio multiplies those before it."""
    if not isinstance(modifier, SoftCausal):
        return False
    ratio, before = modifier.ratio, found["later_ratio"]
    ratio = ratio.reshape(()) if isinstance(ratio, Tensor) else torch.full((), ratio, dtype=acc)
    found["later_ratio"] = ratio if before is None else before.to(acc) * ratio.to(acc)
    return True


def _refuse_second(modifier: Any, longest: Any) -> None:
    """Of packed sequences there is no dense form of what belongs to tokens, or meets them."""
    if longest is not None and isinstance(modifier, (*PER_TOKEN, PolylinePath, ContextualPosition)):
        raise NotImplementedError(
            f"attention_varlen: {type(modifier).__name__} has no form for packed sequences beside another modifier of its kind, "
            "or beside extra_kv"
        )


def _place_masks(
    found: dict[str, Any], masks: Any, at: Place, more: int, backend: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Fills the slots of the typed masks; returns the dense ones, and the bits [B, 1, Nq, words] of others, which show the `more`
    further keys."""
    seen, words = [], []
    extended = at.extended
    for m in masks:
        if isinstance(m, Causal) and not extended:
            found["offset"] = min(found["offset"], m.offset) if found["causal"] else m.offset
            found["causal"] = True
        elif isinstance(m, Segments) and found["rule"] == "none" and not extended:
            found |= {"q_ids": m.q_ids.to(torch.int32), "k_ids": m.k_ids.to(torch.int32), "allow": m.allow}
            found["rule"] = "equal" if m.allow is None else "table"
        elif isinstance(m, BlockCausal) and found["rule"] == "none" and not extended:
            found |= {"q_ids": m.q_levels.to(torch.int32), "k_ids": m.k_levels.to(torch.int32), "rule": "upto"}
        elif isinstance(m, FromLogits):
            words.append(mask_from_logits(m, at.q.shape[1], at.k.shape[1] + more, backend=backend)[:, None])
        else:
            _refuse_second(m, at.longest)
            seen.append(m if isinstance(m, Tensor) else at.dense(m))
    return seen, words


def joined(parts: list[Tensor], join: Any) -> Tensor | None:
    """All parts in one tensor of four axes, None for no part. What repeats itself along samples and heads is joined once."""
    if not parts:
        return None
    parts = _sharded.alike(parts)
    parts = [t.clone(memory_format=torch.contiguous_format) if _own(t) else t for t in parts]
    if len(parts) > 1:
        parts = [once(t, t.dim() - 2) for t in parts]
    if len(parts) > 1 and parts[0].is_floating_point():
        wide = torch.promote_types(functools.reduce(torch.promote_types, [t.dtype for t in parts]), torch.float32)
        parts = [t.to(wide) for t in parts]
    whole = functools.reduce(join, parts)
    return whole[(None,) * (4 - whole.dim())]


def _own(t: Tensor) -> bool:
    """Whether t repeats itself and is a leaf, which gets a gradient for every place where a view gets equal shares of one."""
    return t.requires_grad and t.is_leaf and once_each(t, t.dim()).shape != t.shape


def shares(weight: Tensor | None, q: Tensor, cu: Tensor | None) -> Tensor:
    """[B, Nq, H]: the weights of the queries over their sum, that of a packed sequence if there are; 0 where that is 0."""
    acc = torch.promote_types(q.dtype, torch.float32)
    w = q.new_ones((1, 1, 1), dtype=acc) if weight is None else weight.to(acc)
    w = (w[..., None] if w.dim() == 2 else w).expand(q.shape[:3])
    if cu is None:
        total = w.sum(1, keepdim=True)
    else:
        place = torch.bucketize(torch.arange(q.shape[1], device=q.device), cu[1:], right=True).clamp(max=len(cu) - 2)
        total = w.new_zeros((1, len(cu) - 1, q.shape[2])).index_add(1, place, w)[:, place]
    return torch.where(total == 0, 0.0, w / total.masked_fill(total == 0, 1.0))


def numbered(lowered: dict[str, Any]) -> bool:
    """Whether the call asks which query each key goes to."""
    return "row" in lowered["stats"] and lowered["normalizer"] == "argmax_q"


def ranks(q: Tensor, cu: Tensor | None) -> Tensor:
    """[B, Nq, H]: the places of the queries in their sequence, from 1 on; as weights of queries they make "key_mean" the place of
    the one that a key goes to, 0 for none."""
    token = torch.arange(q.shape[1], device=q.device) if cu is None else places_inside(cu, q.shape[1])
    places = (token + 1).to(torch.promote_types(q.dtype, torch.float32))
    return _sharded.like(places[None, :, None].expand(q.shape[:3]), q)
