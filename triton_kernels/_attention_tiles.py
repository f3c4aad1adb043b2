"""Tiles of attention, shared by the forward and the backward kernels.

A head of D columns is one block of a power of two, or two where that is narrower (72 is 64 + 16): `parts`, a pair. WIDTHS
is (D, first block, second block or 0).
Exponentials are exp2 of scores that are whole, biases included, times log2(e).
"""

import triton
import triton.language as tl

from ._attention_positions import position_given
from ._attention_terms import gains, mean_gradient, query_shares, scores, stream, weighed
from ._tiles import LOG2E, clean, keep_keys, keep_tile, load_rows, store_rows

SOFTMAX = tl.constexpr(0)                                   # NORM
SIGMOID = tl.constexpr(1)
RELU = tl.constexpr(2)
NONE = tl.constexpr(3)
ARGMAX_K = tl.constexpr(4)
ARGMAX_Q = tl.constexpr(5)
POLICY = tl.constexpr(6)                                    # in place of the softmax


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
def policy_tile(terms, strides, image, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What queries row.. keep of keys start..: [BLOCK_M, BLOCK_N]."""
    i = (row + tl.arange(0, BLOCK_M))[:, None]
    j = start + tl.arange(0, BLOCK_N)
    at = terms[22] + (image.to(tl.int64) * strides[52] + (j + sizes[9]).to(tl.int64) * strides[53])
    keep = tl.load(at, mask=j < sizes[2], other=0.0).to(tl.float32)
    return tl.where((i == j[None, :]) & (sizes[12] != 0), 1.0, keep[None, :])


@triton.jit
def divided_weights(
    s, lse, low, terms, strides, image, row, start, sizes,
    NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weights of scores whose row is known, 0 where hidden, and under a policy what of them moves with the scores and what
    moves with the policy. lse and low are the row's log of the sum and, in base 2, what that lacks; under a policy the
    largest score and what exponentials are divided by."""
    if NORM == POLICY:
        e = tl.where(s == float("-inf"), 0.0, tl.exp2((s - lse[:, None]) * LOG2E))
        kept = e * policy_tile(terms, strides, image, row, start, sizes, BLOCK_M, BLOCK_N)
        kept = tl.where(s == float("-inf"), 0.0, kept)                                 # whatever the policy is there
        share = terms[23] / tl.maximum(sizes[2], 1)
        p = tl.where(s == float("-inf"), 0.0, (kept + share) / low[:, None])           # 1 where there is one key
        inverse = 1.0 / low[:, None]
        slope = kept * inverse
        bare = e * inverse
    else:
        p = tl.exp2((s - lse[:, None]) * LOG2E - low[:, None]) if NORM == SOFTMAX else plain_weights(s, NORM)
        slope = p
        bare = p
    return p, slope, bare


@triton.jit
def weights(
    a, factor, lse, low, live, v, dout, terms, strides, image, head, row, start, sizes, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    WIDTHS_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr = True,
):  # fmt: skip
    """P, what dP - delta is multiplied by, what v is multiplied by, dP, dP before the factors of the weights, and what dP - delta
    is multiplied by for a policy, all [i, j] in float32; nothing in rows that are not live. lse and low are those of
    divided_weights. Keys start at a multiple of four if ALIGNED."""
    s = scores(a, factor, terms, strides, image, head, row, start, sizes,
               AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
    p, slope, bare = divided_weights(s, lse, low, terms, strides, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
    p = tl.where(live[:, None], p, 0.0)
    if NORM == SOFTMAX:
        slope = p
    elif NORM == POLICY:
        slope = tl.where(live[:, None], slope, 0.0)
    else:
        slope = tl.where(live[:, None], slopes(s, p, NORM), 0.0)
    given = row_products(dout, v, WIDTHS_V)
    if terms[32] is not None:
        given += position_given(terms, strides, image, head, row, start, sizes, BLOCK_M, BLOCK_N)
    kept = weighed(p, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[5] is not None:
        i = row + tl.arange(0, BLOCK_M)
        if ALIGNED:
            keep = keep_tile(stream(terms), image, head, i, start, threshold, BLOCK_N, sizes[1])
        else:
            keep = keep_keys(
                stream(terms), image, head, i[:, None], start + tl.arange(0, BLOCK_N)[None, :], threshold, sizes[1])
        kept = tl.where(keep, kept * keep_scale, 0.0)
        given = tl.where(keep, given * keep_scale, 0.0)
    dp = weighed(given, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[7] is not None or terms[27] is not None or terms[28] is not None:
        dp = tl.where(s == float("-inf"), 0.0, dp)                                     # whatever the factor is there
    if terms[16] is not None:
        share = query_shares(terms, strides, image, head, row, sizes, BLOCK_M)
        dp += share[:, None] * mean_gradient(terms, strides, image, head, start, sizes, BLOCK_N)[None, :]
    return p, slope, kept, dp, given, tl.where(live[:, None], bare, 0.0)


@triton.jit
def product_gradient(
    ds, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the scaled products from dS, that of the scores."""
    if terms[6] is not None or terms[26] is not None:
        g = gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        ds = tl.where(ds == 0.0, 0.0, ds * g)
    return ds


@triton.jit
def term_gradient(
    a, factor, p, slope, dp, delta, given, terms, strides, image, head, row, start, sizes,
    TARGET: tl.constexpr, AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient that every pair gives to the bias or factor TARGET, a place in `terms`, from what `weights` found."""
    if TARGET == 7 or TARGET == 27 or TARGET == 28:
        x = weighed(p * given, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, TARGET)
    else:
        x = slope * (dp - delta[:, None])
        if TARGET == 6 or TARGET == 26:
            x = tl.where(x == 0.0, 0.0, x * (a * factor))
            if (terms[6] is not None and TARGET != 6) or (terms[26] is not None and TARGET != 26):
                g = gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, TARGET)
                x = tl.where(x == 0.0, 0.0, x * g)
    return x
