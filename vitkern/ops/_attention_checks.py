"""The argument checks of attention: what shapes, dtypes and devices decide, in sentences."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern import backends, bias, mask, modulation
from vitkern.cosine import CosineScore
from vitkern.ops import _checks
from vitkern.rope import LAYOUTS, Rope
from vitkern.value import DepthwiseValue

NAME = "attention"
LARGEST = 2**31 - 1
NORMALIZERS = ("softmax", "sigmoid", "relu", "none", "argmax_q", "argmax_k")
STATS = ("lse", "key_mean", "row", "logits_mean", "probs", "logits", "index")
BIASES = (
    bias.RelativePosition,
    bias.DecomposedRelativePosition,
    bias.KeyBias,
    bias.RowBias,
    bias.ManhattanDecay,
    bias.EuclideanDistance,
    bias.PolylinePath,
    bias.ContextualPosition,
)
MASKS = (mask.Causal, mask.NoSelf, mask.Segments, mask.BlockCausal, mask.FromLogits)
MODULATIONS = (
    modulation.GaussianMixture,
    modulation.ElementwiseMask,
    modulation.SoftCausal,
    modulation.TalkingHeads,
    modulation.Policy,
)


def tensors(q: Any, k: Any, v: Any) -> None:
    """q [B, Nq, H, D], k [B, Nk, Hk, D], v [B, Nk, Hk, Dv] or None."""
    autocast = isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if name == "v" and t is None:
            continue
        _checks.tensor(NAME, name, t)
        _checks.floating(NAME, name, t)
        if t.dim() != 4:
            raise ValueError(f"{NAME}: {name} must have shape [B, tokens, heads, head_dim], got {list(t.shape)}")
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{NAME}: {name} must have the batch of q ({q.shape[0]}), got {t.shape[0]}")
        _checks.on_device(NAME, name, t, "q", q.device)
        if t.dtype != q.dtype and not autocast:
            raise TypeError(f"{NAME}: {name} must have the dtype of q ({q.dtype}), got {t.dtype}")
        if not 1 <= t.shape[3] <= 256:
            raise ValueError(f"{NAME}: the head size of {name} must be 1 to 256, got {t.shape[3]}")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{NAME}: the heads of k must divide the heads of q ({q.shape[2]}), got {k.shape[2]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{NAME}: k must have the head size of q ({q.shape[3]}), got {k.shape[3]}")
    if v is not None and v.shape[1:3] != k.shape[1:3]:
        raise ValueError(
            f"{NAME}: v must have the tokens and heads of k {list(k.shape[1:3])}, got {list(v.shape[1:3])}"
        )


def modifiers(name: str, given: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """One, several or none, as a tuple."""
    if given is None:
        return ()
    each = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for entry in each:
        if not isinstance(entry, (Tensor, *kinds)):
            wanted = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(
                f"{NAME}: {name} must be a tensor, one of {wanted}, or a list of these, got {type(entry).__name__}"
            )
    return each


def scores(name: str, t: Tensor, shape: tuple[int, ...], extra: int = 0) -> None:
    """t broadcasts to [B, H, Nq, Nk]; `extra` further columns are allowed."""
    sizes = list(zip(reversed(t.shape), reversed(shape), strict=False))
    fits = t.dim() <= 4 and all(n in (1, want) for n, want in sizes)
    if not fits and extra and t.dim() <= 4 and t.shape[-1] == shape[-1] + extra:
        fits = all(n in (1, want) for n, want in sizes[1:])
    if not fits:
        raise ValueError(f"{NAME}: {name} must broadcast to [B, H, Nq, Nk] = {list(shape)}, got {list(t.shape)}")


def fields(name: str, modifier: Any, device: torch.device) -> None:
    """The tensors of a modifier are on the device of q; ids and grids are what they must be."""
    if torch.compiler.is_compiling():
        return  # torch 2.10 cannot trace the fields of a frozen dataclass
    kind = type(modifier).__name__
    for field, value in vars(modifier).items():
        if isinstance(value, Tensor):
            _checks.on_device(NAME, f"{name} {kind}.{field}", value, "q", device)


def per_query(name: str, t: Tensor, q: Tensor, side: int) -> None:
    fits = t.dim() == 4 and t.shape[0] in (1, q.shape[0]) and t.shape[1] == q.shape[1] and t.shape[2] in (1, q.shape[2])
    if not fits or t.shape[3] != side:
        want = ["B or 1", q.shape[1], "H or 1", side]
        raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")


def grid(name: str, kind: str, sides: Any, tokens: int, of: str, axes: int | None = None) -> None:
    wrong = not isinstance(sides, (list, tuple)) or len(sides) < 1 or (axes is not None and len(sides) != axes)
    if wrong or math.prod(sides) != tokens:
        raise ValueError(f"{NAME}: {name} {kind}.grid must hold the {tokens} tokens of {of}, got {sides!r}")


def check_bias(b: Any, q: Tensor, k: Tensor, extra: int, keys: int) -> None:
    """`keys`: of the longest sequence, if q and k are packed."""
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if isinstance(b, Tensor):
        _checks.parameter(NAME, "bias", b, q.device)
        scores("bias", b, shape, extra)
        return
    kind = type(b).__name__
    fields("bias", b, q.device)
    if isinstance(b, bias.RelativePosition):
        _relative(b, q, k)
    if isinstance(b, bias.ManhattanDecay):
        grid("bias", kind, b.grid, q.shape[1], "q", 2)
        grid("bias", kind, b.grid, k.shape[1], "k", 2)
        _checks.shape(NAME, f"bias {kind}.rate", b.rate, (q.shape[2],), "[H]")
        if b.place not in ("logit", "prob"):
            raise ValueError(f"{NAME}: bias {kind}.place must be 'logit' or 'prob', got {b.place!r}")
    if isinstance(b, bias.DecomposedRelativePosition):
        grid("bias", kind, b.k_grid, keys, "k", 2)
        if b.q_grid is None:
            for name, side in zip(("rel_h", "rel_w"), b.k_grid, strict=True):
                per_query(f"bias {kind}.{name}", getattr(b, name), q, side)
        else:
            grid("bias", kind, b.q_grid, q.shape[1], "q")
            for name, a, c in zip(("rel_h", "rel_w"), b.q_grid, b.k_grid, strict=True):
                want = (2 * max(a, c) - 1, q.shape[3])
                _checks.shape(NAME, f"bias {kind}.{name}", getattr(b, name), want, "[2 max(query, key) - 1, D]")
    if isinstance(b, bias.EuclideanDistance):
        _checks.shape(NAME, f"bias {kind}.slope", b.slope, (q.shape[2],), "[H]")
        for name, of in (("q_xy", q), ("k_xy", k)):
            t = getattr(b, name)
            if t.dim() != 3 or t.shape[0] not in (1, q.shape[0]) or t.shape[1:] != (of.shape[1], 2):
                want = ["B or 1", of.shape[1], 2]
                raise ValueError(f"{NAME}: bias {kind}.{name} must have shape {want}, got {list(t.shape)}")
    if isinstance(b, bias.PolylinePath):
        grid("bias", kind, b.row.shape[1:3], q.shape[1], "q")
        grid("bias", kind, b.row.shape[1:3], k.shape[1], "k")
        _checks.shape(NAME, f"bias {kind}.col", b.col, tuple(b.row.shape), "of row")
    vectors = {bias.KeyBias: (k, "Nk"), bias.RowBias: (q, "Nq")}
    if type(b) in vectors:
        of, text = vectors[type(b)]
        more = extra if isinstance(b, bias.KeyBias) else 0
        fits = b.vector.dim() == 3 and b.vector.shape[0] in (1, q.shape[0]) and b.vector.shape[1] in (1, q.shape[2])
        if not fits or b.vector.shape[2] not in (of.shape[1], of.shape[1] + more):
            raise ValueError(
                f"{NAME}: bias {kind}.vector must have shape [B or 1, H or 1, {text} = {of.shape[1]}], "
                f"got {list(b.vector.shape)}"
            )


def _relative(b: Any, q: Tensor, k: Tensor) -> None:
    heads = q.shape[2]
    if b.table.dim() != 2 or b.table.shape[1] != heads:
        raise ValueError(f"{NAME}: bias.table must have shape [rows, heads={heads}], got {list(b.table.shape)}")
    if b.sign not in bias.SIGNS:
        raise ValueError(f"{NAME}: bias.sign must be one of {', '.join(bias.SIGNS)}, got {b.sign!r}")
    if b.index is not None:
        _checks.shape(NAME, "bias.index", b.index, (q.shape[1], k.shape[1]), "[Nq, Nk]")
        if backends.may_read(b.index) and b.index.numel():
            low, high = int(b.index.min()), int(b.index.max())
            if low < 0 or high >= b.table.shape[0]:
                raise ValueError(
                    f"{NAME}: bias.index must lie in [0, {b.table.shape[0]}), the rows of the table, "
                    f"got entries from {low} to {high}"
                )
        return
    if b.grid is None:
        raise ValueError(f"{NAME}: bias RelativePosition must have an index or a grid, got neither")
    grid("bias", "RelativePosition", b.grid, k.shape[1] - b.prefix_tokens, "k without the prefix")
    coarse = [-(-n // b.q_stride) for n in b.grid]
    grid("bias", "RelativePosition", coarse, q.shape[1] - b.prefix_tokens, "q without the prefix")
    rows = bias.table_rows(tuple(b.grid), b.sign, b.prefix_tokens)
    if b.table.shape[0] != rows:
        raise ValueError(
            f"{NAME}: bias.table must have {rows} rows for the grid {list(b.grid)} with sign={b.sign!r} and "
            f"prefix_tokens={b.prefix_tokens}, got {b.table.shape[0]}"
        )


def check_mask(m: Any, q: Tensor, k: Tensor) -> None:
    if isinstance(m, Tensor):
        if m.dtype != torch.bool:
            raise TypeError(f"{NAME}: mask must be bool (True may attend; what is added is a bias), got {m.dtype}")
        _checks.on_device(NAME, "mask", m, "q", q.device)
        scores("mask", m, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
        return
    kind = type(m).__name__
    fields("mask", m, q.device)
    if isinstance(m, mask.Causal) and not -LARGEST <= _checks.integer(NAME, "mask Causal.offset", m.offset) <= LARGEST:
        raise ValueError(f"{NAME}: mask Causal.offset must lie in [-2^31, 2^31), got {m.offset}")
    pairs = {mask.Segments: ("q_ids", "k_ids"), mask.BlockCausal: ("q_levels", "k_levels")}.get(type(m), ())
    for name, of in zip(pairs, (q, k), strict=False):
        ids = getattr(m, name)
        _checks.integers(NAME, f"mask {kind}.{name}", ids)
        if ids.dim() != 2 or ids.shape[0] not in (1, q.shape[0]) or ids.shape[1] != of.shape[1]:
            raise ValueError(
                f"{NAME}: mask {kind}.{name} must have shape [B or 1, {of.shape[1]}], got {list(ids.shape)}"
            )
        if ids.dtype == torch.int64 and backends.may_read(ids) and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < -LARGEST or high > LARGEST:
                raise ValueError(f"{NAME}: mask {kind}.{name} must be numbers of 32 bits, got {low} to {high}")
    if isinstance(m, mask.Segments) and m.allow is not None:
        if m.allow.dtype != torch.bool or m.allow.dim() != 2:
            raise ValueError(
                f"{NAME}: mask Segments.allow must be a bool table, got {m.allow.dtype} {list(m.allow.shape)}"
            )
        for name, ids, most in (("q_ids", m.q_ids, m.allow.shape[0]), ("k_ids", m.k_ids, m.allow.shape[1])):
            if backends.may_read(ids) and ids.numel() and int(ids.max()) >= most:
                raise ValueError(
                    f"{NAME}: mask Segments.{name} must be below {most}, a side of allow, got {int(ids.max())}"
                )
    if isinstance(m, mask.FromLogits):
        _from_logits(m, q, k)


def _from_logits(m: Any, q: Tensor, k: Tensor) -> None:
    if m.empty not in mask.EMPTY:
        raise ValueError(f"{NAME}: mask FromLogits.empty must be 'full' or 'none', got {m.empty!r}")
    (first, last), (left, right) = m.rows or (0, q.shape[1]), m.cols or (0, k.shape[1])
    inside = 0 <= first <= last <= q.shape[1] and 0 <= left <= right <= k.shape[1]
    if not inside or right - left != math.prod(m.size):
        raise ValueError(
            f"{NAME}: mask FromLogits.size must hold the keys of cols ({right - left}) inside [0, {k.shape[1]}), got {m.size!r}"
        )
    if m.logits.dim() != 4 or m.logits.shape[:2] != (q.shape[0], last - first):
        raise ValueError(
            f"{NAME}: mask FromLogits.logits must have shape [B, Q, h, w] = {[q.shape[0], last - first, 'h', 'w']}, "
            f"got {list(m.logits.shape)}"
        )
    _checks.floating(NAME, "mask FromLogits.logits", m.logits)
    if m.open_rows is not None:
        _checks.flags(NAME, "mask FromLogits.open_rows", m.open_rows, tuple(m.logits.shape[:2]), "q", q.device)


def check_modulation(m: Any, q: Tensor, k: Tensor, normalizer: str) -> None:
    if isinstance(m, Tensor):
        raise TypeError(f"{NAME}: modulation must be typed, such as modulation.ElementwiseMask(weight), got a tensor")
    kind, heads = type(m).__name__, q.shape[2]
    fields("modulation", m, q.device)
    if isinstance(m, modulation.GaussianMixture):
        for of, text in ((q, "q"), (k, "k")):
            grid("modulation", kind, m.grid, of.shape[1] - m.prefix_tokens, f"{text} without the prefix")
        if m.mode not in modulation.MODES:
            raise ValueError(f"{NAME}: modulation {kind}.mode must be 'exact' or 'published', got {m.mode!r}")
        for name in ("sigma", "alpha"):
            _checks.shape(NAME, f"modulation {kind}.{name}", getattr(m, name), (m.sigma.shape[0], heads), "[K, H]")
    if isinstance(m, modulation.ElementwiseMask):
        scores(f"modulation {kind}.weight", m.weight, (q.shape[0], heads, q.shape[1], k.shape[1]))
        if m.place not in ("logit", "prob"):
            raise ValueError(f"{NAME}: modulation {kind}.place must be 'logit' or 'prob', got {m.place!r}")
    if isinstance(m, modulation.TalkingHeads):
        for name in ("pre", "post"):
            weight, offset = getattr(m, f"{name}_weight"), getattr(m, f"{name}_bias")
            if weight is not None:
                _checks.shape(NAME, f"modulation {kind}.{name}_weight", weight, (heads, heads), "[H, H]")
            if offset is not None:
                _checks.shape(NAME, f"modulation {kind}.{name}_bias", offset, (heads,), "[H]")
    if isinstance(m, modulation.Policy):
        if normalizer != "softmax":
            raise ValueError(f"{NAME}: modulation Policy must go with normalizer='softmax', got {normalizer!r}")
        _checks.floating(NAME, f"modulation {kind}.keep", m.keep)
        if m.keep.dim() != 2 or m.keep.shape[0] not in (1, q.shape[0]) or m.keep.shape[1] != k.shape[1]:
            raise ValueError(
                f"{NAME}: modulation Policy.keep must have shape [B or 1, Nk = {k.shape[1]}], got {list(m.keep.shape)}"
            )


def check_policy(modulations: Any, sink: Any, extra_kv: Any, stats: Any) -> None:
    """A policy stands in place of the softmax: what belongs to that has no meaning beside it."""
    count = sum(isinstance(m, modulation.Policy) for m in modulations)
    if count > 1:
        raise ValueError(f"{NAME}: modulation must hold at most one Policy, got {count}")
    if count and (sink is not None or extra_kv is not None or "lse" in stats):
        raise ValueError(
            f"{NAME}: modulation Policy goes neither with sink nor with extra_kv nor with return_stats 'lse'"
        )


def check_rope(rope: Any, q: Tensor, k: Tensor) -> None:
    if rope is None:
        return
    if not isinstance(rope, Rope):
        raise TypeError(f"{NAME}: rope must be a vitkern.Rope or None, got {type(rope).__name__}")
    fields("rope", rope, q.device)
    if rope.layout not in LAYOUTS:
        raise ValueError(f"{NAME}: rope.layout must be 'interleaved' or 'half', got {rope.layout!r}")
    if rope.cos.dim() != 4 or rope.cos.shape != rope.sin.shape or 2 * rope.cos.shape[3] > q.shape[3]:
        raise ValueError(
            f"{NAME}: rope.cos and rope.sin must have one shape [B or 1, n, H or 1, R/2] with R at most {q.shape[3]}, "
            f"got {list(rope.cos.shape)} and {list(rope.sin.shape)}"
        )
    for name, among, of in (("q_range", rope.q_range, q), ("k_range", rope.k_range, k)):
        first, last = among or (0, of.shape[1])
        if not 0 <= first <= last <= of.shape[1] or (last - first) % max(rope.cos.shape[1], 1):
            raise ValueError(
                f"{NAME}: rope.{name} must be tokens of [0, {of.shape[1]}), a multiple of the {rope.cos.shape[1]} angles, "
                f"got {[first, last]}"
            )
        heads = rope.cos.shape[2]
        if rope.cos.shape[0] not in (1, of.shape[0]):
            raise ValueError(f"{NAME}: rope.cos must have the batch of q ({of.shape[0]}) or 1, got {rope.cos.shape[0]}")
        if heads not in (1, of.shape[2]):
            raise ValueError(f"{NAME}: rope.cos must have 1 head or those it turns ({of.shape[2]}), got {heads}")


def check_key_index(index: Any, q: Tensor, k: Tensor, normalizer: str, stats: Any, topk: Any) -> None:
    _checks.integers(NAME, "key_index", index)
    _checks.on_device(NAME, "key_index", index, "q", q.device)
    if index.dim() != 3 or index.shape[0] not in (1, q.shape[0]) or index.shape[1] != q.shape[1]:
        raise ValueError(f"{NAME}: key_index must have shape [B or 1, Nq = {q.shape[1]}, K], got {list(index.shape)}")
    if backends.may_read(index) and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < k.shape[1]:
        raise ValueError(
            f"{NAME}: key_index must lie in [-1, {k.shape[1]}), the keys, got {int(index.min())} to {int(index.max())}"
        )
    if topk is not None or (normalizer != "softmax" and stats):
        raise NotImplementedError(f"{NAME}: key_index goes neither with topk nor with statistics without softmax")


def check_lepe(lepe: Any, q: Tensor, v: Any) -> None:
    if lepe is None:
        return
    if not isinstance(lepe, DepthwiseValue):
        raise TypeError(f"{NAME}: lepe must be a vitkern.DepthwiseValue or None, got {type(lepe).__name__}")
    if v is None or v.shape[1] != q.shape[1]:
        raise ValueError(f"{NAME}: lepe must go with values of the queries' own tokens ({q.shape[1]})")
    fields("lepe", lepe, q.device)
    grid("lepe", "DepthwiseValue", lepe.grid, v.shape[1] - lepe.prefix_tokens, "v without the prefix")
    heads, width = v.shape[2:]
    shape = tuple(lepe.weight.shape)
    if (
        len(shape) != 4
        or shape[0] not in (width, heads * width)
        or shape[1] != 1
        or not (shape[2] % 2 and shape[3] % 2)
    ):
        raise ValueError(
            f"{NAME}: lepe.weight must have shape [{heads * width} or {width}, 1, kh, kw] with odd kh and kw, got {list(shape)}"
        )


def check_scale(scale: Any, cosine: Any, q: Tensor) -> Any:
    """The factor of step 2: a float or a tensor."""
    if cosine is not None:
        if not isinstance(cosine, CosineScore):
            raise TypeError(f"{NAME}: cosine must be a CosineScore or None, got {type(cosine).__name__}")
        if scale is not None:
            raise ValueError(f"{NAME}: scale must be None with cosine (the factor is exp(logit_scale)), got {scale!r}")
        _checks.parameter(NAME, "cosine.logit_scale", cosine.logit_scale, q.device)
        if cosine.logit_scale.numel() != q.shape[2]:
            raise ValueError(
                f"{NAME}: cosine.logit_scale must have one element per head ({q.shape[2]}), "
                f"got {list(cosine.logit_scale.shape)}"
            )
        return 1.0
    if isinstance(scale, Tensor):
        _checks.parameter(NAME, "scale", scale, q.device)
        if tuple(scale.shape) not in ((), (q.shape[2],)):
            raise ValueError(
                f"{NAME}: scale must be a number or have shape [] or [H = {q.shape[2]}], got {list(scale.shape)}"
            )
        return scale
    return q.shape[3] ** -0.5 if scale is None else _checks.number(NAME, "scale", scale, what="a number or a tensor")


def check_rest(
    q: Tensor,
    k: Tensor,
    v: Any,
    normalizer: Any,
    sink: Any,
    extra_kv: Any,
    topk: Any,
    stats: Any,
    rows: Any,
    weight: Any,
) -> int:
    """The other options; returns how many keys extra_kv adds."""
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{NAME}: normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    for name in stats:
        if name not in STATS:
            raise ValueError(f"{NAME}: return_stats must hold names of {', '.join(STATS)}, got {name!r}")
    if "lse" in stats and normalizer != "softmax":
        raise ValueError(f"{NAME}: return_stats 'lse' must go with normalizer='softmax', got {normalizer!r}")
    if "index" in stats and normalizer != "argmax_k":
        raise ValueError(f"{NAME}: return_stats 'index' must go with normalizer='argmax_k', got {normalizer!r}")
    if ("row" in stats) != (rows is not None):
        raise ValueError(f"{NAME}: stat_rows must be given with return_stats 'row', and only then, got {rows!r}")
    for row in rows or ():
        if not -q.shape[1] <= _checks.integer(NAME, "stat_rows", row, what="ints") < q.shape[1]:
            raise ValueError(f"{NAME}: stat_rows must be queries of [0, {q.shape[1]}), got {row}")
    if sink is not None:
        if normalizer != "softmax":
            raise ValueError(f"{NAME}: sink must go with normalizer='softmax', got {normalizer!r}")
        _checks.parameter(NAME, "sink", sink, q.device)
        _checks.shape(NAME, "sink", sink, (q.shape[2],), "[H]")
    extra = 0
    if extra_kv is not None:
        if not isinstance(extra_kv, tuple) or len(extra_kv) != 2:
            raise ValueError(f"{NAME}: extra_kv must be a pair (k, v), got {type(extra_kv).__name__}")
        for name, t, like in (("extra_kv k", extra_kv[0], k), ("extra_kv v", extra_kv[1], v)):
            if like is None or t is None:
                if like is not t:
                    raise ValueError(f"{NAME}: extra_kv must have values exactly where v is given")
                continue
            _checks.parameter(NAME, name, t, q.device)
            if t.dim() != 4 or t.shape[0] not in (1, q.shape[0]) or t.shape[2:] != like.shape[2:]:
                want = ["B or 1", "E", *like.shape[2:]]
                raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")
        extra = extra_kv[0].shape[1]
    if topk is not None and not 1 <= _checks.integer(NAME, "topk", topk) <= k.shape[1] + extra:
        raise ValueError(f"{NAME}: topk must lie in [1, Nk] = [1, {k.shape[1] + extra}], got {topk}")
    if weight is not None:
        _checks.parameter(NAME, "query_weight", weight, q.device)
        if tuple(weight.shape) not in (tuple(q.shape[:2]), tuple(q.shape[:3])):
            raise ValueError(
                f"{NAME}: query_weight must have shape [B, Nq] = {list(q.shape[:2])} or [B, Nq, H], got {list(weight.shape)}"
            )
    return extra
