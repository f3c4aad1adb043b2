"""Tiles of attention, shared by the forward and the backward kernels.

A head of D columns is one block of a power of two, or two where that is narrower (72 is 64 + 16): `parts`, a pair. WIDTHS
is (D, first block, second block or 0). The terms of a score are (bias, key_bias, mask, factor, sink, seed), each a pointer
or None; their strides stand in one tuple: (batch, head, query, key) of bias, key_bias and mask, then those of factor and
sink. AXES says whether bias, key_bias and mask vary with the query and with the key. Exponentials are exp2 of scores that
are whole, biases included, times log2(e).
"""

import triton
import triton.language as tl

from ._tiles import LOG2E, clean, keep_tile, load_rows, store_rows

SOFTMAX = tl.constexpr(0)                                   # NORM
SIGMOID = tl.constexpr(1)
RELU = tl.constexpr(2)
NONE = tl.constexpr(3)


@triton.jit
def offsets(image, head, n, strides, ALIGN: tl.constexpr):
    """Element offset of each token n of a sample and head; strides are (batch, token, head), multiples of ALIGN."""
    at = n.to(tl.int64) * strides[1] + (image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2])
    return tl.multiple_of(at, ALIGN)


@triton.jit
def load_parts(ptr, rows, real, d_stride, WIDTHS: tl.constexpr):
    first = load_rows(ptr, rows, real, d_stride, WIDTHS[0], WIDTHS[1])
    second = first
    if WIDTHS[2] > 0:
        second = load_rows(ptr, rows, real, d_stride, WIDTHS[0], WIDTHS[2], WIDTHS[1])
    return first, second


@triton.jit
def store_parts(ptr, rows, real, d_stride, x, WIDTHS: tl.constexpr):
    store_rows(ptr, rows, real, d_stride, x[0], WIDTHS[0], WIDTHS[1])
    if WIDTHS[2] > 0:
        store_rows(ptr, rows, real, d_stride, x[1], WIDTHS[0], WIDTHS[2], WIDTHS[1])


@triton.jit
def zero_parts(ROWS: tl.constexpr, WIDTHS: tl.constexpr):
    first = tl.zeros([ROWS, WIDTHS[1]], tl.float32)
    second = first
    if WIDTHS[2] > 0:
        second = tl.zeros([ROWS, WIDTHS[2]], tl.float32)
    return first, second


@triton.jit
def scaled_parts(x, factor, WIDTHS: tl.constexpr):
    """Each row times its factor."""
    first = x[0] * factor[:, None]
    second = first
    if WIDTHS[2] > 0:
        second = x[1] * factor[:, None]
    return first, second


@triton.jit
def clean_parts(x, WIDTHS: tl.constexpr):
    first = clean(x[0]).to(x[0].dtype)
    second = first
    if WIDTHS[2] > 0:
        second = clean(x[1]).to(x[1].dtype)
    return first, second


@triton.jit
def row_products(a, b, WIDTHS: tl.constexpr):
    """The products of the rows of a with those of b: [a, b] in float32."""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if WIDTHS[2] > 0:
        x = tl.dot(a[1], tl.trans(b[1]), x, input_precision="ieee")
    return x


@triton.jit
def add_weighted(acc, x, rows, WIDTHS: tl.constexpr):
    """acc + x @ rows, x rounded to the dtype of the rows."""
    x = x.to(rows[0].dtype)
    first = tl.dot(x, rows[0], acc[0], input_precision="ieee")
    second = first
    if WIDTHS[2] > 0:
        second = tl.dot(x, rows[1], acc[1], input_precision="ieee")
    return first, second


