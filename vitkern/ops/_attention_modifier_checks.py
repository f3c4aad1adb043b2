"""The argument checks of attention's biases, masks and modulations: what shapes, dtypes and devices decide, in sentences."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from vitkern import backends, bias, mask, modulation
from vitkern.ops import _checks

NAME = "attention"
LARGEST = 2**31 - 1
INTEGERS = ("index", "q_ids", "k_ids", "q_levels", "k_levels", "order")
FLAGS = ("allow", "open_rows")
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
        if isinstance(entry, Tensor):
            _checks.tensor(NAME, name, entry)
    return each


def scores(name: str, t: Tensor, shape: tuple[int, ...], extra: int = 0) -> None:
    """t broadcasts to [B, H, Nq, Nk]; `extra` further columns are allowed."""
    sizes = list(zip(reversed(t.shape), reversed(shape), strict=False))
    fits = t.dim() <= 4 and all(_checks.fits(n, want) for n, want in sizes)
    if not fits and extra and 1 <= t.dim() <= 4 and t.shape[-1] == shape[-1] + extra:
        fits = all(_checks.fits(n, want) for n, want in sizes[1:])
    if not fits:
        raise ValueError(f"{NAME}: {name} must broadcast to [B, H, Nq, Nk] = {list(shape)}, got {list(t.shape)}")


def fields(name: str, modifier: Any, device: torch.device, op: str = NAME) -> None:
    """Every field of a modifier has the type of its declaration; tensors are on the device of q."""
    if torch.compiler.is_compiling():
        return  # torch 2.10 cannot trace the fields of a frozen dataclass
    for field in dataclasses.fields(modifier):
        value, what = getattr(modifier, field.name), f"{name} {type(modifier).__name__}.{field.name}"
        if isinstance(value, Tensor) and field.name not in FLAGS:
            (_checks.integers if field.name in INTEGERS else _checks.floating)(op, what, value)
        if isinstance(value, Tensor):
            _checks.on_device(op, what, value, "q", device)
        elif field.type is Tensor or (value is not None and field.type == Tensor | None):
            _checks.tensor(op, what, value)
        elif field.type is float or field.type == float | Tensor:
            _checks.number(op, what, value, what="a float" if field.type is float else "a float or a tensor")
        elif field.type is int:
            _checks.integer(op, what, value, 0 if field.name == "prefix_tokens" else None)
        elif field.type is bool and not isinstance(value, bool):
            raise TypeError(f"{op}: {what} must be True or False, got {value!r}")


def pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{NAME}: {name} must be two ints, got {value!r}")
    first, second = (_checks.integer(NAME, name, n, what="two ints") for n in value)
    return first, second


def per_query(name: str, t: Tensor, q: Tensor, side: int) -> None:
    fits = (
        t.dim() == 4
        and _checks.fits(t.shape[0], q.shape[0])
        and t.shape[1] == q.shape[1]
        and _checks.fits(t.shape[2], q.shape[2])
    )
    if not fits or t.shape[3] != side:
        want = ["B or 1", q.shape[1], "H or 1", side]
        raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")


def grid(name: str, kind: str, sides: Any, tokens: int, of: str, axes: int | None = None, op: str = NAME) -> None:
    wrong = not isinstance(sides, (list, tuple)) or len(sides) < 1 or (axes is not None and len(sides) != axes)
    if not wrong:
        for side in sides:
            _checks.integer(op, f"{name} {kind}.grid", side, 1, "ints")
    if wrong or math.prod(sides) != tokens:
        raise ValueError(f"{op}: {name} {kind}.grid must hold the {tokens} tokens of {of}, got {sides!r}")


def check_bias(
    b: Any, q: Tensor, k: Tensor, v: Tensor | None, extra: int, queries: int, keys: int, samples: int
) -> None:
    """`queries`, `keys` and `samples`: of the longest sequence, and how many there are, if q and k are packed."""
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
            grid("bias", kind, b.q_grid, queries, "q", 2)
            for name, a, c in zip(("rel_h", "rel_w"), b.q_grid, b.k_grid, strict=True):
                want = (2 * max(a, c) - 1, q.shape[3])
                _checks.shape(NAME, f"bias {kind}.{name}", getattr(b, name), want, "[2 max(query, key) - 1, D]")
    if isinstance(b, bias.EuclideanDistance):
        _checks.shape(NAME, f"bias {kind}.slope", b.slope, (q.shape[2],), "[H]")
        for name, of in (("q_xy", q), ("k_xy", k)):
            t = getattr(b, name)
            if t.dim() != 3 or not _checks.fits(t.shape[0], q.shape[0]) or t.shape[1:] != (of.shape[1], 2):
                wanted = ["B or 1", of.shape[1], 2]
                raise ValueError(f"{NAME}: bias {kind}.{name} must have shape {wanted}, got {list(t.shape)}")
    if isinstance(b, bias.PolylinePath):
        if (
            b.row.dim() != 4
            or not _checks.fits(b.row.shape[0], samples)
            or not _checks.fits(b.row.shape[3], q.shape[2])
        ):
            raise ValueError(
                f"{NAME}: bias {kind}.row must have shape [B or 1, Hs, Ws, H or 1], got {list(b.row.shape)}"
            )
        grid("bias", kind, b.row.shape[1:3], q.shape[1], "q")
        grid("bias", kind, b.row.shape[1:3], k.shape[1], "k")
        _checks.shape(NAME, f"bias {kind}.col", b.col, tuple(b.row.shape), "of row")
    if isinstance(b, bias.ContextualPosition):
        _contextual(b, q, k, v)
    vectors = {bias.KeyBias: (k, "Nk"), bias.RowBias: (q, "Nq")}
    if type(b) in vectors:
        of, text = vectors[type(b)]
        more = extra if isinstance(b, bias.KeyBias) else 0
        fits = (
            b.vector.dim() == 3
            and _checks.fits(b.vector.shape[0], q.shape[0])
            and _checks.fits(b.vector.shape[1], q.shape[2])
        )
        if not fits or not (b.vector.shape[2] == of.shape[1] or b.vector.shape[2] == of.shape[1] + more):
            raise ValueError(
                f"{NAME}: bias {kind}.vector must have shape [B or 1, H or 1, {text} = {of.shape[1]}], "
                f"got {list(b.vector.shape)}"
            )


def _contextual(b: Any, q: Tensor, k: Tensor, v: Tensor | None) -> None:
    for name, width in (("q_table", q.shape[3]), ("k_table", q.shape[3]), ("v_table", 0 if v is None else v.shape[3])):
        t = getattr(b, name)
        if t is not None and (
            t.dim() != 3 or not _checks.fits(t.shape[1], q.shape[2]) or t.shape[2] != (width or t.shape[2])
        ):
            want = ["n", "H or 1", width]
            raise ValueError(f"{NAME}: bias ContextualPosition.{name} must have shape {want}, got {list(t.shape)}")
    shape = tuple(b.index.shape)
    if shape[-2:] != (q.shape[1], k.shape[1]) or (
        len(shape) != 2 and (len(shape) != 3 or not _checks.fits(shape[0], q.shape[0]))
    ):
        want = [q.shape[1], k.shape[1]]
        raise ValueError(
            f"{NAME}: bias ContextualPosition.index must have shape {want} or {['B or 1', *want]}, got {list(shape)}"
        )
    rows = min([LARGEST, *(t.shape[0] for t in (b.q_table, b.k_table, b.v_table) if t is not None)])
    if backends.may_read(b.index) and b.index.numel() and not 0 <= int(b.index.min()) <= int(b.index.max()) < rows:
        raise ValueError(
            f"{NAME}: bias ContextualPosition.index must lie in [0, {rows}), the rows of the tables, "
            f"got {int(b.index.min())} to {int(b.index.max())}"
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
    for field, value, least in (("prefix_tokens", b.prefix_tokens, 0), ("q_stride", b.q_stride, 1)):
        _checks.integer(NAME, f"bias RelativePosition.{field}", value, least)
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
    if isinstance(m, mask.Causal) and isinstance(m.offset, Tensor):
        raise TypeError(f"{NAME}: mask Causal.offset must be an int, got a tensor")
    fields("mask", m, q.device)
    if isinstance(m, mask.Causal) and not -LARGEST <= _checks.integer(NAME, "mask Causal.offset", m.offset) <= LARGEST:
        raise ValueError(f"{NAME}: mask Causal.offset must lie in [-2^31, 2^31), got {m.offset}")
    pairs = {mask.Segments: ("q_ids", "k_ids"), mask.BlockCausal: ("q_levels", "k_levels", "order")}.get(type(m), ())
    for name, of in zip(pairs, (q, k), strict=False):
        ids = getattr(m, name)
        if ids.dim() != 2 or not _checks.fits(ids.shape[0], q.shape[0]) or ids.shape[1] != of.shape[1]:
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
    for side in pair("mask FromLogits.size", m.size):
        _checks.integer(NAME, "mask FromLogits.size", side, 0, "two ints")
    first, last = pair("mask FromLogits.rows", m.rows or (0, q.shape[1]))
    left, right = pair("mask FromLogits.cols", m.cols or (0, k.shape[1]))
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
    if math.prod(m.size) and not math.prod(m.logits.shape[2:]):
        raise ValueError(f"{NAME}: mask FromLogits.logits must have at least one cell, got {list(m.logits.shape)}")
    if m.open_rows is not None:
        _checks.flags(NAME, "mask FromLogits.open_rows", m.open_rows, tuple(m.logits.shape[:2]), "q", q.device)


def check_modulation(m: Any, q: Tensor, k: Tensor, normalizer: str) -> None:
    if isinstance(m, Tensor):
        raise TypeError(f"{NAME}: modulation must be typed, such as modulation.ElementwiseMask(weight), got a tensor")
    kind, heads = type(m).__name__, q.shape[2]
    fields("modulation", m, q.device)
    if isinstance(m, modulation.GaussianMixture):
        for of, text in ((q, "q"), (k, "k")):
            grid("modulation", kind, m.grid, of.shape[1] - m.prefix_tokens, f"{text} without the prefix", 2)
        if m.mode not in modulation.MODES:
            raise ValueError(f"{NAME}: modulation {kind}.mode must be 'exact' or 'published', got {m.mode!r}")
        for name in ("sigma", "alpha"):
            _checks.shape(NAME, f"modulation {kind}.{name}", getattr(m, name), (*m.sigma.shape[:1], heads), "[K, H]")
    if isinstance(m, modulation.ElementwiseMask):
        scores(f"modulation {kind}.weight", m.weight, (q.shape[0], heads, q.shape[1], k.shape[1]))
        if m.place not in ("logit", "prob"):
            raise ValueError(f"{NAME}: modulation {kind}.place must be 'logit' or 'prob', got {m.place!r}")
    if isinstance(m, modulation.SoftCausal) and isinstance(m.ratio, Tensor) and m.ratio.numel() != 1:
        raise ValueError(
            f"{NAME}: modulation SoftCausal.ratio must be a float or one element, got shape {list(m.ratio.shape)}"
        )
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
        _checks.number(NAME, "modulation Policy.eps", m.eps, 0.0)
        if m.keep.dim() != 2 or not _checks.fits(m.keep.shape[0], q.shape[0]) or m.keep.shape[1] != k.shape[1]:
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
