"""The argument checks of attention: all but the modifiers, in sentences."""

from typing import Any

from torch import Tensor

from vitkern import backends
from vitkern.cosine import CosineScore
from vitkern.ops import _checks
from vitkern.ops._attention_modifier_checks import NAME as NAME
from vitkern.ops._attention_modifier_checks import fields, grid, pair
from vitkern.rope import LAYOUTS, Rope
from vitkern.value import DepthwiseValue

NORMALIZERS = ("softmax", "sigmoid", "relu", "none", "argmax_q", "argmax_k")
STATS = ("lse", "key_mean", "row", "logits_mean", "probs", "logits", "index")


def tensors(q: Any, k: Any, v: Any) -> None:
    """q [B, Nq, H, D], k [B, Nk, Hk, D], v [B, Nk, Hk, Dv] or None."""
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
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


def names_of_stats(given: Any) -> tuple[str, ...]:
    """return_stats as a tuple of known names."""
    if not isinstance(given, (str, list, tuple)):
        raise TypeError(f"{NAME}: return_stats must be names of {', '.join(STATS)}, got {given!r}")
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in STATS:
            raise ValueError(f"{NAME}: return_stats must hold names of {', '.join(STATS)}, got {name!r}")
    return names


def check_rope(rope: Any, q: Tensor, k: Tensor) -> None:
    if rope is None:
        return
    if not isinstance(rope, Rope):
        raise TypeError(f"{NAME}: rope must be a vitkern.Rope or None, got {type(rope).__name__}")
    fields("rope", rope, q.device)
    if rope.layout not in LAYOUTS:
        raise ValueError(f"{NAME}: rope.layout must be 'interleaved' or 'half', got {rope.layout!r}")
    whole = rope.cos.dim() == 4 and rope.cos.shape == rope.sin.shape and rope.cos.shape[1] > 0
    if not whole or 2 * rope.cos.shape[3] > q.shape[3]:
        raise ValueError(
            f"{NAME}: rope.cos and rope.sin must have one shape [B or 1, n, H or 1, R/2] with R at most {q.shape[3]}, "
            f"got {list(rope.cos.shape)} and {list(rope.sin.shape)}"
        )
    for name, among, of in (("q_range", rope.q_range, q), ("k_range", rope.k_range, k)):
        first, last = pair(f"rope.{name}", (0, of.shape[1]) if among is None else among)
        if not 0 <= first <= last <= of.shape[1] or (last - first) % max(rope.cos.shape[1], 1):
            raise ValueError(
                f"{NAME}: rope.{name} must be tokens of [0, {of.shape[1]}), a multiple of the {rope.cos.shape[1]} angles, "
                f"got {[first, last]}"
            )
        heads = rope.cos.shape[2]
        if not _checks.fits(rope.cos.shape[0], of.shape[0]):
            raise ValueError(f"{NAME}: rope.cos must have the batch of q ({of.shape[0]}) or 1, got {rope.cos.shape[0]}")
        if not _checks.fits(heads, of.shape[2]):
            raise ValueError(f"{NAME}: rope.cos must have 1 head or those it turns ({of.shape[2]}), got {heads}")


def check_key_index(index: Any, q: Tensor, k: Tensor, normalizer: str, stats: Any, topk: Any) -> None:
    _checks.integers(NAME, "key_index", index)
    _checks.on_device(NAME, "key_index", index, "q", q.device)
    if index.dim() != 3 or not _checks.fits(index.shape[0], q.shape[0]) or index.shape[1] != q.shape[1]:
        raise ValueError(f"{NAME}: key_index must have shape [B or 1, Nq = {q.shape[1]}, K], got {list(index.shape)}")
    if backends.may_read(index) and index.numel() and not -1 <= int(index.min()) <= int(index.max()) < k.shape[1]:
        raise ValueError(
            f"{NAME}: key_index must lie in [-1, {k.shape[1]}), the keys, got {int(index.min())} to {int(index.max())}"
        )
    if topk is not None or (normalizer != "softmax" and stats):
        raise NotImplementedError(f"{NAME}: key_index goes neither with topk nor with statistics without softmax")


def check_lepe(lepe: Any, q: Tensor, v: Any, op: str = NAME, sequences: int | None = None) -> None:
    """`sequences`: how many are packed in v, each a map of its own."""
    if lepe is None:
        return
    if not isinstance(lepe, DepthwiseValue):
        raise TypeError(f"{op}: lepe must be a vitkern.DepthwiseValue or None, got {type(lepe).__name__}")
    if v is None or v.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: lepe must go with values of the queries' own tokens ({q.shape[1]})")
    fields("lepe", lepe, q.device, op)
    if lepe.scope not in ("map", "window"):
        raise ValueError(f"{op}: lepe.scope must be 'map' or 'window', got {lepe.scope!r}")
    if lepe.scope == "window" and op != "window_attention":
        raise ValueError(f"{op}: lepe.scope must be 'map' outside window_attention, got 'window'")
    if sequences is None:
        grid("lepe", "DepthwiseValue", lepe.grid, v.shape[1] - lepe.prefix_tokens, "v without the prefix", op=op)
    elif not _holds(lepe, sequences, v.shape[1]):
        raise ValueError(
            f"{op}: lepe.grid must be the sides (h, w) of the {sequences} sequences, which hold the {v.shape[1]} tokens of v "
            f"with their prefixes, got {lepe.grid!r}"
        )
    heads, width = v.shape[2:]
    shape = tuple(lepe.weight.shape)
    if (
        len(shape) != 4
        or not (shape[0] == width or shape[0] == heads * width)
        or shape[1] != 1
        or not (shape[2] % 2 and shape[3] % 2)
    ):
        raise ValueError(
            f"{op}: lepe.weight must have shape [{heads * width} or {width}, 1, kh, kw] with odd kh and kw, got {list(shape)}"
        )
    if lepe.bias is not None:
        _checks.shape(op, "lepe.bias", lepe.bias, shape[:1], "[channels of lepe.weight]")


