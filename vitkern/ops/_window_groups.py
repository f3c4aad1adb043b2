"""window_attention whose heads are split into groups, each with windows, a shift and a bias of its own; and what a depthwise
convolution of the values adds."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import PerHeadGroup, RelativePosition
from vitkern.cosine import CosineScore
from vitkern.ops import _attention_checks, _call, _window_general_checks
from vitkern.ops import _window_places as where
from vitkern.ops._dropout import Stream, drawn
from vitkern.ops._window_checks import NAME
from vitkern.ops.window_rows import window_rows, window_sum
from vitkern.stats import Stats
from vitkern.value import DepthwiseValue

# groups ---------------------------------------------------------------------------------------------------------------


def are_given(window_size: Any, shift_size: Any, bias: Any) -> bool:
    return _per_group(window_size) or _per_group(shift_size) or isinstance(bias, PerHeadGroup)


def _per_group(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(entry, (list, tuple)) for entry in value)


def grouped(
    function: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Any,
    shift_size: Any,
    *,
    bias: Any = None,
    mask: Any = None,
    scale: Any = None,
    cosine: Any = None,
    pad_kv: Any = None,
    extra_kv: Any = None,
    lepe: Any = None,
    dropout_seed: Any = None,
    return_stats: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """`function`, window_attention, on each group of heads, and the outputs side by side."""
    if dropout_seed is None and options.get("dropout_p"):
        dropout_seed = drawn(q.device)
    own = {
        "bias": bias,
        "mask": mask,
        "scale": scale,
        "cosine": cosine,
        "pad_kv": pad_kv,
        "extra_kv": extra_kv,
        "lepe": lepe,
        "dropout_seed": dropout_seed,
    }
    found = [
        function(*main, **each, return_stats=return_stats, **options)
        for main, each in _groups(q, k, v, window_size, shift_size, **own)
    ]
    if not return_stats:
        return torch.cat(found, -2)
    heads = {"lse": -1, "key_mean": -1, "probs": 1, "logits": 1}
    named = {name: torch.cat([getattr(s, name) for _, s in found], heads[name]) for name in return_stats}
    return torch.cat([out for out, _ in found], -2), Stats(**named)


OF_HEADS = ("bias", "mask", "scale", "cosine", "pad_kv", "extra_kv", "lepe", "dropout_seed")


def first(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`function` on the first group of heads."""
    shared = {name: value for name, value in options.items() if name not in OF_HEADS}
    of_heads: dict[str, Any] = {name: options.get(name) for name in OF_HEADS}
    main, own = next(_groups(*args, **of_heads))
    return function(*main, **own, **shared)