@triton.jit
def score_term(
    ptr, strides, image, head, row, start, queries, keys, other,
    AT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A score-shaped tensor at queries row.. and keys start.., `other` past the last key: what broadcasts to
    [BLOCK_M, BLOCK_N]. Offsets inside the tile have 32 bits unless FAR: there are many, and each holds registers."""
    base = ptr + (image.to(tl.int64) * strides[AT] + head.to(tl.int64) * strides[AT + 1])
    base += tl.cast(row, tl.int64) * strides[AT + 2] + tl.cast(start, tl.int64) * strides[AT + 3]
    m = tl.minimum(tl.arange(0, BLOCK_M), queries - 1 - row)
    n = tl.arange(0, BLOCK_N)
    inside = (start + n < keys)[None, :]
    if FAR:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    down = m[:, None] * strides[AT + 2]
    along = n[None, :] * strides[AT + 3]
    if ROW and COLUMN:
        at = down + along
        value = tl.load(base + at, mask=inside, other=other) if CLIP else tl.load(base + at)
    elif COLUMN:
        value = tl.load(base + along, mask=inside, other=other) if CLIP else tl.load(base + along)
    elif ROW:
        value = tl.load(base + down)
    else:
        value = tl.load(base)
    return value


@triton.jit
def row_factor(terms, strides, head, scale):
    """What the product of q and k is multiplied by in this head."""
    factor = scale
    if terms[3] is not None:
        factor = tl.load(terms[3] + head.to(tl.int64) * strides[12]).to(tl.float32)
    return factor


@triton.jit
def scores(
    a, factor, terms, strides, image, head, row, start, queries, keys, offset,
    AXES: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of the products a of queries row.. and keys start..; what a row must not see becomes -inf, whatever its product is."""
    s = a * factor
    if terms[0] is not None:
        bias = score_term(terms[0], strides, image, head, row, start, queries, keys, float("-inf"),
                          0, AXES[0][0], AXES[0][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[1] is not None:
        bias = score_term(terms[1], strides, image, head, row, start, queries, keys, float("-inf"),
                          4, AXES[1][0], AXES[1][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[2] is not None:
        seen = score_term(terms[2], strides, image, head, row, start, queries, keys, 0,
                          8, AXES[2][0], AXES[2][1], FAR, CLIP, BLOCK_M, BLOCK_N)
        s = tl.where(seen != 0, s, float("-inf"))
    j = start + tl.arange(0, BLOCK_N)
    if CAUSAL:
        i = row + tl.arange(0, BLOCK_M)
        s = tl.where(j[None, :] < tl.minimum(i + (offset + 1), keys)[:, None], s, float("-inf"))
    elif CLIP:
        s = tl.where((j < keys)[None, :], s, float("-inf"))
    return s


@triton.jit
def plain_weights(s, NORM: tl.constexpr):
    """The weights of scores under a normaliser that is not softmax, 0 where hidden."""
    if NORM == SIGMOID:
        p = 1.0 / (1.0 + tl.exp2(s * -LOG2E))
    elif NORM == RELU:
        p = tl.where(s <= 0.0, 0.0, s)
    else:
        p = tl.where(s == float("-inf"), 0.0, s)
    return p


@triton.jit
def slopes(s, p, NORM: tl.constexpr):
    """The derivatives of plain_weights by the scores."""
    if NORM == SIGMOID:
        x = p * (1.0 - p)
    elif NORM == RELU:
        x = tl.where(s <= 0.0, 0.0, 1.0)
    else:
        x = tl.where(s == float("-inf"), 0.0, 1.0)
    return x


@triton.jit
def weights(
    a, factor, lse, low, live, v, dout, terms, strides, image, head, row, start, queries, keys, offset, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    WIDTHS_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """P, what dP - delta is multiplied by, P after dropout, and dP, all [i, j] in float32; nothing in rows that are not
    live. low, in base 2, is what lse lacks."""
    s = scores(a, factor, terms, strides, image, head, row, start, queries, keys, offset,
               AXES, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
    p = tl.exp2((s - lse[:, None]) * LOG2E - low[:, None]) if NORM == SOFTMAX else plain_weights(s, NORM)
    p = tl.where(live[:, None], p, 0.0)
    slope = p
    if NORM != SOFTMAX:
        slope = tl.where(live[:, None], slopes(s, p, NORM), 0.0)
    dp = row_products(dout, v, WIDTHS_V)
    dropped = p
    if terms[5] is not None:
        keep = keep_tile(terms[5], image, head, row + tl.arange(0, BLOCK_M), start, threshold, BLOCK_N)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return p, slope, dropped, dp
