"""Typed biases: what attention adds to its scores. Each is a small frozen dataclass of tensors and ints.

``.dense(q, k)`` is the definition: the bias as a tensor that broadcasts to the scores ``[B, H, Nq, Nk]`` of
``q [B, Nq, H, D]`` and ``k [B, Nk, Hk, D]``. Grids are row-major, rows first. Gradients go to every floating-point field.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vitkern._constants import constant
from vitkern._export import exportable
from vitkern.ops._sharded import like

SIGNS = ("query-key", "key-query", "abs")


@exportable
@dataclass(frozen=True, eq=False)
class RelativePosition:
    """A learned table of offsets (Swin, Liu et al. 2021, eq. 4): ``bias[h, i, j] = table[index[i, j], h]``.

    ``table [R, H]``: one row per offset. ``index [N, M]`` int32: the row of each pair, in [0, R). Without ``index`` the
    rows follow from the window (or from ``grid``), axes row-major:

    - ``sign="query-key"`` (Swin): ``sum_axis (query - key + w - 1) * stride``, strides of ``2 w - 1`` per axis
    - ``sign="key-query"`` (MaxViT, NAT): the same with ``key - query``
    - ``sign="abs"`` (TinyViT, LeViT): ``|query - key|``, strides of ``w`` per axis

    ``prefix_tokens=p`` (BEiT): p tokens before the grid, whose rows are the last three of the table: prefix to token,
    token to prefix, prefix to prefix. ``q_stride=t`` (LeViT): the queries are every t-th position of the grid's axes.
    """

    table: Tensor
    index: Tensor | None = None
    grid: tuple[int, ...] | None = None
    sign: str = "query-key"
    prefix_tokens: int = 0
    q_stride: int = 1

    def rows(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """The index [Nq, Nk] int32: the given one, or that of ``sign`` on a window of sides ``grid``."""
        if self.index is not None:
            return self.index
        sides = tuple(self.grid or grid)
        make = offset_index if torch.compiler.is_compiling() else _cached_index
        return make(sides, self.sign, device, self.prefix_tokens, self.q_stride)

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[H, Nq, Nk]``; the grid must be known (``grid`` or ``index``)."""
        if self.index is None and self.grid is None:
            raise ValueError("RelativePosition.dense: needs index or grid, got neither")
        return self.table[self.rows(self.grid or (), q.device).long()].permute(2, 0, 1)


def table_rows(sides: tuple[int, ...], sign: str, prefix_tokens: int = 0) -> int:
    """Rows of the table that ``sign`` needs on a window of these sides."""
    return math.prod([w if sign == "abs" else 2 * w - 1 for w in sides]) + (3 if prefix_tokens else 0)


def offset_index(
    sides: tuple[int, ...], sign: str, device: torch.device, prefix_tokens: int = 0, q_stride: int = 1
) -> Tensor:
    """Row of the table for every pair of positions, ``[Nq, Nk]`` int32."""
    n = math.prod(sides)
    position = torch.arange(n, device=device)
    chosen = torch.ones(n, dtype=torch.bool, device=device)
    index = torch.zeros(n, n, dtype=torch.int64, device=device)
    inner = n
    for w in sides:
        inner //= w
        c = position // inner % w  # [N] coordinate on this axis
        chosen = chosen & (c % q_stride == 0)
        offset = c[:, None] - c[None, :]  # [N, N] query - key
        if sign == "abs":
            index = index * w + offset.abs()
        else:
            index = index * (2 * w - 1) + (offset if sign == "query-key" else -offset) + w - 1
    if q_stride > 1:
        index = index[chosen]  # [Nq, N]
    if prefix_tokens:
        last = table_rows(sides, sign, prefix_tokens)
        index = torch.nn.functional.pad(index, (prefix_tokens, 0), value=last - 2)
        top = torch.full((prefix_tokens, index.shape[1]), last - 3, device=device)
        top[:, :prefix_tokens] = last - 1
        index = torch.cat((top, index))
    return index.to(torch.int32)


