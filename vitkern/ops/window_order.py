"""window_order: the order that puts the tokens of ragged or sparse windows side by side, for packed sequences."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _checks

NAME = "window_order"
AXES = ("x", "y", "z", "t")  # from the last axis on


def window_order(
    grid: Tensor | Sequence[int] | Sequence[Sequence[int]],
    window_size: int | Sequence[int],
    shift_size: int | Sequence[int] = 0,
    major: str = "x",
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The tokens of maps of any size, or of sparse voxels, window by window: windows at an edge are smaller, none has pads
    (Qwen2.5-VL, Bai et al. 2025; Swin3D, Yang et al. 2023).

    A token at coordinate c of an axis lies in window :math:`\lfloor (c + \text{shift}) / w \rfloor` of it. ``q[order]``,
    ``k[order]`` and ``v[order]`` go into :func:`vitkern.attention_varlen` with ``cu_seqlens`` on both sides and the cells of
    a window as greatest lengths; ``out[order.argsort()]`` has the tokens' own order again.

    Args:
        grid: the sides of a map, tokens row-major; a list of these, of maps one behind the other; or integer coordinates
            ``[T, axes]``, with a first column more than ``window_size`` has axes for the sample of each token.
        window_size: tokens per axis, or one int for all.
        shift_size: what windows begin before the origin, at least 0 and less than the window; nothing wraps around.
        major: the axis that changes slowest, among windows and inside them: ``"x"`` the last, ``"y"`` the one before it, ``"z"``,
            ``"t"``. The others follow from the last on. Maps and samples stay one behind the other.
        device: of the result, for a grid.

    Returns:
        ``order`` int32 ``[T]`` and ``cu_seqlens`` int32 ``[windows + 1]``; windows without a token are left out. Two tokens of one
        place keep their order.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    coords, sample, axes = _coordinates(grid, window_size, device)
    window, shift = (
        _checks.per_axis(NAME, name, value, axes)
        for name, value in (("window_size", window_size), ("shift_size", shift_size))
    )
    for w, s in zip(window, shift, strict=True):
        if w < 1 or not 0 <= s < w:
            raise ValueError(
                f"{NAME}: every axis needs 0 <= shift_size < window_size, got {shift_size!r} and {window_size!r}"
            )
    if major not in AXES[:axes]:
        raise ValueError(f"{NAME}: major must be one of {', '.join(AXES[:axes])} on {axes} axes, got {major!r}")
    slowest = axes - 1 - AXES.index(major)
    ranked = [slowest, *(a for a in reversed(range(axes)) if a != slowest)]
    moved = coords + torch.tensor(shift, device=coords.device)
    sides = torch.tensor(window, device=coords.device)
    of_window = torch.div(moved, sides, rounding_mode="floor")
    place = moved - of_window * sides
    key = sample
    for a in ranked:
        key = _joined(key, of_window[:, a])
    inside = torch.zeros_like(key)
    for a in ranked:
        inside = inside * window[a] + place[:, a]
    order = (key * math.prod(window) + inside).argsort(stable=True)
    lengths = torch.unique_consecutive(key[order], return_counts=True)[1]
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    return order.to(torch.int32), bounds.to(torch.int32)


def _joined(key: Tensor, more: Tensor) -> Tensor:
    """One number for a pair of numbers, in their order."""
    if not key.numel():
        return key
    low, high = more.aminmax()
    return key * (high - low + 1) + more - low


def _coordinates(grid: Any, window_size: Any, device: Any) -> tuple[Tensor, Tensor, int]:
    """Coordinates int64 [T, axes], the sample of every token [T], and the number of axes."""
    if isinstance(grid, Tensor):
        _checks.integers(NAME, "grid", grid)
        if grid.dim() != 2 or not 1 <= grid.shape[1] <= len(AXES) + 1:
            raise ValueError(f"{NAME}: grid must be coordinates [T, axes] of 1 to 4 axes, got {list(grid.shape)}")
        coords = grid.long()
        if not isinstance(window_size, (int, list, tuple)):
            raise TypeError(f"{NAME}: window_size must be an int or one for each axis, got {window_size!r}")
        axes = coords.shape[1] if isinstance(window_size, int) else len(window_size)
        if axes not in (coords.shape[1], coords.shape[1] - 1) or axes > len(AXES):
            raise ValueError(
                f"{NAME}: grid must have a column for each axis of window_size, or one more for samples, "
                f"got {coords.shape[1]} for {window_size!r}"
            )
        own = coords[:, 0] if coords.shape[1] > axes else torch.zeros_like(coords[:, 0])
        return coords[:, coords.shape[1] - axes :], own, axes
    sides = [grid] if isinstance(grid, Sequence) and grid and isinstance(grid[0], int) else grid
    one = isinstance(sides, Sequence) and len(sides) > 0 and all(isinstance(s, Sequence) for s in sides)
    if not one or len({len(s) for s in sides}) != 1 or not 1 <= len(sides[0]) <= len(AXES):
        raise ValueError(f"{NAME}: grid must hold 1 to 4 sides, or several such of one length, got {grid!r}")
    for s in sides:
        for n in s:
            _checks.integer(NAME, "grid", n, 1, "sides of maps")
    maps = [torch.cartesian_prod(*(torch.arange(n, device=device) for n in s)).view(-1, len(s)) for s in sides]
    counts = torch.tensor([len(m) for m in maps], device=device)
    return torch.cat(maps), torch.arange(len(maps), device=device).repeat_interleave(counts), len(sides[0])
