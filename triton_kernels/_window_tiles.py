"""Tiles of window attention, shared by the forward and the backward kernels.

Geometry is integer arithmetic on (window, position); nothing is rolled, padded or partitioned in memory. Maps have four
axes here, the missing ones leading with length 1; AXES says how many are real. Coordinates are tuples, innermost last.
"""

import triton
import triton.language as tl

from ._tiles import load_rows

NO_PADS = tl.constexpr(0)                                   # PADS: the windows divide the map
PADS_HIDDEN = tl.constexpr(1)
PADS_VISIBLE = tl.constexpr(2)


@triton.jit
def axis_slot(window, position, length, count, shift, W: tl.constexpr, SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr):
    """One axis of window_slots: coordinate (at least `length` for a pad), and what the next axis decodes."""
    r = window % count * W + position % W
    p = r
    if SHIFTED:
        padded = count * W
        if ROLL_FIRST:
            p = tl.where(r < length, (r + shift) % length, length)
        else:
            p = tl.where(r + shift >= padded, r + shift - padded, r + shift)
    return p, window // count, position // W


@triton.jit
def window_slots(
    window, position, lengths, counts, shifts,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr,
):  # fmt: skip
    """Coordinates of each position of a window, and whether a token stands there."""
    inside = position < N
    c3, window, position = axis_slot(
        window, position, lengths[3], counts[3], shifts[3], WINDOW[3], SHIFTED, ROLL_FIRST)
    token = c3 < lengths[3]
    c2 = c3 * 0
    c1 = c2
    c0 = c2
    if AXES > 1:
        c2, window, position = axis_slot(
            window, position, lengths[2], counts[2], shifts[2], WINDOW[2], SHIFTED, ROLL_FIRST)
        token &= c2 < lengths[2]
    if AXES > 2:
        c1, window, position = axis_slot(
            window, position, lengths[1], counts[1], shifts[1], WINDOW[1], SHIFTED, ROLL_FIRST)
        token &= c1 < lengths[1]
    if AXES > 3:
        c0, window, position = axis_slot(
            window, position, lengths[0], counts[0], shifts[0], WINDOW[0], SHIFTED, ROLL_FIRST)
        token &= c0 < lengths[0]
    if PADS != NO_PADS:
        inside &= token
    return (c0, c1, c2, c3), inside


@triton.jit
def sides(position, shifts, WINDOW: tl.constexpr, AXES: tl.constexpr, SHIFTED: tl.constexpr):
    """One bit per axis: the position lies at or behind the seam that a shift leaves in the last window of the axis."""
    bits = position * 0
    if SHIFTED:
        bits |= (position % WINDOW[3] >= WINDOW[3] - shifts[3]).to(tl.int32)
        position = position // WINDOW[3]
        if AXES > 1:
            bits |= (position % WINDOW[2] >= WINDOW[2] - shifts[2]).to(tl.int32) * 2
            position = position // WINDOW[2]
        if AXES > 2:
            bits |= (position % WINDOW[1] >= WINDOW[1] - shifts[1]).to(tl.int32) * 4
            position = position // WINDOW[1]
        if AXES > 3:
            bits |= (position % WINDOW[0] >= WINDOW[0] - shifts[0]).to(tl.int32) * 8
    return bits


@triton.jit
def seams(window, counts, AXES: tl.constexpr, SHIFTED: tl.constexpr):
    """One bit per axis on which the window is the last: there two positions are in one region iff their sides agree."""
    bits = window * 0
    if SHIFTED:
        bits |= (window % counts[3] == counts[3] - 1).to(tl.int32)
        window = window // counts[3]
        if AXES > 1:
            bits |= (window % counts[2] == counts[2] - 1).to(tl.int32) * 2
            window = window // counts[2]
        if AXES > 2:
            bits |= (window % counts[1] == counts[1] - 1).to(tl.int32) * 4
            window = window // counts[1]
        if AXES > 3:
            bits |= (window % counts[0] == counts[0] - 1).to(tl.int32) * 8
    return bits