def _groups(
    q: Tensor, k: Tensor, v: Tensor, window_size: Any, shift_size: Any, *, bias: Any, **given: Any
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Of each group q, k, v, window and shift, and the options that have heads."""
    count = _count(q, k, window_size, shift_size, bias)
    options = {
        "bias": _biases(bias, q.shape[-2], count),
        "mask": _masks(given["mask"], q.shape[-2], count),
        "scale": _scales(given["scale"], q.shape[-2], count),
        "cosine": _cosines(given["cosine"], count),
        "pad_kv": _pairs("pad_kv", given["pad_kv"], k.shape[-2], count),
        "extra_kv": _pairs("extra_kv", given["extra_kv"], k.shape[-2], count),
        "lepe": _values(given["lepe"], v, count),
        "dropout_seed": _seeds(given["dropout_seed"], q, count),
    }
    parts = [t.unflatten(-2, (count, -1)).unbind(-3) for t in (q, k, v)]
    windows, shifts = _each(window_size, count), _each(shift_size, count)
    for g in range(count):
        main = (*(part[g] for part in parts), windows[g], shifts[g])
        yield main, {name: each[g] for name, each in options.items()}


def _count(q: Any, k: Any, window_size: Any, shift_size: Any, bias: Any) -> int:
    given = {
        "window_size": len(window_size) if _per_group(window_size) else None,
        "shift_size": len(shift_size) if _per_group(shift_size) else None,
        "bias": len(bias.biases) if isinstance(bias, PerHeadGroup) else None,
    }
    counts = {name: n for name, n in given.items() if n is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{NAME}: window_size, shift_size and bias must have as many head groups each, got {counts}")
    count = next(iter(counts.values()))
    for name, t in (("q", q), ("k", k)):
        if isinstance(t, Tensor) and t.dim() > 2 and (not count or t.shape[-2] % count):
            raise ValueError(f"{NAME}: {count} head groups must cover the {t.shape[-2]} heads of {name} evenly")
    return count


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if _per_group(value) else [value] * count


def _biases(bias: Any, heads: int, count: int) -> list[Any]:
    if isinstance(bias, PerHeadGroup):
        return list(bias.biases)
    if isinstance(bias, RelativePosition):
        return [dataclasses.replace(bias, table=table) for table in bias.table.chunk(count, 1)]
    if isinstance(bias, Tensor) and bias.dim() >= 3 and bias.shape[-3] == heads:
        return list(bias.chunk(count, -3))
    if bias is None or (isinstance(bias, Tensor) and (bias.dim() < 3 or bias.shape[-3] == 1)):
        return [bias] * count
    raise TypeError(
        f"{NAME}: bias of head groups must be PerHeadGroup, RelativePosition, a tensor or None, got {type(bias).__name__}"
    )


def _masks(mask: Any, heads: int, count: int) -> list[Any]:
    """Those of each group, of one or of a list."""
    if isinstance(mask, (list, tuple)):
        return (
            [list(each) for each in zip(*(_masks(m, heads, count) for m in mask), strict=True)]
            if mask
            else [mask] * count
        )
    if not isinstance(mask, Tensor) or mask.dim() < 3 or mask.shape[-3] == 1:
        return [mask] * count
    if mask.shape[-3] != heads:
        raise ValueError(f"{NAME}: mask must have the {heads} heads of q, or one, got {list(mask.shape)}")
    return list(mask.chunk(count, -3))


def _scales(scale: Any, heads: int, count: int) -> list[Any]:
    if not isinstance(scale, Tensor) or scale.dim() != 1 or len(scale) == 1:
        return [scale] * count
    if len(scale) != heads:
        raise ValueError(f"{NAME}: scale must have the {heads} heads of q, or one, got {list(scale.shape)}")
    return list(scale.chunk(count))


def _cosines(cosine: Any, count: int) -> list[Any]:
    if not isinstance(cosine, CosineScore) or cosine.logit_scale.numel() % count:
        return [cosine] * count  # which no group takes
    return [dataclasses.replace(cosine, logit_scale=t) for t in cosine.logit_scale.reshape(count, -1)]


def _pairs(name: str, pair: Any, heads: int, count: int) -> list[Any]:
    """A pair of tensors [..., heads, width], or what has no heads."""
    if not isinstance(pair, tuple):
        return [pair] * count
    for t in pair:
        if isinstance(t, Tensor) and (t.dim() < 2 or t.shape[-2] != heads):
            raise ValueError(f"{NAME}: {name} must have the {heads} heads of k, got {list(t.shape)}")
    split = [[None] * count if t is None else t.unflatten(-2, (count, -1)).unbind(-3) for t in pair]
    return list(zip(*split, strict=True))


def _values(lepe: Any, v: Tensor, count: int) -> list[Any]:
    if not isinstance(lepe, DepthwiseValue) or len(lepe.weight) == v.shape[-1]:
        return [lepe] * count
    biases = [None] * count if lepe.bias is None else lepe.bias.chunk(count)
    weights = lepe.weight.chunk(count)
    return [dataclasses.replace(lepe, weight=w, bias=b) for w, b in zip(weights, biases, strict=True)]


def _seeds(seed: Any, q: Tensor, count: int) -> list[Stream]:
    """One seed for all groups, each of which counts its heads from its own first."""
    return [Stream(seed, group * (q.shape[-2] // count)) for group in range(count)]


# values that are added ------------------------------------------------------------------------------------------------


def added(
    v: Tensor,
    lepe: Any,
    heads: int,
    q_sides: Any,
    window_size: Any,
    shift_size: Any,
    *,
    partition: str = "block",
    pad_order: str = "pad_roll",
    pad_kv: Any = None,
    order: Any = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """What `lepe` adds to the output [B, *L, H, Dv] of these values [B, *L, Hk, Dv]."""
    sides = tuple(v.shape[1:-2])
    if len(sides) != 2 or order is not None or isinstance(shift_size, Tensor):
        raise ValueError(f"{NAME}: lepe needs a map of two axes in its own order, got sides {list(sides)}")
    for name in ("context_size", "key_window_size"):
        if options.get(name) is not None:
            raise ValueError(f"{NAME}: lepe needs windows of the queries' own tokens, got {name}={options[name]!r}")
    if sides != tuple(q_sides):
        raise ValueError(f"{NAME}: lepe needs values of the queries' own map {list(q_sides)}, got {list(sides)}")
    if isinstance(lepe, DepthwiseValue):
        if lepe.prefix_tokens:
            raise ValueError(f"{NAME}: lepe.prefix_tokens must be 0 on a map, got {lepe.prefix_tokens}")
        if lepe.grid is not None and tuple(lepe.grid) != sides:
            raise ValueError(f"{NAME}: lepe.grid must be None or the sides {list(sides)} of the map, got {lepe.grid!r}")
        lepe = dataclasses.replace(lepe, grid=sides)
    flat = v.flatten(1, 2)
    _attention_checks.check_lepe(lepe, flat, flat, NAME)
    if lepe.scope == "map":
        found = lepe.of(flat, backend=_call.beside(backend)).unflatten(1, sides)
    else:
        axes, _ = _window_general_checks.axes(
            sides, sides, window_size, shift_size, partition, None, "pad", None, pad_order
        )
        at = where.places(axes, v.device)
        beside = _call.beside(backend)
        rows = window_rows(v, at, pad_kv[1] if isinstance(pad_kv, tuple) else None, backend=beside)
        inside = dataclasses.replace(lepe, grid=tuple(a.cells for a in axes))
        found = window_sum(inside.of(rows, backend=beside), at, sides, backend=beside)[0]
    return found.repeat_interleave(heads // v.shape[-2], -2)
