"""The argument checks of window_attention's further options, in sentences."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.bias import RelativePosition
from vitkern.ops import _checks
from vitkern.ops._attention_modifier_checks import BIASES
from vitkern.ops._window_checks import NAME, check_mask_value, check_pad_order, check_pads, check_sides
from vitkern.ops._window_places import Axis

PARTITIONS = ("block", "grid", "unit")
STATS = ("lse", "key_mean", "probs", "logits")


def tensors(q: Any, k: Any, v: Any, shared_q: bool) -> None:
    """q [B, *Lq, H, D], or [B, *window, H, D] of shared queries; k and v [B, *Lk, Hk, D|Dv]."""
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
    _checks.maps(NAME, q, k, v, same_dtype=not autocast, own_map=True)
    if not isinstance(shared_q, bool):
        raise TypeError(f"{NAME}: shared_q must be a bool, got {shared_q!r}")


def options(
    k: Tensor,
    v: Tensor,
    partition: Any,
    pad_order: Any,
    pad_kv: Any,
    mask_value: Any,
    extra_kv: Any,
    key_mask: Any,
    return_stats: Any,
    context_size: Any,
) -> None:
    if partition not in PARTITIONS:
        raise ValueError(f"{NAME}: partition must be one of {', '.join(PARTITIONS)}, got {partition!r}")
    check_pad_order(pad_order)
    check_pads(pad_kv, k, v)
    check_mask_value(mask_value)
    if extra_kv is not None:
        if not isinstance(extra_kv, tuple) or len(extra_kv) != 2:
            raise ValueError(f"{NAME}: extra_kv must be a pair (k, v), got {type(extra_kv).__name__}")
        for name, t, like in (("extra_kv k", extra_kv[0], k), ("extra_kv v", extra_kv[1], v)):
            _checks.parameter(NAME, name, t, k.device)
            if t.dim() != 4 or not _checks.fits(t.shape[0], len(k)) or t.shape[2:] != like.shape[-2:]:
                want = ["B or 1", "E", *like.shape[-2:]]
                raise ValueError(f"{NAME}: {name} must have shape {want}, got {list(t.shape)}")
        counts = [t.shape[1] for t in extra_kv]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{NAME}: extra_kv must have a value for each key, got {counts[0]} keys and {counts[1]} values"
            )
    if key_mask is not None:
        _checks.tensor(NAME, "key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{NAME}: key_mask must be bool, got {key_mask.dtype}")
        _checks.shape(NAME, "key_mask", key_mask, tuple(k.shape[:-2]), "[B, *spatial] of k")
        _checks.on_device(NAME, "key_mask", key_mask, "k", k.device)
    if not isinstance(return_stats, (list, tuple)) or not set(return_stats) <= set(STATS):
        raise ValueError(f"{NAME}: return_stats must hold names of {', '.join(STATS)}, got {return_stats!r}")
    if "key_mean" in return_stats and context_size is not None:
        raise ValueError(
            f"{NAME}: return_stats 'key_mean' needs keys of one window each, got context_size={context_size!r}"
        )


def axes(
    lengths: Any,
    key_lengths: Any,
    window_size: Any,
    shift_size: Any,
    partition: str,
    context_size: Any,
    context_border: Any,
    key_window_size: Any,
    pad_order: str,
) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """The axes of queries and of keys."""
    rank, roll_first = len(lengths), pad_order == "roll_pad"
    shift_size = 0 if isinstance(shift_size, Tensor) else shift_size
    window, shift = check_sides(window_size, shift_size, lengths)
    if partition == "unit" and rank != 1:
        raise ValueError(f"{NAME}: partition='unit' needs a map of one axis of tokens, got {rank}")
    same = tuple(lengths) == tuple(key_lengths) and key_window_size is None
    beside = [
        n for n, given in (("context_size", context_size is not None), ("a key grid of its own", not same)) if given
    ]
    if partition != "block":
        beside.append(f"partition={partition!r}")
    if beside and any(shift):
        raise ValueError(f"{NAME}: shift_size must be 0 with {beside[0]}, got {shift_size!r}")
    if context_size is not None and partition != "block":
        raise ValueError(f"{NAME}: context_size must go with partition='block', got {partition!r}")
    if context_border not in ("pad", "shift"):
        raise ValueError(f"{NAME}: context_border must be 'pad' or 'shift', got {context_border!r}")
    keys = window if same else _key_window(window, lengths, key_lengths, key_window_size, partition)
    found: tuple[list[Axis], list[Axis]] = ([], [])
    context = keys if context_size is None else _sides("context_size", context_size, rank)
    for length, key_length, w, key, c, s in zip(lengths, key_lengths, window, keys, context, shift, strict=True):
        count = -(-length // w)
        if partition == "unit" and (length % w or key_length % key):
            raise ValueError(
                f"{NAME}: a unit of {w} queries and {key} keys must divide the {length} and {key_length} tokens"
            )
        if -(-key_length // key) != count:
            raise ValueError(
                f"{NAME}: q and k must have the same number of windows, got {count} of {w} queries on {length} and "
                f"{-(-key_length // key)} of {key} keys on {key_length}"
            )
        if context_border == "shift" and context_size is not None and c > key_length:
            raise ValueError(
                f"{NAME}: context_size must fit the map with context_border='shift', got {c} on {key_length}"
            )
        grid = partition != "block"
        found[0].append(Axis(length, count, w, s, roll_first, grid))
        if context_size is None:
            found[1].append(Axis(key_length, count, key, s, roll_first, grid))
        else:
            lead = (c - key) // 2
            found[1].append(Axis(key_length, count, c, step=key, lead=lead, clamp=context_border == "shift"))
    return tuple(found[0]), tuple(found[1])


def _sides(name: str, value: Any, rank: int) -> tuple[int, ...]:
    sides = _checks.per_axis(NAME, name, value, rank)
    if min(sides) < 1:
        raise ValueError(f"{NAME}: {name} must be at least 1 on every axis, got {value!r}")
    return sides


def _key_window(
    window: tuple[int, ...], lengths: Any, key_lengths: Any, key_window_size: Any, partition: str
) -> tuple[int, ...]:
    """The key cells of a window: given, or those in proportion to the maps."""
    if key_window_size is not None:
        return _sides("key_window_size", key_window_size, len(lengths))
    found = []
    for w, length, key_length in zip(window, lengths, key_lengths, strict=True):
        if w * key_length % length:
            raise ValueError(
                f"{NAME}: key_window_size must be given where a window of {w} queries has no whole number of keys, "
                f"got maps of {length} and {key_length}"
            )
        found.append(w * key_length // length)
    return tuple(found)


def shared(q: Tensor, window: tuple[int, ...]) -> None:
    if tuple(q.shape[1:-2]) != window:
        raise ValueError(
            f"{NAME}: q must have the sides of the window {list(window)} with shared_q, got {list(q.shape[1:-2])}"
        )


def order(value: Any, batch: int, lengths: list[int], same: bool, device: torch.device) -> None:
    _checks.integers(NAME, "order", value)
    _checks.on_device(NAME, "order", value, "q", device)
    if len(lengths) != 1 or not same:
        alike = "" if same else ", with further keys around the windows or a map of its own for k"
        raise ValueError(f"{NAME}: order needs one map of one axis for q, k and v, got lengths {lengths}{alike}")
    if tuple(value.shape) not in ((lengths[0],), (batch, lengths[0])):
        raise ValueError(f"{NAME}: order must have shape [L] or [B, L] with L = {lengths[0]}, got {list(value.shape)}")
    if backends.may_read(value):
        every = torch.arange(lengths[0]).expand(value.shape)
        if not torch.equal(value.long().sort(-1).values.cpu(), every):
            raise ValueError(f"{NAME}: order must be a permutation of the {lengths[0]} tokens")


def shifts(value: Tensor, batch: int, found: tuple[Axis, ...], same: bool, device: torch.device) -> None:
    _checks.integers(NAME, "shift_size", value)
    _checks.on_device(NAME, "shift_size", value, "q", device)
    _checks.shape(NAME, "shift_size", value, (batch, len(found)), "[B, axes]")
    if not same or any(a.grid or a.count * a.cells != a.length for a in found):
        raise ValueError(f"{NAME}: a shift for each sample needs block windows that divide one map")
    if backends.may_read(value) and value.numel():
        sides = torch.tensor([a.cells for a in found])
        if not bool(((value.cpu() >= 0) & (value.cpu() < sides)).all()):
            raise ValueError(f"{NAME}: shift_size must lie in [0, window_size), got entries {value.tolist()}")


def biases(given: list[Any]) -> None:
    for entry in given:
        if not isinstance(entry, (Tensor, *BIASES)):
            raise TypeError(
                f"{NAME}: bias must be a tensor, a modifier of vitkern.bias or a list of these, got {type(entry).__name__}"
            )


def plain_table(b: RelativePosition) -> None:
    raise ValueError(
        f"{NAME}: windows have no prefix tokens and all their queries, got bias.prefix_tokens={b.prefix_tokens} and "
        f"bias.q_stride={b.q_stride}"
    )


def halo_table(b: RelativePosition, window: tuple[int, ...], keys: tuple[int, ...], halo: bool) -> None:
    """A table without an index where queries and keys have sides of their own."""
    if not halo:
        raise ValueError(f"{NAME}: bias must have an index where k has a grid of its own, got none")
    if b.sign not in ("query-key", "key-query") or b.grid is not None:
        raise ValueError(f"{NAME}: bias must have the sign 'query-key' or 'key-query' and no grid with context_size")
    rows = math.prod([w + c - 1 for w, c in zip(window, keys, strict=True)])
    if len(b.table) != rows:
        raise ValueError(
            f"{NAME}: bias.table must have {rows} rows for windows {list(window)} in {list(keys)}, got {len(b.table)}"
        )