@lru_cache(maxsize=64)
def _cached_index(sides: tuple[int, ...], sign: str, device: torch.device, prefix_tokens: int, q_stride: int) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        return offset_index(sides, sign, device, prefix_tokens, q_stride)


@exportable
@dataclass(frozen=True, eq=False)
class PerHeadGroup:
    """A bias for each of the equal groups that the heads of ``window_attention`` are split into, in order (CSWin, Dong et al.
    2022): tensors, biases of this module, or None."""

    biases: tuple[object, ...]


@exportable
@dataclass(frozen=True, eq=False)
class DecomposedRelativePosition:
    """Rows and columns apart (MViTv2, Li et al. 2022; SAM): ``q_i . rel_h[dy] + q_i . rel_w[dx]``, q without scale.

    ``rel_h [2 max(qh, kh) - 1, D]``, ``rel_w`` likewise, shared by the heads; per axis the row is
    ``floor(a max(nk/nq, 1) - b max(nq/nk, 1) + (nk - 1) max(nq/nk, 1))`` for query a and key b. With ``q_grid=None`` the
    two are given for every query: ``rel_h [B|1, Nq, H|1, kh]``, ``rel_w [B|1, Nq, H|1, kw]`` (Plain-DETR).
    """

    rel_h: Tensor
    rel_w: Tensor
    q_grid: tuple[int, int] | None
    k_grid: tuple[int, int]

    @classmethod
    def resized(
        cls, rel_h: Tensor, rel_w: Tensor, q_grid: tuple[int, int], k_grid: tuple[int, int]
    ) -> "DecomposedRelativePosition":
        """Of tables that were learned on other grids: resized linearly, per axis, to the rows that these grids need."""
        tables = []
        for table, a, b in zip((rel_h, rel_w), q_grid, k_grid, strict=True):
            rows = 2 * max(a, b) - 1
            if len(table) != rows:
                table = torch.nn.functional.interpolate(table.t()[None], size=rows, mode="linear")[0].t()
            tables.append(table)
        return cls(tables[0], tables[1], q_grid, k_grid)

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, Nq, Nk]``."""
        rows, columns = self.per_query(q)
        return (rows[..., :, None] + columns[..., None, :]).flatten(3).transpose(1, 2)  # [B, H, Nq, kh kw]

    def per_query(self, q: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each query adds to the rows and to the columns of the keys: ``[B|1, Nq, H|1, kh]``, ``[B|1, Nq, H|1, kw]``. `places`
        ``[Nq]``: where the queries stand on their grid, if not in its order."""
        acc = torch.promote_types(q.dtype, torch.float32)
        if self.q_grid is None:
            return self.rel_h.to(acc), self.rel_w.to(acc)
        learns = self.rel_h.requires_grad or self.rel_w.requires_grad
        queries = finite(q.to(acc), learns)
        if places is not None:
            return self._at(queries, places.clamp(0, math.prod(self.q_grid) - 1))
        queries = queries.unflatten(1, self.q_grid)  # [B, qh, qw, H, D]
        tables = [  # [qh, kh, D] and [qw, kw, D]
            torch.nn.functional.embedding(like(_axis_rows(a, b, q.device), q), like(table.to(acc), q))
            for table, a, b in zip((self.rel_h, self.rel_w), self.q_grid, self.k_grid, strict=True)
        ]
        rows = torch.einsum("byxhd,yud->byxhu", queries, tables[0]).flatten(1, 2)  # [B, Nq, H, kh]
        columns = torch.einsum("byxhd,xwd->byxhw", queries, tables[1]).flatten(1, 2)  # [B, Nq, H, kw]
        return rows, columns

    def _at(self, queries: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """per_query by products with all rows of the tables, of which each query takes its own."""
        assert self.q_grid is not None
        width, found = self.q_grid[1], []
        axes = (self.rel_h, places // width, 0), (self.rel_w, places % width, 1)
        for table, place, axis in axes:
            rows = _axis_rows(self.q_grid[axis], self.k_grid[axis], queries.device)[place]  # [Nq, k]
            products = torch.einsum("bihd,rd->bihr", queries, table.to(queries.dtype))
            found.append(products.gather(3, rows[None, :, None].expand(*queries.shape[:3], -1)))
        return found[0], found[1]


def _axis_rows(queries: int, keys: int, device: torch.device) -> Tensor:
    """The row of the table of every pair on one axis, int64 [queries, keys]."""
    stretch_q, stretch_k = max(keys / queries, 1.0), max(queries / keys, 1.0)
    a = torch.arange(queries, device=device)[:, None] * stretch_q
    b = torch.arange(keys, device=device)[None, :] * stretch_k
    return (a - b + (keys - 1) * stretch_k).long()


@exportable
@dataclass(frozen=True, eq=False)
class KeyBias:
    """The same for every query: ``bias[b, h, i, j] = vector[b, h, j]``, ``vector [B|1, H|1, Nk]``. ``log(size)`` is the
    proportional attention of token merging (Bolya et al. 2023, eq. 1); ``-inf`` hides a key."""

    vector: Tensor

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B|1, H|1, 1, Nk]``."""
        return self.vector[:, :, None, :]


@exportable
@dataclass(frozen=True, eq=False)
class RowBias:
    """The same for every key: ``bias[b, h, i, j] = vector[b, h, i]``, ``vector [B|1, H|1, Nq]``. Softmax does not see it;
    sigmoid attention (Ramapuram et al. 2024) takes ``-log n``."""

    vector: Tensor

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B|1, H|1, Nq, 1]``."""
        return self.vector[:, :, :, None]


@exportable
@dataclass(frozen=True, eq=False)
class ManhattanDecay:
    """``rate_h (|dy| + |dx|)`` on a grid (RMT, Fan et al. 2024), ``rate [H]``. ``place="prob"`` multiplies the weights by
    its exponential instead, not renormalised (the paper's form)."""

    rate: Tensor
    grid: tuple[int, int]
    place: str = "logit"

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[H, N, N]``."""
        rows, columns = self.per_query(q)
        return (rows[..., :, None] + columns[..., None, :]).flatten(3)[0].transpose(0, 1)

    def per_query(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """What each query adds to the rows and to the columns of the keys: ``[1, N, H, gh]``, ``[1, N, H, gw]``."""
        xy = coordinates(self.grid, q.device)  # [N, 2]
        sides = [torch.arange(n, device=q.device, dtype=xy.dtype) for n in self.grid]
        rows, columns = ((xy[:, axis, None] - sides[axis]).abs() for axis in (0, 1))  # [N, gh], [N, gw]
        return self.rate[:, None] * rows[None, :, None], self.rate[:, None] * columns[None, :, None]


@exportable
@dataclass(frozen=True, eq=False)
class EuclideanDistance:
    """``-slope_h |p_i - p_j|`` (CROMA, Fuller et al. 2023), ``slope [H]``, coordinates ``q_xy [B|1, Nq, 2]`` and
    ``k_xy [B|1, Nk, 2]`` with gradients, 0 where a key stands on its query."""

    slope: Tensor
    q_xy: Tensor
    k_xy: Tensor

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B|1, H, Nq, Nk]``."""
        nowhere = [~xy.isfinite().all(-1) for xy in (self.q_xy, self.k_xy)]  # [B|1, N]
        q_xy, k_xy = (finite(xy, True) for xy in (self.q_xy, self.k_xy))
        square = (q_xy[:, :, None] - k_xy[:, None, :]).square().sum(-1)  # [B|1, Nq, Nk]
        distance = (
            square.masked_fill(square == 0, 1.0).sqrt().masked_fill(square == 0, 0.0)
        )  # never differentiated at 0
        none = nowhere[0][:, None, :, None] | nowhere[1][:, None, None, :]
        return (-self.slope[:, None, None] * distance[:, None]).masked_fill(none, math.nan)


@exportable
@dataclass(frozen=True, eq=False)
class PolylinePath:
    """The decay along a row, then along a column (PPMA, Zhao et al. 2025). ``row, col [B, Hs, Ws, H]`` are log-decays.

    For query (y, x) and key (y', x'): ``W + C``, ``W = A[y, max(x, x')] - A[y, min(x, x')]`` with A the prefix sums of
    ``row`` along x, and ``C = S[max(y, y'), x'] - S[min(y, y'), x']`` with S those of ``col`` along y. ``transpose=True``
    exchanges query and key.
    """

    row: Tensor
    col: Tensor
    transpose: bool = False

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, N, N]``."""
        return self._of(torch.arange(q.shape[1], device=self.row.device))

    def of_queries(self, queries: Sequence[int]) -> Tensor:
        """``[B, H, R, N]``: the rows of these queries."""
        return self._of(constant(queries, self.row.device))

    def _of(self, i: Tensor) -> Tensor:
        acc = torch.promote_types(self.row.dtype, torch.float32)
        along, down = self.row.to(acc).cumsum(2), self.col.to(acc).cumsum(1)  # [B, Hs, Ws, H]
        height, width = self.row.shape[1:3]
        qy, qx = (t[:, None, None] for t in (i // width, i % width))  # [R, 1, 1]
        y, x = torch.arange(height, device=i.device)[:, None], torch.arange(width, device=i.device)  # [Hs, 1], [Ws]
        rows, columns = (y, qx) if self.transpose else (qy, x)
        w = along[:, rows, torch.maximum(x, qx)] - along[:, rows, torch.minimum(x, qx)]  # [B, R, 1|Hs, Ws, H]
        c = down[:, torch.maximum(y, qy), columns] - down[:, torch.minimum(y, qy), columns]  # [B, R, Hs, 1|Ws, H]
        return (w + c).flatten(2, 3).permute(0, 3, 1, 2)


@exportable
@dataclass(frozen=True, eq=False)
class ContextualPosition:
    """Offsets that meet the content (iRPE, Wu et al. 2021; Shaw et al. 2018): ``q_i . q_table[I] + k_j . k_table[I]`` on the
    scores and ``v_table[I]`` added to the values, ``I = index[i, j]``; tables ``[n, H|1, D]``, any of them None."""

    q_table: Tensor | None
    k_table: Tensor | None
    v_table: Tensor | None
    index: Tensor  # [Nq, Nk] or [B, Nq, Nk]

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, Nq, Nk]``: what is added to the scores."""
        heads = q.shape[2]
        acc = torch.promote_types(q.dtype, torch.float32)
        keys = k.repeat_interleave(heads // k.shape[2], 2)
        total = q.new_zeros(1, dtype=acc)
        for table, x, equation in (
            (self.q_table, q, "bihd,bijhd->bhij"),
            (self.k_table, keys, "bjhd,bijhd->bhij"),
        ):
            if table is not None:
                rows = self._looked_up(table, heads, len(q)).to(acc)
                total = total + torch.einsum(equation, finite(x.to(acc), table.requires_grad), rows)
        return total

    def value(self, p: Tensor) -> Tensor:
        """What the weights ``p [B, H, Nq, Nk]`` add to the output: ``[B, H, Nq, Dv]``."""
        assert self.v_table is not None
        return torch.einsum("bhij,bijhd->bhid", p, self._looked_up(self.v_table, p.shape[1], len(p)).to(p.dtype))

    def _looked_up(self, table: Tensor, heads: int, batch: int) -> Tensor:
        """``[B, Nq, Nk, H, D]``."""
        return table.expand(-1, heads, -1)[self.index.long()].expand(batch, -1, -1, -1, -1)


def finite(x: Tensor, learns: bool) -> Tensor:
    """Where something that multiplies x learns: x, and 0 where it is not finite, for 0 times a NaN that a mask hides would be
    its gradient. The scores of such a token are NaN without it too."""
    return torch.where(x.isfinite(), x, 0.0) if learns else x


def coordinates(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The (row, column) of every token of a grid, float32 [N, 2]."""
    y, x = (torch.arange(n, device=device, dtype=torch.float32) for n in grid)
    return torch.stack((y[:, None].expand(grid), x[None, :].expand(grid)), -1).flatten(0, 1)