def _holds(lepe: DepthwiseValue, sequences: int, tokens: int) -> bool:
    """Whether lepe.grid has the sides of so many maps, which hold so many tokens."""
    sides: Any = lepe.grid
    if not isinstance(sides, (list, tuple)) or len(sides) != sequences:
        return False
    pairs = all(isinstance(s, (list, tuple)) and len(s) == 2 and min(s) >= 0 for s in sides)
    return pairs and sum(h * w + lepe.prefix_tokens for h, w in sides) == tokens


def check_scale(scale: Any, cosine: Any, q: Tensor) -> Any:
    """The factor of step 2: a float or a tensor."""
    if cosine is not None:
        if not isinstance(cosine, CosineScore):
            raise TypeError(f"{NAME}: cosine must be a CosineScore or None, got {type(cosine).__name__}")
        if scale is not None:
            raise ValueError(f"{NAME}: scale must be None with cosine (the factor is exp(logit_scale)), got {scale!r}")
        _checks.parameter(NAME, "cosine.logit_scale", cosine.logit_scale, q.device)
        _checks.number(NAME, "cosine.max", cosine.max)
        _checks.number(NAME, "cosine.eps", cosine.eps, 0.0)
        if cosine.logit_scale.numel() != q.shape[2]:
            raise ValueError(
                f"{NAME}: cosine.logit_scale must have one element per head ({q.shape[2]}), "
                f"got {list(cosine.logit_scale.shape)}"
            )
        return 1.0
    if isinstance(scale, Tensor):
        _checks.parameter(NAME, "scale", scale, q.device)
        if scale.dim() > 1 or (scale.dim() == 1 and len(scale) != q.shape[2]):
            raise ValueError(
                f"{NAME}: scale must be a number or have shape [] or [H = {q.shape[2]}], got {list(scale.shape)}"
            )
        return scale
    return q.shape[3] ** -0.5 if scale is None else _checks.number(NAME, "scale", scale, what="a number or a tensor")


def check_rows(rows: Any, least: int, count: int, op: str = NAME) -> None:
    if rows is not None and not isinstance(rows, (tuple, list, range)):
        raise TypeError(f"{op}: stat_rows must be a tuple of ints, got {type(rows).__name__}")
    for row in rows or ():
        if not least <= _checks.integer(op, "stat_rows", row, what="ints") < count:
            raise ValueError(f"{op}: stat_rows must be queries of [0, {count}), got {row}")


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
    if "lse" in stats and normalizer != "softmax":
        raise ValueError(f"{NAME}: return_stats 'lse' must go with normalizer='softmax', got {normalizer!r}")
    if "index" in stats and normalizer != "argmax_k":
        raise ValueError(f"{NAME}: return_stats 'index' must go with normalizer='argmax_k', got {normalizer!r}")
    if ("row" in stats) != (rows is not None):
        raise ValueError(f"{NAME}: stat_rows must be given with return_stats 'row', and only then, got {rows!r}")
    check_rows(rows, -q.shape[1], q.shape[1])
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
            if t.dim() != 4 or not _checks.fits(t.shape[0], q.shape[0]) or t.shape[2:] != like.shape[2:]:
                want = ["B or 1", "E", *like.shape[2:]]
                raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")
        extra = extra_kv[0].shape[1]
        if extra_kv[1] is not None and extra_kv[1].shape[1] != extra:
            raise ValueError(
                f"{NAME}: extra_kv must have a value for each key, got {extra} keys and {extra_kv[1].shape[1]} values"
            )
    if topk is not None and not 1 <= _checks.integer(NAME, "topk", topk) <= k.shape[1] + extra:
        raise ValueError(f"{NAME}: topk must lie in [1, Nk] = [1, {k.shape[1] + extra}], got {topk}")
    if weight is not None:
        _checks.parameter(NAME, "query_weight", weight, q.device)
        if tuple(weight.shape) not in (tuple(q.shape[:2]), tuple(q.shape[:3])):
            raise ValueError(
                f"{NAME}: query_weight must have shape [B, Nq] = {list(q.shape[:2])} or [B, Nq, H], got {list(weight.shape)}"
            )
    return extra