@triton.jit
def token_numbers(coords, lengths):
    """Row-major number of each token in its image."""
    return ((coords[0] * lengths[1] + coords[1]) * lengths[2] + coords[2]) * lengths[3] + coords[3]


@triton.jit
def row_offsets(coords, image, head, strides, AXES: tl.constexpr, ALIGN: tl.constexpr):
    """Element offset of each row; strides are (batch, four axes, head), all multiples of ALIGN."""
    offset = coords[3].to(tl.int64) * strides[4]
    if AXES > 1:
        offset += coords[2].to(tl.int64) * strides[3]
    if AXES > 2:
        offset += coords[1].to(tl.int64) * strides[2]
    if AXES > 3:
        offset += coords[0].to(tl.int64) * strides[1]
    offset += image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[5]
    return tl.multiple_of(offset, ALIGN)


@triton.jit
def load_keys(
    ptr, rows, real, pad, d_stride, pad_ptr, pad_strides, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PADS: tl.constexpr,
):
    """load_rows of keys or values, with the pad vector of the head where `pad` says so: [rows, BLOCK_D]."""
    x = load_rows(ptr, rows, real, d_stride, D, BLOCK_D)
    if PADS == PADS_VISIBLE and pad_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        at = head.to(tl.int64) * pad_strides[0] + d * pad_strides[1]
        vector = tl.load(pad_ptr + at, mask=d < D, other=0.0)                          # [BLOCK_D]
        x = tl.where(pad[:, None], vector[None, :].to(x.dtype), x)
    return x


@triton.jit
def unit_rows(x, eps):
    """x / max(|x|, eps) over the last axis, computed in float32, in x's dtype."""
    f = x.to(tl.float32)
    square = tl.sum(f * f, 1)
    inverse = 1.0 / tl.where(square <= eps * eps, eps, tl.sqrt(square))
    return (f * inverse[:, None]).to(x.dtype)


@triton.jit
def unit_rows_grad(x, dy, eps):
    """Gradient of unit_rows: dy [rows, D] float32 -> dx; below eps the norm is a constant."""
    f = x.to(tl.float32)
    square = tl.sum(f * f, 1)
    small = square <= eps * eps
    inverse = 1.0 / tl.where(small, eps, tl.sqrt(square))
    y = f * inverse[:, None]
    along = tl.where(small, 0.0, tl.sum(y * dy, 1))
    return (dy - along[:, None] * y) * inverse[:, None]


@triton.jit
def load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N: tl.constexpr):
    """Bias of queries i and keys j in float32, from a dense [H, N, N] or a table [R, H]: [i, j]; 0 if there is none."""
    if bias_ptr is None:
        value = 0.0
    else:
        inside = (i < N)[:, None] & (j < N)[None, :]
        if index_ptr is not None:
            at = tl.load(index_ptr + (i[:, None] * index_strides[0] + j[None, :] * index_strides[1]),
                         mask=inside, other=0)
            at = tl.minimum(tl.maximum(at, 0), table_rows - 1) * bias_strides[0]
            base = bias_ptr + head.to(tl.int64) * bias_strides[1]
        else:
            at = i[:, None] * bias_strides[1] + j[None, :] * bias_strides[2]
            base = bias_ptr + head.to(tl.int64) * bias_strides[0]
        value = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def mask_scores(
    s, bias, sides_i, sides_j, seam, visible_j, mask_value,
    HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, HIDE: tl.constexpr, CLIP: tl.constexpr,
):
    """Adds bias and region mask to scaled scores [i, j]; what a row must not see becomes -inf whatever k holds."""
    if HAS_BIAS:
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if SHIFTED:
        differs = (sides_i & seam)[:, None] != (sides_j & seam)[None, :]
        s = tl.where(differs, float("-inf") if HIDE else s + mask_value, s)
    if CLIP:
        s = tl.where(visible_j[None, :], s, float("-inf"))
    return s
