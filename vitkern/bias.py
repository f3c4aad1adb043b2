"""Typed biases: what attention adds to its scores. Each is a small frozen dataclass of tensors and ints.

``.dense(q, k)`` is the definition: the bias as a tensor that broadcasts to the scores.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SIGNS = ("query-key", "key-query", "abs")


@dataclass(frozen=True, eq=False)
class RelativePosition:
    """A learned table of offsets (Swin, Liu et al. 2021, eq. 4): ``bias[h, i, j] = table[index[i, j], h]``.

    ``table [R, H]``: one row per offset. ``index [N, M]`` int32: the row of each pair, in [0, R). Without ``index`` the
    rows follow from the window (or from ``grid``), axes row-major:

    - ``sign="query-key"`` (Swin): ``sum_axis (query - key + w - 1) * stride``, strides of ``2 w - 1`` per axis
    - ``sign="key-query"`` (MaxViT, NAT): the same with ``key - query``
    - ``sign="abs"`` (TinyViT, LeViT): ``|query - key|``, strides of ``w`` per axis

    The gradient goes to ``table``.
    """

    table: Tensor
    index: Tensor | None = None
    grid: tuple[int, ...] | None = None
    sign: str = "query-key"
    prefix_tokens: int = 0

    def rows(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """The index [N, N] int32: the given one, or that of ``sign`` on a window of sides ``grid``."""
        if self.index is not None:
            return self.index
        sides = tuple(self.grid or grid)
        if torch.compiler.is_compiling():
            return offset_index(sides, self.sign, device)
        return _cached_index(sides, self.sign, device)

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[H, N, M]`` for window-major ``q, k [B, N, H, D]``; the grid must be known (``grid`` or ``index``)."""
        if self.index is None and self.grid is None:
            raise ValueError("RelativePosition.dense: needs index or grid, got neither")
        return self.table[self.rows(self.grid or (), q.device).long()].permute(2, 0, 1)


def table_rows(sides: tuple[int, ...], sign: str) -> int:
    """Rows of the table that ``sign`` needs on a window of these sides."""
    return math.prod([w if sign == "abs" else 2 * w - 1 for w in sides])


def offset_index(sides: tuple[int, ...], sign: str, device: torch.device) -> Tensor:
    """Row of the table for every pair of positions of a window, ``[N, N]`` int32."""
    n = math.prod(sides)
    position = torch.arange(n, device=device)
    index = torch.zeros(n, n, dtype=torch.int64, device=device)
    inner = n
    for w in sides:
        inner //= w
        c = position // inner % w  # [N] coordinate on this axis
        offset = c[:, None] - c[None, :]  # [N, N] query - key
        if sign == "abs":
            index = index * w + offset.abs()
        else:
            index = index * (2 * w - 1) + (offset if sign == "query-key" else -offset) + w - 1
    return index.to(torch.int32)


@lru_cache(maxsize=64)
def _cached_index(sides: tuple[int, ...], sign: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        return offset_index(sides, sign, device)
