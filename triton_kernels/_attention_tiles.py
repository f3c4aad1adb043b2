"""Tiles of attention, shared by the forward and the backward kernels.

A head of D columns is one block of a power of two, or two where that is narrower (72 is 64 + 16): `parts`, a pair. WIDTHS
is (D, first block, second block or 0). What a score is made of stands in `terms`, each a pointer or None:
    0 bias, 1 key_bias, 2 mask, 3 factor, 4 sink, 5 seed, 6 gain, 7 weight, 8 rel_y, 9 rel_x, 10 q_ids, 11 k_ids, 12 allow
and their strides in one tuple: (batch, head, query, key) of bias from 0, key_bias from 4, mask from 8, gain from 14 and
weight from 18; of factor 12 and sink 13; (batch, query, head, side) of rel_y from 22 and rel_x from 26; (batch, token) of
q_ids from 30 and k_ids from 32; of allow 34 and 35. AXES says whether bias, key_bias, mask, gain and weight vary with the
query and with the key. `sizes` is (batch, queries, keys, heads, offset, kw of rel_x, rows and columns of allow).
Exponentials are exp2 of scores that are whole, biases included, times log2(e).
"""

import triton
import triton.language as tl

from ._tiles import LOG2E, clean, keep_keys, keep_tile, load_rows, store_rows

SOFTMAX = tl.constexpr(0)                                   # NORM
SIGMOID = tl.constexpr(1)
RELU = tl.constexpr(2)
NONE = tl.constexpr(3)
NO_RULE = tl.constexpr(0)                                   # RULE
EQUAL = tl.constexpr(1)
TABLE = tl.constexpr(2)
UPTO = tl.constexpr(3)


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
    ptr, strides, image, head, row, start, sizes, other,
    AT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A score-shaped tensor at queries row.. and keys start.., `other` past the last key: what broadcasts to
    [BLOCK_M, BLOCK_N]. Offsets inside the tile have 32 bits unless FAR: there are many, and each holds registers."""
    base = ptr + (image.to(tl.int64) * strides[AT] + head.to(tl.int64) * strides[AT + 1])
    base += tl.cast(row, tl.int64) * strides[AT + 2] + tl.cast(start, tl.int64) * strides[AT + 3]
    m = tl.minimum(tl.arange(0, BLOCK_M), sizes[1] - 1 - row)
    n = tl.arange(0, BLOCK_N)
    inside = (start + n < sizes[2])[None, :]
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
def relative_term(
    terms, strides, image, head, row, start, sizes, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rel_y[i, j // kw] + rel_x[i, j % kw] at queries row.. and keys start..: [BLOCK_M, BLOCK_N]."""
    m = tl.minimum(tl.arange(0, BLOCK_M), sizes[1] - 1 - row)
    j = start + tl.arange(0, BLOCK_N)
    inside = (j < sizes[2])[None, :]
    y = j // sizes[5]
    x = j % sizes[5]
    if FAR:
        m = m.to(tl.int64)
    first = tl.cast(row, tl.int64)
    by_y = terms[8] + (image.to(tl.int64) * strides[22] + first * strides[23] + head.to(tl.int64) * strides[24])
    by_x = terms[9] + (image.to(tl.int64) * strides[26] + first * strides[27] + head.to(tl.int64) * strides[28])
    value = tl.load(by_y + (m[:, None] * strides[23] + y[None, :] * strides[25]), mask=inside, other=0.0).to(tl.float32)
    more = tl.load(by_x + (m[:, None] * strides[27] + x[None, :] * strides[29]), mask=inside, other=0.0).to(tl.float32)
    return value + more


