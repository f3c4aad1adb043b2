"""attention: modifiers that depend on the offset on a grid alone, as small tables in place of maps of scores.

A table is ``[1, H|1, 1, (2 gh - 1)(2 gw - 1)]``: an entry for every key minus query, row-major; with a prefix three more, prefix
to grid, grid to prefix, among the prefix. One geometry serves all tables of a call.
"""

from typing import Any

import torch
from torch import Tensor

from vitkern.bias import ManhattanDecay, RelativePosition, offset_index
from vitkern.modulation import GaussianMixture

TABLES = ("bias_table", "gain_table", "weight_table")
GRID = ("grid_height", "grid_width", "grid_prefix", "grid_step")


def place(found: dict[str, Any], modifier: Any) -> bool:
    """Whether the modifier went into a table of `found`, together with those that are there."""
    geometry = _geometry(modifier)
    if geometry is None or (found["grid_height"] and geometry != tuple(found[name] for name in GRID)):
        return False
    factor = isinstance(modifier, GaussianMixture)
    slot = "gain_table" if factor else "weight_table" if getattr(modifier, "place", "") == "prob" else "bias_table"
    table, before = _table(modifier, geometry)[None, :, None], found[slot]
    if before is not None:
        table, before = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (table, before))
        table = before + table if slot == "bias_table" else before * table
    found |= dict(zip(GRID, geometry, strict=True)) | {slot: table}
    return True


def _geometry(modifier: Any) -> tuple[int, int, int, int] | None:
    """(height, width, prefix tokens, step of the queries), None for a modifier that has no table."""
    if not isinstance(modifier, (RelativePosition, GaussianMixture, ManhattanDecay)):
        return None
    if isinstance(modifier, RelativePosition) and (modifier.index is not None or len(modifier.grid or ()) > 2):
        return None
    height, width = (1, *(modifier.grid or ()))[-2:]
    return height, width, getattr(modifier, "prefix_tokens", 0), getattr(modifier, "q_stride", 1)


def _table(modifier: Any, geometry: tuple[int, int, int, int]) -> Tensor:
    """``[H, entries]``, differentiable."""
    height, width, prefix, _ = geometry
    if isinstance(modifier, RelativePosition):
        return _of_rows(modifier.table, modifier.sign, height, width).t()
    device = (modifier.rate if isinstance(modifier, ManhattanDecay) else modifier.sigma).device
    y, x = (torch.arange(1 - n, n, device=device, dtype=torch.float32) for n in (height, width))
    if isinstance(modifier, ManhattanDecay):
        far = (y.abs()[:, None] + x.abs()).flatten()
        decay = modifier.rate[:, None] * far
        return decay.exp() if modifier.place == "prob" else decay
    factor = modifier.of_squares((y.square()[:, None] + x.square()).flatten())
    return torch.nn.functional.pad(factor, (0, 3 if prefix else 0), value=1.0)


def _of_rows(table: Tensor, sign: str, height: int, width: int) -> Tensor:
    """The rows of a table of RelativePosition in the order of key minus query."""
    if sign == "key-query":
        return table
    if sign == "query-key":
        count = (2 * height - 1) * (2 * width - 1)
        return torch.cat((table[:count].flip(0), table[count:]))
    y, x = (torch.arange(1 - n, n, device=table.device).abs() for n in (height, width))
    rows = (y[:, None] * width + x).flatten()
    behind = torch.arange(height * width, len(table), device=table.device)
    return table[torch.cat((rows, behind))]


def dense(found: dict[str, Any], name: str) -> Tensor:
    """``[1, H|1, Nq, Nk]``: a table as the map it stands for."""
    height, width, prefix, step = (found[n] for n in GRID)
    t = found[name]
    index = offset_index((height, width), "key-query", t.device, prefix, step)
    return t[:, :, 0][..., index.long()]
