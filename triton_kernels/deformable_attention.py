"""deformable_attention on a GPU: a program takes one head of a block of queries, or one cell and head of the value's gradient.

The meaning of every argument is that of the reference, vitkern/reference/deformable_attention.py. Places and sums are float32.
No atomics: the backward sorts the points by their left upper cell, and each cell adds those that reach it, in the order of the
sort. A sum of integers, scaled by a first pass over the products, would be as repeatable, but one infinite gradient would take
its whole slice along, and every cell would pass through a sum of eight bytes a channel.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power

SIZES = ("levels", "count", "queries", "heads", "cells", "padded", "slices")
TILE = 2048                             # elements of a program's rows of channels


@triton.jit
def _level(table_ptr, level):
    """Height, width and points of a level, and where its points begin in a row of locations and of weights."""
    row = table_ptr + level * 8
    return (tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32), tl.load(row + 3),
            tl.load(row + 4))  # fmt: skip


@triton.jit
def place_of(loc_ptr, at, real, axis, height, width, NEAREST: tl.constexpr, PIXELS: tl.constexpr = False):
    """Which of the places `at` are somewhere, their left upper cells (float), and how far behind those they lie. With PIXELS
    they count in those, from the centre of the first cell."""
    x = tl.load(loc_ptr + at, mask=real, other=0.0).to(tl.float32)
    y = tl.load(loc_ptr + at + axis, mask=real, other=0.0).to(tl.float32)
    if NEAREST:
        alive = real & (tl.abs(x) < float("inf")) & (tl.abs(y) < float("inf"))
        left = tl.minimum(tl.maximum(tl.floor(tl.where(alive, x, 0.0) * width + 0.5), 0.0), width - 1.0)
        top = tl.minimum(tl.maximum(tl.floor(tl.where(alive, y, 0.0) * height + 0.5), 0.0), height - 1.0)
        return alive, left, top, left * 0.0, top * 0.0
    u = x if PIXELS else x * width - 0.5
    v = y if PIXELS else y * height - 0.5
    alive = real & (u > -1.0) & (u < width) & (v > -1.0) & (v < height)
    u = tl.where(alive, u, 0.0)
    v = tl.where(alive, v, 0.0)
    left = tl.floor(u)
    top = tl.floor(v)
    return alive, left, top, u - left, v - top


@triton.jit
def _corner(value_ptr, alive, row, column, height, width, token, d, channels):
    """The cells (row, column) of a level, 0 outside of it: [queries, BLOCK_D]."""
    inside = alive & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    cell = (row.to(tl.int64) * width + column) * token
    return tl.load(value_ptr + cell[:, None] + d[None, :], mask=inside[:, None] & channels[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    value_ptr, loc_ptr, weight_ptr, out_ptr, table_ptr, value_strides, loc_strides, weight_strides, levels, queries, heads,
    NEAREST: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, D], contiguous. Grid: heads (fastest) x blocks of queries x images, on axis 0.
    Any strides: value (image, token, head, channel), locations and weights (image, query, head, point, axis)."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    head = (tl.program_id(0) % heads).to(tl.int64)
    image = (tl.program_id(0) // heads // blocks).to(tl.int64)
    query = tl.program_id(0) // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    real = query < queries
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    steps = d.to(tl.int64) * value_strides[3]
    loc = image * loc_strides[0] + query * loc_strides[1] + head * loc_strides[2]      # [BLOCK_Q]
    weight = image * weight_strides[0] + query * weight_strides[1] + head * weight_strides[2]
    value_ptr += image * value_strides[0] + head * value_strides[2]
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(0, levels):
        height, width, points, loc_level, weight_level = _level(table_ptr, level)
        for p in range(0, points):
            alive, left, top, fx, fy = place_of(
                loc_ptr, loc + loc_level + p * loc_strides[3], real, loc_strides[4], height, width, NEAREST)
            a = tl.load(weight_ptr + weight + weight_level + p * weight_strides[3], mask=alive, other=0.0).to(tl.float32)
            row = top.to(tl.int32)
            column = left.to(tl.int32)
            found = _corner(value_ptr, alive, row, column, height, width, value_strides[1], steps, channels)
            acc += (a * (1 - fy) * (1 - fx))[:, None] * found
            if not NEAREST:
                found = _corner(value_ptr, alive, row, column + 1, height, width, value_strides[1], steps, channels)
                acc += (a * (1 - fy) * fx)[:, None] * found
                found = _corner(value_ptr, alive, row + 1, column, height, width, value_strides[1], steps, channels)
                acc += (a * fy * (1 - fx))[:, None] * found
                found = _corner(value_ptr, alive, row + 1, column + 1, height, width, value_strides[1], steps, channels)
                acc += (a * fy * fx)[:, None] * found
        value_ptr += (height * width).to(tl.int64) * value_strides[1]
    at = ((image * queries + query) * heads + head) * D
    tl.store(out_ptr + at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & channels[None, :])


@triton.jit(do_not_specialize=SIZES)
def _places(
    value_ptr, loc_ptr, weight_ptr, dout_ptr, dloc_ptr, dweight_ptr, key_ptr, table_ptr, value_strides, loc_strides,
    weight_strides, dout_strides, levels, count, queries, heads, padded, slices,
    NEAREST: tl.constexpr, PIXELS: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Where asked for: dlocations [B, N, H, J, 2] and dweights [B, N, H, J], and of every point its left upper cell as a key
    [B, N, H, J] among the `padded` cells of its image and head, where every level has a row and a column in front; a point
    that is nowhere gets `slices` times `padded`. All contiguous. Grid and strides as in _forward, dout like value."""
    blocks = tl.cdiv(queries, BLOCK_Q)
    head = (tl.program_id(0) % heads).to(tl.int64)
    image = (tl.program_id(0) // heads // blocks).to(tl.int64)
    query = tl.program_id(0) // heads % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q).to(tl.int64)
    real = query < queries
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    steps = d.to(tl.int64) * value_strides[3]
    loc = image * loc_strides[0] + query * loc_strides[1] + head * loc_strides[2]      # [BLOCK_Q]
    weight = image * weight_strides[0] + query * weight_strides[1] + head * weight_strides[2]
    value_ptr += image * value_strides[0] + head * value_strides[2]
    at = ((image * queries + query) * heads + head) * count                            # [BLOCK_Q]
    if dweight_ptr is not None or dloc_ptr is not None:
        rows = image * dout_strides[0] + query * dout_strides[1] + head * dout_strides[2]
        g = tl.load(dout_ptr + rows[:, None] + d.to(tl.int64)[None, :] * dout_strides[3],
                    mask=real[:, None] & channels[None, :], other=0.0).to(tl.float32)  # [BLOCK_Q, BLOCK_D]
    first = (image * heads + head) * padded                                            # the level's first key
    for level in range(0, levels):
        height, width, points, loc_level, weight_level = _level(table_ptr, level)
        for p in range(0, points):
            alive, left, top, fx, fy = place_of(
                loc_ptr, loc + loc_level + p * loc_strides[3], real, loc_strides[4], height, width, NEAREST, PIXELS)
            row = top.to(tl.int32)
            column = left.to(tl.int32)
            if key_ptr is not None:
                key = first + (row + 1).to(tl.int64) * (width + 1) + column + 1
                key = tl.where(alive, key, slices.to(tl.int64) * padded)
                tl.store(key_ptr + at + p, key.to(key_ptr.dtype.element_ty), mask=real)
            if dweight_ptr is not None or dloc_ptr is not None:
                found = _corner(value_ptr, alive, row, column, height, width, value_strides[1], steps, channels)
                s00 = tl.sum(g * found, 1)                                             # [BLOCK_Q]
                da, dx, dy = s00, s00 * 0.0, s00 * 0.0
                if not NEAREST:
                    found = _corner(value_ptr, alive, row, column + 1, height, width, value_strides[1], steps, channels)
                    s01 = tl.sum(g * found, 1)
                    found = _corner(value_ptr, alive, row + 1, column, height, width, value_strides[1], steps, channels)
                    s10 = tl.sum(g * found, 1)
                    found = _corner(value_ptr, alive, row + 1, column + 1, height, width, value_strides[1], steps, channels)
                    s11 = tl.sum(g * found, 1)
                    da = (1 - fy) * ((1 - fx) * s00 + fx * s01) + fy * ((1 - fx) * s10 + fx * s11)
                    dx = (1 - fy) * (s01 - s00) + fy * (s11 - s10)
                    dy = (1 - fx) * (s10 - s00) + fx * (s11 - s01)
                if dweight_ptr is not None:
                    da = tl.where(alive, da, 0.0)
                    tl.store(dweight_ptr + at + p, da.to(dweight_ptr.dtype.element_ty), mask=real)
                if dloc_ptr is not None:
                    a = tl.load(weight_ptr + weight + weight_level + p * weight_strides[3], mask=alive, other=0.0)
                    a = a.to(tl.float32)
                    dx = tl.where(alive & (NEAREST == 0), a * width * dx, 0.0)
                    dy = tl.where(alive & (NEAREST == 0), a * height * dy, 0.0)
                    tl.store(dloc_ptr + (at + p) * 2, dx.to(dloc_ptr.dtype.element_ty), mask=real)
                    tl.store(dloc_ptr + (at + p) * 2 + 1, dy.to(dloc_ptr.dtype.element_ty), mask=real)
        value_ptr += (height * width).to(tl.int64) * value_strides[1]
        first += (height + 1).to(tl.int64) * (width + 1)
        at += points


@triton.jit(do_not_specialize=SIZES)
def _cells(
    loc_ptr, weight_ptr, dout_ptr, order_ptr, first_ptr, dvalue_ptr, table_ptr, loc_strides, weight_strides, dout_strides,
    levels, count, queries, heads, cells, padded,
    NEAREST: tl.constexpr, PIXELS: tl.constexpr, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dvalue [B, S, H, D], contiguous, of one cell and head: the points whose left upper cell is this one or one of three
    neighbours. order names the points [B, N, H, J] by their keys, first [keys + 1] where each key begins.
    Grid: heads (fastest) x cells x images, on axis 0. Strides as in _places."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    image = (tl.program_id(0) // heads // cells).to(tl.int64)
    cell = tl.program_id(0) // heads % cells
    own = 0                                                                            # the level of the cell
    for level in range(1, levels):
        own = tl.where(cell >= tl.load(table_ptr + level * 8 + 5), level, own)
    height, width, points, loc, weight = _level(table_ptr, own)
    start = tl.load(table_ptr + own * 8 + 5).to(tl.int32)
    key = tl.load(table_ptr + own * 8 + 6)
    before = tl.load(table_ptr + own * 8 + 7)
    row = (cell - start) // width
    column = (cell - start) % width
    loc_ptr += loc + image * loc_strides[0] + head * loc_strides[2]
    weight_ptr += weight + image * weight_strides[0] + head * weight_strides[2]
    dout_ptr += image * dout_strides[0] + head * dout_strides[2]
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    place = first_ptr + (image * heads + head) * padded + key + (row + 1).to(tl.int64) * (width + 1) + column + 1
    for side in tl.static_range(1 if NEAREST else 2):                                  # the row above, and this one
        near = place
        if not NEAREST:
            near = place - 1 - (1 - side) * (width + 1)
        stop = tl.load(near + (1 if NEAREST else 2))
        for at in range(tl.load(near), stop, BLOCK_E):
            e = at + tl.arange(0, BLOCK_E)
            real = e < stop
            point = tl.load(order_ptr + e, mask=real, other=0)                         # [BLOCK_E]
            query = tl.where(real, point // count // heads - image * queries, 0).to(tl.int64)
            p = tl.where(real, point % count - before, 0)
            alive, left, top, fx, fy = place_of(
                loc_ptr, query * loc_strides[1] + p * loc_strides[3], real, loc_strides[4], height, width, NEAREST, PIXELS)
            a = tl.load(weight_ptr + query * weight_strides[1] + p * weight_strides[3], mask=alive, other=0.0).to(tl.float32)
            if not NEAREST:
                a *= tl.where(left == column, 1 - fx, fx) * tl.where(top == row, 1 - fy, fy)
            g = tl.load(dout_ptr + (query * dout_strides[1])[:, None] + d.to(tl.int64)[None, :] * dout_strides[3],
                        mask=alive[:, None] & channels[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(a[:, None] * g, 0)
    to = ((image * cells + cell) * heads + head) * D
    tl.store(dvalue_ptr + to + d, acc.to(dvalue_ptr.dtype.element_ty), mask=channels)


def supported(value, locations, weights, shapes, points, nearest, normalize) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("value", value, not isinstance(_forward, triton.JITFunction))
    for name, t in (("value", value), ("locations", locations), ("weights", weights)):
        if t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if max(shapes) >= 2**24 or value.shape[1] >= 2**31:
        why.append(f"a level must have sides below 2^24 and all fewer than 2^31 cells, got {list(shapes)}")
    return why


@functools.lru_cache(maxsize=256)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Kept: a copy to the device waits for it, and cannot be captured."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _arguments(locations: Tensor, weights: Tensor, shapes: list[int], points: list[int]) -> dict:
    """The strides (image, query, head, point, axis), the sizes, and a table of the levels: height, width, points; where its
    points begin in locations and weights; the cells, the keys and the points of the levels before."""
    rows, start, keys, before = [], 0, 0, 0
    for level, (height, width, n) in enumerate(zip(shapes[::2], shapes[1::2], points, strict=True)):
        begins = (
            level * t.stride(3) if t.shape[3] > 1 else before * t.stride(4) for t in (locations, weights)
        )
        rows.append((height, width, n, *begins, start, keys, before))
        start, keys, before = start + height * width, keys + (height + 1) * (width + 1), before + n
    strides = {
        f"{name}_strides": (*t.stride()[:3], *t.stride()[4:]) for name, t in (("loc", locations), ("weight", weights))
    }
    return strides | {
        "table_ptr": _table(tuple(rows), locations.device), "levels": len(points), "queries": locations.shape[1],
        "heads": locations.shape[2],
    }  # fmt: skip


def _tile(dim: int) -> dict[str, int]:
    block = power(dim)
    return {"D": dim, "BLOCK_D": block, "BLOCK_Q": max(8, TILE // block), "num_warps": 4, "enable_fp_fusion": True}


def _normalized(weights: Tensor) -> Tensor:
    return weights.float().flatten(3).softmax(-1).view(weights.shape)


def fwd(value, locations, weights, shapes, points, nearest, normalize) -> Tensor:
    """out [B, N, H, D], contiguous."""
    batch, _, heads, dim = value.shape
    out = torch.empty((batch, locations.shape[1], heads, dim), dtype=value.dtype, device=value.device)
    if not out.numel():
        return out
    weights = _normalized(weights) if normalize else weights
    given, tile = _arguments(locations, weights, shapes, points), _tile(dim)
    grid = (heads * triton.cdiv(locations.shape[1], tile["BLOCK_Q"]) * batch,)
    _forward[grid](value, locations, weights, out, value_strides=value.stride(), **given, NEAREST=nearest, **tile)
    return out


def _padded(shapes: list[int]) -> int:
    """The keys of an image and head: its levels have a row and a column in front."""
    return sum((h + 1) * (w + 1) for h, w in zip(shapes[::2], shapes[1::2], strict=True))


def _keys(slices: int, shapes: list[int], points: int, device: torch.device) -> Tensor:
    kind = torch.int32 if slices * _padded(shapes) < 2**31 else torch.int64
    return torch.empty(points, dtype=kind, device=device)


def _sum_cells(dvalue, keys, dout, locations, weights, given, shapes, count, nearest, pixels) -> None:
    """Fills dvalue [B, S, H, D] with what the points [B, N, H, J], known by their keys, add to their cells."""
    batch, cells, heads, dim = dvalue.shape
    padded, device = _padded(shapes), dvalue.device
    ordered, order = torch.sort(keys, stable=True)
    first = torch.searchsorted(ordered, torch.arange(batch * heads * padded + 1, dtype=ordered.dtype, device=device))
    block = power(dim)
    _cells[(heads * cells * batch,)](
        locations, weights, dout, order, first, dvalue, dout_strides=dout.stride(), **given, count=count,
        cells=cells, padded=padded, NEAREST=nearest, PIXELS=pixels, D=dim, BLOCK_D=block, BLOCK_E=16,
        num_warps=1 if block <= 64 else 4, enable_fp_fusion=True,
    )  # fmt: skip


def scatter(rows: Tensor, locations: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[B, height width, H, D]: rows [B, N, H, D] added to the four cells around locations [B, N, H, 2] in pixels, in a fixed
    order."""
    batch, queries, heads, dim = rows.shape
    out = torch.empty((batch, height * width, heads, dim), dtype=dtype, device=rows.device)
    if not rows.numel():
        return out.zero_()
    locations, shapes = locations[:, :, :, None, None], [height, width]
    weights = rows.new_ones(()).expand(locations.shape[:-1])
    given, tile = _arguments(locations, weights, shapes, [1]), _tile(dim)
    keys = _keys(batch * heads, shapes, batch * queries * heads, rows.device)
    grid = (heads * triton.cdiv(queries, tile["BLOCK_Q"]) * batch,)
    _places[grid](
        rows, locations, weights, None, None, None, keys, value_strides=(0, 0, 0, 0), dout_strides=(0, 0, 0, 0),
        **given, count=1, padded=_padded(shapes), slices=batch * heads, NEAREST=False, PIXELS=True, **tile,
    )  # fmt: skip
    _sum_cells(out, keys, rows, locations, weights, given, shapes, 1, False, True)
    return out


def bwd(
    dout, value, locations, weights, shapes, points, nearest, normalize, need
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dvalue, dlocations and dweights, contiguous, where bits 0 to 2 of need ask for them."""
    batch, cells, heads, dim = value.shape
    queries, count, device = locations.shape[1], sum(points), value.device
    soft = _normalized(weights) if normalize else weights
    dvalue, dlocations, dweights = (
        torch.empty(t.shape, dtype=t.dtype, device=device) if need >> bit & 1 else None
        for bit, t in enumerate((value, locations, weights))
    )
    dsoft = torch.empty_like(soft) if normalize and need & 4 else dweights
    if not batch * queries * count:
        return None if dvalue is None else dvalue.zero_(), dlocations, dweights
    given, tile = _arguments(locations, soft, shapes, points), _tile(dim)
    keys = _keys(batch * heads, shapes, batch * queries * heads * count, device) if need & 1 else None
    grid = (heads * triton.cdiv(queries, tile["BLOCK_Q"]) * batch,)
    _places[grid](
        value, locations, soft, dout, dlocations, dsoft, keys, value_strides=value.stride(), dout_strides=dout.stride(),
        **given, count=count, padded=_padded(shapes), slices=batch * heads, NEAREST=nearest, PIXELS=False, **tile,
    )  # fmt: skip
    if dvalue is not None:
        _sum_cells(dvalue, keys, dout, locations, soft, given, shapes, count, nearest, False)
    if normalize and dweights is not None:
        mean = (soft * dsoft).flatten(3).sum(3)[..., None, None]
        dweights = (soft * (dsoft - mean)).to(weights.dtype)
    return dvalue, dlocations, dweights
