"""Tiles of channel attention: where tokens lie, lengths of channels, and the weights that a normaliser makes."""

import triton
import triton.language as tl

RELU, PLUS1 = tl.constexpr(1), tl.constexpr(3)


@triton.jit
def window_of(window, bounds_ptr, shape):
    """First row, first column, width and number of the tokens of a window. shape: rows, columns, sides, windows across."""
    if bounds_ptr is not None:
        y = 0
        x = tl.load(bounds_ptr + window)
        wide = tl.load(bounds_ptr + window + 1) - x
        count = wide
    else:
        y = window // shape[4] * shape[2]
        x = window % shape[4] * shape[3]
        wide = tl.minimum(shape[1] - x, shape[3])
        count = wide * tl.minimum(shape[0] - y, shape[2])
    return y, x, wide, count


@triton.jit
def place_of(i, real, first_y, first_x, wide, sample, order_ptr, mask_ptr, shape):
    """Row and column on the map of the i-th tokens of a window, and whether they take part, [BLOCK_N] each."""
    y = first_y + i // tl.maximum(wide, 1)
    x = first_x + i % tl.maximum(wide, 1)
    if order_ptr is not None:
        x = tl.load(order_ptr + sample * shape[1] + x, mask=real, other=0)
    shown = real
    if mask_ptr is not None:
        at = (sample * shape[0] + y) * shape[1] + x
        shown = real & (tl.load(mask_ptr + at, mask=real, other=0) != 0)
    return y.to(tl.int64), x.to(tl.int64), shown


@triton.jit
def load_tile(ptr, sample, head, y, x, shown, strides, c, width):
    """Columns c of these tokens in float32, 0 where they take no part, [BLOCK_N, BLOCK_C]."""
    at = sample * strides[0] + head * strides[3] + y * strides[1] + x * strides[2]
    at = at[:, None] + c.to(tl.int64)[None, :] * strides[4]
    return tl.load(ptr + at, mask=shown[:, None] & (c < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def inverse_length(squares_ptr, c, inside, eps, NORMALIZE: tl.constexpr):
    """1 over the norm of these channels, which is at least eps; 1 without norms."""
    over = tl.where(inside, 1.0, 1.0)
    if NORMALIZE:
        square = tl.load(squares_ptr + c, mask=inside, other=1.0)
        over = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(square), eps))
    return over


@triton.jit
def kept_logits(logits, gram_ptr, squares_ptr, c, e, rows, over_c, heat, scale, eps, count, E: tl.constexpr,
          NORMALIZE: tl.constexpr):  # fmt: skip
    """Whether each logit is among the `count` largest of its row, ties by channel, [ROWS, BLOCK_E]."""
    before = tl.zeros(logits.shape, tl.int32)
    for other in range(0, E):
        over = 1.0
        if NORMALIZE:
            over = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.load(squares_ptr + other)), eps))
        column = tl.load(gram_ptr + c * E + other, mask=rows, other=0.0) * scale * over_c * over * heat  # [ROWS]
        first = (column[:, None] == logits) & (other < e)[None, :]
        before += ((column[:, None] > logits) | first).to(tl.int32)
    return before < count


@triton.jit
def normalized(logits, kept, NORM: tl.constexpr):
    """The weights of the kept logits of each row, [ROWS, BLOCK_E]."""
    if NORM % 3 == 0:                                                                  # softmax, plus1
        logits = tl.where(kept, logits, float("-inf"))
        top = tl.max(logits, 1)
        if NORM == PLUS1:
            top = tl.maximum(top, 0.0)
        p = tl.exp(logits - top[:, None])
        total = tl.sum(p, 1)
        if NORM == PLUS1:
            total += tl.exp(-top)
        p = p / total[:, None]
    elif NORM == RELU:
        p = tl.where(kept & (logits > 0.0), logits, 0.0)
    else:
        p = tl.where(kept, logits, 0.0)
    return p


@triton.jit
def store_twice(rho, over, squares_ptr, dsquares_ptr, twice_ptr, first, at, inside, eps, NORMALIZE: tl.constexpr):
    twice = tl.zeros(rho.shape, tl.float32)
    if NORMALIZE:
        long = tl.sqrt_rn(tl.load(squares_ptr + at, mask=inside, other=0.0)) >= eps
        twice = tl.where(long, -rho * over * over, 0.0)
    if dsquares_ptr is not None:
        twice += 2.0 * tl.load(dsquares_ptr + first + at, mask=inside, other=0.0)
    tl.store(twice_ptr + at, twice, mask=inside)
