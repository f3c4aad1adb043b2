"""What the kernels of attention's backward read of keys and of queries, and the rows' sums by themselves, where several programs
share out the keys of a row.
"""

import triton
import triton.language as tl

from ._attention_host import UNSPECIALIZED
from ._attention_terms import last_key, listed, of_sample, part_of, places, row_factor, visited
from ._attention_tiles import clean_parts, load_parts, offsets, row_products, weights


@triton.jit
def key_side(
    k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head, j, sizes,
    WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """k, and v with 0 where it is not finite."""
    real, token = j < sizes[2], j + sizes[9]
    k = load_parts(k_ptr, offsets(image, head, token, k_strides, ALIGN), real, d_strides[1], WIDTHS)
    v = load_parts(v_ptr, offsets(image, head, token, v_strides, ALIGN), real, d_strides[2], WIDTHS_V)
    return k, clean_parts(v, WIDTHS_V)


@triton.jit
def query_side(
    q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
    NORM: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, FOR_KEYS: tl.constexpr = False,
):  # fmt: skip
    """q, dout, lse and low as divided_weights wants them, whether a row has a gradient, and its place in [B, Nq, H]. FOR_KEYS:
    the q of a row that is known to see nothing is 0, for it may be NaN, and 0 times it is a gradient of keys."""
    queries, heads = sizes[1], sizes[3]
    real, token = i < queries, i + sizes[8]
    flat = places(terms, image, i, queries, sizes[8]) * heads + head
    dout = load_parts(dout_ptr, offsets(image, head, token, dout_strides, ALIGN), real, d_strides[3], WIDTHS_V)
    lse = tl.zeros_like(i).to(tl.float32)
    low = lse
    live = real
    sees = real
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + flat, mask=real, other=float("-inf"))
        live = tl.abs(lse) < float("inf")                                              # a NaN is seen by others alone
        if FOR_KEYS and terms[4] is None:                                              # a sink is seen by every row
            sees = lse != float("-inf")
        if low_ptr is not None:
            low = tl.load(low_ptr + flat, mask=real, other=0.0)
    q = load_parts(q_ptr, offsets(image, head, token, q_strides, ALIGN), sees, d_strides[0], WIDTHS)
    return q, dout, lse, low, live, real, flat


@triton.jit
def sums_of(
    q, dout, lse, low, live, k_ptr, v_ptr, visit_ptr, visits, begin, end, factor, terms, k_strides, v_strides, d_strides, strides,
    image, head, row, sizes, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """delta and the sum of the weights of BLOCK_M queries over some visits."""
    delta = tl.zeros([BLOCK_M], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    TABLED: tl.constexpr = terms[25] is not None and terms[26] is not None             # registers are short
    for n in tl.range(begin, end, num_stages=STAGES, disable_licm=TABLED):
        start = visited(visit_ptr, visits, n, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes, WIDTHS, WIDTHS_V, ALIGN)
        p, slope, kept, dp, given, bare = weights(
            row_products(q, k, WIDTHS), factor, lse, low, live, v, dout, terms, strides, image, head, row, start, sizes,
            threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V, BLOCK_M, BLOCK_N)
        delta += tl.sum(p * dp, 1)
        norm += tl.sum(p, 1)
    return delta, norm


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_sums(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, sum_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, visit_strides, sizes, parts, scale, threshold,
    keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """delta and the sum of the weights of BLOCK_M queries of one head and sample over one of `parts` of their visits.
    Grid: heads (fastest) x query tiles x samples on axis 0, parts on axis 1. Writes [parts, 2, B, Nq, H].
    Any strides: q, k, v, dout and the terms."""
    heads, total = sizes[3], sizes[8]
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles
    offset = sizes[4]
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    last = last_key(terms, sizes, row, sizes[2], offset, CAUSAL, BLOCK_M)
    begin, end, visits = listed(count_ptr, visit_strides, image, head, row // BLOCK_M, 0, last, BLOCK_N)
    begin, end = part_of(begin, end, part, parts)
    factor = row_factor(terms, term_strides, head, scale)
    q, dout, lse, low, live, real, flat = query_side(
        q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
        NORM, WIDTHS, WIDTHS_V, ALIGN)
    delta, norm = sums_of(
        q, dout, lse, low, live, k_ptr, v_ptr, visit_ptr, visits, begin, end, factor, terms, k_strides, v_strides, d_strides,
        term_strides, image, head, row, sizes, threshold, keep_scale,
        NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, WIDTHS_V, ALIGN, CLIP, BLOCK_M, BLOCK_N, STAGES)
    at = sum_ptr + (part.to(tl.int64) * 2 * total * heads + flat)
    tl.store(at, delta, mask=real)
    tl.store(at + total.to(tl.int64) * heads, norm, mask=real)