@triton.jit
def seen_by_ids(
    terms, strides, image, row, start, sizes, RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which keys start.. the ids or levels let the queries row.. see: [BLOCK_M, BLOCK_N]."""
    i = tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1).to(tl.int64)
    j = tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1).to(tl.int64)
    a = tl.load(terms[10] + (image.to(tl.int64) * strides[30] + i * strides[31]))[:, None]
    b = tl.load(terms[11] + (image.to(tl.int64) * strides[32] + j * strides[33]))[None, :]
    if RULE == UPTO:
        seen = b <= a
    else:
        seen = (a >= 0) & (b >= 0)
        if RULE == EQUAL:
            seen = seen & (a == b)
        else:
            down = tl.minimum(tl.maximum(a, 0), sizes[6] - 1).to(tl.int64) * strides[34]
            along = tl.minimum(tl.maximum(b, 0), sizes[7] - 1).to(tl.int64) * strides[35]
            seen = seen & (tl.load(terms[12] + (down + along)) != 0)
    return seen


@triton.jit
def scores(
    a, factor, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of the products a of queries row.. and keys start..; what a row must not see becomes -inf, whatever its
    product is."""
    s = a * factor
    if terms[6] is not None:
        s *= gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[8] is not None:
        s += relative_term(terms, strides, image, head, row, start, sizes, FAR, BLOCK_M, BLOCK_N)
    if terms[0] is not None:
        bias = score_term(terms[0], strides, image, head, row, start, sizes, float("-inf"),
                          0, AXES[0][0], AXES[0][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[1] is not None:
        bias = score_term(terms[1], strides, image, head, row, start, sizes, float("-inf"),
                          4, AXES[1][0], AXES[1][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[2] is not None:
        seen = score_term(terms[2], strides, image, head, row, start, sizes, 0,
                          8, AXES[2][0], AXES[2][1], FAR, CLIP, BLOCK_M, BLOCK_N)
        s = tl.where(seen != 0, s, float("-inf"))
    if RULE != NO_RULE:
        s = tl.where(seen_by_ids(terms, strides, image, row, start, sizes, RULE, BLOCK_M, BLOCK_N), s, float("-inf"))
    j = start + tl.arange(0, BLOCK_N)
    if CAUSAL:
        i = row + tl.arange(0, BLOCK_M)
        s = tl.where(j[None, :] < tl.minimum(i + (sizes[4] + 1), sizes[2])[:, None], s, float("-inf"))
    elif CLIP:
        s = tl.where((j < sizes[2])[None, :], s, float("-inf"))
    return s


@triton.jit
def gains(
    terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the scores are multiplied by before the biases."""
    return score_term(terms[6], strides, image, head, row, start, sizes, 1.0,
                      14, AXES[3][0], AXES[3][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)


@triton.jit
def weighed(
    p, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """p times the factors of the weights; 0 stays 0."""
    if terms[7] is not None:
        w = score_term(terms[7], strides, image, head, row, start, sizes, 1.0,
                       18, AXES[4][0], AXES[4][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        p = tl.where(p == 0.0, 0.0, p * w)
    return p


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
    a, factor, lse, low, live, v, dout, terms, strides, image, head, row, start, sizes, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    WIDTHS_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr = True,
):  # fmt: skip
    """P, what dP - delta is multiplied by, what v is multiplied by, dP, and dP before the factors of the weights, all [i, j]
    in float32; nothing in rows that are not live. low, in base 2, is what lse lacks. Keys start at a multiple of four if
    ALIGNED."""
    s = scores(a, factor, terms, strides, image, head, row, start, sizes,
               AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
    p = tl.exp2((s - lse[:, None]) * LOG2E - low[:, None]) if NORM == SOFTMAX else plain_weights(s, NORM)
    p = tl.where(live[:, None], p, 0.0)
    slope = p
    if NORM != SOFTMAX:
        slope = tl.where(live[:, None], slopes(s, p, NORM), 0.0)
    given = row_products(dout, v, WIDTHS_V)
    kept = weighed(p, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[5] is not None:
        i = row + tl.arange(0, BLOCK_M)
        if ALIGNED:
            keep = keep_tile(terms[5], image, head, i, start, threshold, BLOCK_N)
        else:
            keep = keep_keys(terms[5], image, head, i, start + tl.arange(0, BLOCK_N), threshold)
        kept = tl.where(keep, kept * keep_scale, 0.0)
        given = tl.where(keep, given * keep_scale, 0.0)
    dp = weighed(given, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[7] is not None:
        dp = tl.where(s == float("-inf"), 0.0, dp)                                     # whatever the factor is there
    return p, slope, kept, dp, given


@triton.jit
def product_gradient(
    ds, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the scaled products from dS, that of the scores."""
    if terms[6] is not None:
        g = gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        ds = tl.where(ds == 0.0, 0.0, ds * g)
    return ds
