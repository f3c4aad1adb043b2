"""Where the tokens of a map stand in windows, axis by axis: the tables of window_rows, regions and pads."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern.reference.window_rows import tokens as numbers


class Axis(NamedTuple):
    """One axis: place e is cell e mod cells of window e div cells. `step` and `lead`: cells of a halo, whose windows begin at
    window * step - lead; `clamp`: moved into the map."""

    length: int
    count: int  # type: ignore[assignment] # windows
    cells: int
    shift: int = 0
    roll_first: bool = False
    grid: bool = False  # strided: window i has i, i + count, ...
    step: int | None = None
    lead: int = 0
    clamp: bool = False


class Places(NamedTuple):
    """The arguments of window_rows and window_sum behind the map."""

    index: Tensor  # type: ignore[assignment]
    owners: Tensor
    counts: list[int]
    cells: list[int]
    most: list[int]


def places(axes: tuple[Axis, ...], device: torch.device) -> Places:
    """The tables of a map with these axes."""
    make = _tables if torch.compiler.is_compiling() else _cached_tables
    index, owners = make(axes, device)
    return Places(index, owners, [a.count for a in axes], [a.cells for a in axes], [_most(a) for a in axes])


def _tables(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    index = torch.cat([_coordinates(a, device) for a in axes])
    owners = torch.cat([_owners(a, device).flatten() for a in axes])
    return index[None].to(torch.int32), owners[None].to(torch.int32)


@lru_cache(maxsize=256)
def _cached_tables(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        return _tables(axes, device)


def _starts(axis: Axis, device: torch.device) -> Tensor:
    """The first coordinate of every window with a halo, [count]."""
    start = torch.arange(axis.count, device=device) * (axis.step or axis.cells) - axis.lead
    return start.clamp(0, axis.length - axis.cells) if axis.clamp else start


def _coordinates(axis: Axis, device: torch.device) -> Tensor:
    """The coordinate at every place, [count * cells]; -1 for a pad."""
    if axis.step is not None:
        p = (_starts(axis, device)[:, None] + torch.arange(axis.cells, device=device)).flatten()
        return torch.where((p >= 0) & (p < axis.length), p, -1)
    r = torch.arange(axis.count * axis.cells, device=device)
    if axis.grid:
        r = r % axis.cells * axis.count + r // axis.cells
    period = axis.length if axis.roll_first else axis.count * axis.cells
    p = (r + axis.shift) % period
    return torch.where((r if axis.roll_first else p) < axis.length, p, -1)


def _most(axis: Axis) -> int:
    """How many places a coordinate may have."""
    if axis.step is None:
        return 1
    found = -(-axis.cells // axis.step)
    if axis.clamp:
        behind = -(-(axis.count * axis.step + axis.cells - axis.lead - axis.length) // axis.step)
        found += axis.lead // axis.step + 1 + max(behind, 0)
    return min(axis.count, found)


def _owners(axis: Axis, device: torch.device) -> Tensor:
    """The places of every coordinate, [length, most], in the order of windows; -1 behind them."""
    t = torch.arange(axis.length, device=device)[:, None]
    if axis.step is None:
        r = (t - axis.shift) % (axis.length if axis.roll_first else axis.count * axis.cells)
        return r % axis.count * axis.cells + r // axis.count if axis.grid else r
    start = _starts(axis, device)
    inside = (t >= start) & (t < start + axis.cells)  # [length, count]
    place = torch.arange(axis.count, device=device) * axis.cells + t - start
    none = axis.count * axis.cells
    first = torch.where(inside, place, none).sort(1).values[:, : _most(axis)]
    return torch.where(first < none, first, -1)


def ordered(found: Places, order: Tensor) -> Places:
    """The places of a map of one axis whose tokens stand in this order, int [L] or [B, L]: coordinate c is token order[c]."""
    rows = order.reshape(-1, order.shape[-1]).long()  # [1|B, L]
    index, owners = (t.long().expand(len(rows), -1) for t in found[:2])
    index = torch.where(index < 0, -1, rows.gather(1, index.clamp(min=0)))
    per = owners.unflatten(1, (rows.shape[1], -1))
    owners = torch.empty_like(per).scatter(1, rows[..., None].expand_as(per), per).flatten(1)
    return found._replace(index=index.to(torch.int32), owners=owners.to(torch.int32))


def rolled(found: Places, shifts: Tensor, lengths: list[int]) -> Places:
    """The places of an undivided map, each image rolled by its own shifts [B, axes]."""
    index, owners = (
        [
            (part.long() + sign * shifts[:, a : a + 1].long()) % lengths[a]
            for a, part in enumerate(table.split(lengths, 1))
        ]
        for table, sign in ((found.index, 1), (found.owners, -1))
    )
    return found._replace(index=torch.cat(index, 1).to(torch.int32), owners=torch.cat(owners, 1).to(torch.int32))


def each_slot(parts: list[Tensor], counts: list[int], cells: list[int], join: Callable[[Any, Any], Any]) -> Tensor:
    """What every slot has, [B, windows, N], from what the places of each axis have, [B, count * cells] each."""
    rank = len(parts)
    found: Any = None
    for a, part in enumerate(parts):
        shape = [len(part)] + [1] * (2 * rank)
        shape[1 + a], shape[1 + rank + a] = counts[a], cells[a]
        found = part.reshape(shape) if found is None else join(found, part.reshape(shape))
    full = found.expand(-1, *counts, *cells)
    return full.reshape(len(full), math.prod(counts), math.prod(cells))


def tokens(found: Places, lengths: list[int]) -> Tensor:
    """The token of every slot, int64 [1|B, windows, N]; -1 for a pad."""
    return numbers(found.index, lengths, found.counts, found.cells)


def real(found: Places) -> Tensor:
    """Whether a token stands in each slot, bool [1|B, windows, N]."""
    sizes = [n * c for n, c in zip(found.counts, found.cells, strict=True)]
    parts = [part >= 0 for part in found.index.split(sizes, 1)]
    return each_slot(parts, found.counts, found.cells, torch.logical_and)


def regions(axes: tuple[Axis, ...], shifts: Tensor | None, device: torch.device) -> Tensor:
    """What a shift keeps apart in its last windows: a number for every slot, int32 [1|B, windows, N]."""
    parts = []
    for a, axis in enumerate(axes):
        r = torch.arange(axis.count * axis.cells, device=device)[None]
        shift = axis.shift if shifts is None else shifts[:, a : a + 1].long()
        padded = axis.count * axis.cells
        apart = torch.where(r < padded - shift, 1, 2)
        plain = (r < padded - axis.cells) | (shift == 0)
        parts.append(torch.where(plain, 0, apart))
    return each_slot(parts, [a.count for a in axes], [a.cells for a in axes], lambda code, more: code * 3 + more).to(
        torch.int32
    )
