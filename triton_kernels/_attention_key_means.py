"""The attention that each key receives."""

import triton
import triton.language as tl

from ._attention_host import UNSPECIALIZED
from ._attention_terms import listed, of_sample, places, query_shares, row_factor, scores, visited
from ._attention_tiles import divided_weights, load_parts, offsets, row_products


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_means(
    q_ptr, k_ptr, lse_ptr, low_ptr, mean_ptr, visit_ptr, count_ptr, terms, q_strides, k_strides, d_strides, term_strides,
    visit_strides, sizes, scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over the queries of query_weight times the weights of BLOCK_N keys of one head and sample.
    Grid: heads (fastest) x key tiles x samples, on axis 0. Writes [B, Nk, H].
    Any strides: q, k and the terms. lse and low are contiguous."""
    heads, offset = sizes[3], sizes[4]
    pid = tl.program_id(0)
    tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    head = pid % heads
    start = pid // heads % tiles * BLOCK_N
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    j = start + tl.arange(0, BLOCK_N)
    at = offsets(image, head // GROUP, j + sizes[9], k_strides, ALIGN)
    k = load_parts(k_ptr, at, j < keys, d_strides[1], WIDTHS)
    factor = row_factor(terms, term_strides, head, scale)
    mean = tl.zeros([BLOCK_N], tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(start - offset, 0) // BLOCK_M * BLOCK_M
    begin, end, visits = listed(count_ptr, visit_strides, image, head, start // BLOCK_N, first, queries, BLOCK_M)
    for n in tl.range(begin, end, num_stages=STAGES):
        row = visited(visit_ptr, visits, n, BLOCK_M)
        i = row + tl.arange(0, BLOCK_M)
        real = i < queries
        q = load_parts(q_ptr, offsets(image, head, i + sizes[8], q_strides, ALIGN), real, d_strides[0], WIDTHS)
        a = row_products(q, k, WIDTHS)
        a += a * 0.0                                                                   # an infinity becomes NaN
        s = scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                   AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
        flat = places(terms, image, i, queries, sizes[8]) * heads + head
        lse = tl.zeros([BLOCK_M], tl.float32)
        low = lse
        if lse_ptr is not None:
            lse = tl.load(lse_ptr + flat, mask=real, other=0.0)
            real = real & (lse != float("-inf"))
        if low_ptr is not None:
            low = tl.load(low_ptr + flat, mask=real, other=0.0)
        p, slope, bare = divided_weights(s, lse, low, terms, term_strides, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        share = query_shares(terms, term_strides, image, head, row, sizes, BLOCK_M)
        mean += tl.sum(tl.where(real[:, None], p * share[:, None], 0.0), 0)
    at = places(terms, image, j, keys, sizes[9]) * heads + head
    tl.store(mean_ptr + at, mean, mask=j < keys)
