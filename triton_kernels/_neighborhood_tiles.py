"""Tiles of neighbourhood attention: which slots a token sees, boxes of keys, and offsets.

Maps have three axes here, the missing ones leading with length 1. Coordinates are tuples; inside a group of tokens of equal
coordinate mod dilation they count in steps of it. The formulas are those of vitkern/reference/neighborhood_attention.py.
"""

import triton
import triton.language as tl

from ._tiles import LOG2E


@triton.jit
def slots(i, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr):
    """One axis: the first slot of a query, and one behind its last visible key."""
    if CAUSAL:
        start = tl.maximum(tl.minimum(i // STRIDE * STRIDE + (STRIDE - 1), size - 1) - (KERNEL - 1), 0)
        end = tl.minimum(start + KERNEL, i + 1)
    else:
        start = tl.minimum(i // STRIDE * STRIDE + STRIDE // 2, size - 1) - KERNEL // 2
        if not ZERO:
            start = tl.minimum(tl.maximum(start, 0), size - KERNEL)
        end = start + KERNEL
    return start, end


@triton.jit
def reach(first, last, size, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr):
    """One axis: bounds [from, to) of the queries that see one of the keys first .. last."""
    if CAUSAL:
        least, most = first, last + KERNEL
    else:
        least = first - (KERNEL - 1) + KERNEL // 2 - STRIDE // 2
        most = last + KERNEL // 2 + STRIDE - STRIDE // 2
        if not ZERO:
            least = tl.where(first <= KERNEL - 1, 0, least)
            most = tl.where(last >= size - KERNEL, size, most)
    return tl.maximum(least, 0), tl.minimum(most, size)


@triton.jit
def group_of(number, lengths, DILATION: tl.constexpr):
    """The coordinates mod dilation of a group, and its sides."""
    g2 = number % DILATION[2]
    g1 = number // DILATION[2] % DILATION[1]
    g0 = number // DILATION[2] // DILATION[1]
    s0 = (lengths[0] - g0 + DILATION[0] - 1) // DILATION[0]
    s1 = (lengths[1] - g1 + DILATION[1] - 1) // DILATION[1]
    s2 = (lengths[2] - g2 + DILATION[2] - 1) // DILATION[2]
    return (g0, g1, g2), (s0, s1, s2)


@triton.jit
def tile_of(number, counts, TILE: tl.constexpr):
    """The first coordinates of a tile, and those of its tokens, [tokens of a tile] each."""
    f2 = number % counts[2] * TILE[2]
    f1 = number // counts[2] % counts[1] * TILE[1]
    f0 = number // counts[2] // counts[1] * TILE[0]
    m = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    return (f0, f1, f2), (f0 + m // (TILE[1] * TILE[2]), f1 + m // TILE[2] % TILE[1], f2 + m % TILE[2])


@triton.jit
def inside(c, sizes):
    """Whether coordinates lie in the group."""
    return (c[0] >= 0) & (c[1] >= 0) & (c[2] >= 0) & (c[0] < sizes[0]) & (c[1] < sizes[1]) & (c[2] < sizes[2])


@triton.jit
def box_at(j, first, counts):
    """Coordinates of the tokens j of a box, row-major."""
    return (first[0] + j // (counts[1] * counts[2]), first[1] + j // counts[2] % counts[1], first[2] + j % counts[2])


@triton.jit
def on_map(c, group, DILATION: tl.constexpr):
    """The map's coordinates of those of a group."""
    return (c[0] * DILATION[0] + group[0], c[1] * DILATION[1] + group[1], c[2] * DILATION[2] + group[2])


@triton.jit
def offsets(c, image, head, strides, ALIGN: tl.constexpr):
    """Element offset of each row of a map; strides are (batch, three axes, head), all multiples of ALIGN."""
    wide = c[0].to(tl.int64)
    at = wide * strides[1] + c[1].to(tl.int64) * strides[2] + c[2].to(tl.int64) * strides[3]
    return tl.multiple_of(at + (wide * 0 + image) * strides[0] + (wide * 0 + head) * strides[4], ALIGN)


@triton.jit
def numbers(c, image, lengths):
    """Row-major number of each token in its batch."""
    return ((image.to(tl.int64) * lengths[0] + c[0]) * lengths[1] + c[1]) * lengths[2] + c[2]


@triton.jit
def windows(
    i, sizes, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """First slots and ends of queries on all axes; one outside the group sees nothing."""
    a0, b0 = slots(i[0], sizes[0], KERNEL[0], STRIDE[0], CAUSAL[0], ZERO)
    a1, b1 = slots(i[1], sizes[1], KERNEL[1], STRIDE[1], CAUSAL[1], ZERO)
    a2, b2 = slots(i[2], sizes[2], KERNEL[2], STRIDE[2], CAUSAL[2], ZERO)
    return (a0, a1, a2), (tl.where(inside(i, sizes), b0, a0), b1, b2)


@triton.jit
def rows(c):
    """Coordinates along the first axis of a tile of scores."""
    return (c[0][:, None], c[1][:, None], c[2][:, None])


@triton.jit
def columns(c):
    """And along the second."""
    return (c[0][None, :], c[1][None, :], c[2][None, :])


@triton.jit
def sees(start, end, j):
    """Whether queries see keys; one side is rows, the other columns."""
    seen = (start[0] <= j[0]) & (j[0] < end[0]) & (start[1] <= j[1]) & (j[1] < end[1])
    return seen & (start[2] <= j[2]) & (j[2] < end[2])


@triton.jit
def load_rpb(rpb_ptr, rpb_strides, head, i, j, seen, KERNEL: tl.constexpr):
    """rpb of queries i and keys j in float32, 0 where unseen; one side is rows, the other columns."""
    at = (j[0] - i[0] + (KERNEL[0] - 1)) * rpb_strides[1] + (j[1] - i[1] + (KERNEL[1] - 1)) * rpb_strides[2]
    at += (j[2] - i[2] + (KERNEL[2] - 1)) * rpb_strides[3]
    return tl.load(rpb_ptr + at + head * rpb_strides[0], mask=seen, other=0.0).to(tl.float32)


@triton.jit
def finished(s, bias, seen, HAS_BIAS: tl.constexpr):
    """Scores with their bias, -inf where it or `seen` hides."""
    if HAS_BIAS:
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def broken(x):
    """NaN for each row with a number that is not finite, 0 for the others."""
    return tl.sum(x.to(tl.float32) * 0.0, 1)


@triton.jit
def slopes(s, lse, dlse, delta, dp):
    """Weights and dS from scores; lse, dlse and delta of the queries, broadcast."""
    p = tl.where(s == float("-inf"), 0.0, tl.exp2((s - tl.where(lse == float("-inf"), 0.0, lse)) * LOG2E))
    return p, tl.where(p == 0.0, 0.0, p * (dp - delta + dlse))
