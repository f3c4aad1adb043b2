"""Tiles of rows, dropout and constants: what the attention kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, rows, real, d_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr = 0):
    """Columns FIRST.. of the rows of a tensor, 0 where not real and past D: [rows, BLOCK_D]."""
    d = FIRST + tl.arange(0, BLOCK_D)
    mask = real[:, None]
    if FIRST + BLOCK_D > D:
        mask = mask & (d < D)[None, :]
    return tl.load(ptr + (rows[:, None] + d.to(tl.int64)[None, :] * d_stride), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, rows, real, d_stride, x, D: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr = 0):
    """Writes x [rows, BLOCK_D] to columns FIRST.. of the real rows, rounded to the tensor's dtype."""
    d = FIRST + tl.arange(0, BLOCK_D)
    mask = real[:, None]
    if FIRST + BLOCK_D > D:
        mask = mask & (d < D)[None, :]
    tl.store(ptr + (rows[:, None] + d.to(tl.int64)[None, :] * d_stride), x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def counted(stream, image, head, tokens, queries):
    """The image, the head and the tokens that dropout counts. `stream`: pointers to its seed; to the number of head 0, plus 2^32
    times that of image 0, or None; to image 2^32 + token of each query [B, queries], or None where they are the queries' own."""
    if stream[1] is not None:
        head += tl.load(stream[1]).to(tl.int32)
    if stream[2] is not None:
        named = tl.load(stream[2] + (image.to(tl.int64) * queries + tl.minimum(tokens, queries - 1)))
        image, tokens = (named >> 32).to(tl.int32), named.to(tl.int32)
    elif stream[1] is not None:
        image += (tl.load(stream[1]) >> 32).to(tl.int32)
    return image, head, tokens


@triton.jit
def keep_tile(stream, image, head, tokens, start, threshold, BLOCK_N: tl.constexpr, queries=0):
    """True where dropout keeps a weight: Philox on (image, head, query token, key slot div 4), lane = slot mod 4."""
    quads = start // 4 + tl.arange(0, BLOCK_N // 4)
    image, head, tokens = counted(stream, image, head, tokens[:, None], queries)
    shape = (tokens + quads[None, :]) * 0                                              # [i, BLOCK_N / 4]
    lane0, lane1, lane2, lane3 = tl.philox(
        tl.load(stream[0]), shape + image, shape + head, shape + tokens, shape + quads[None, :])
    lanes = tl.interleave(tl.interleave(lane0, lane2), tl.interleave(lane1, lane3))    # [i, BLOCK_N]
    return lanes.to(tl.int64) >= threshold


@triton.jit
def keep_keys(stream, image, head, tokens, keys, threshold, queries):
    """keep_tile for tokens and keys of shapes that broadcast: every weight draws its four lanes."""
    image, head, tokens = counted(stream, image, head, tokens, queries)
    shape = (tokens + keys) * 0
    quads, lane = shape + keys // 4, shape + keys % 4
    lane0, lane1, lane2, lane3 = tl.philox(tl.load(stream[0]), shape + image, shape + head, shape + tokens, quads)
    drawn = tl.where(lane < 2, tl.where(lane == 0, lane0, lane1), tl.where(lane == 2, lane2, lane3))
    return drawn.to(tl.int64) >= threshold


@triton.jit
def clean(x):
    """x with 0 where it is not finite."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)
