"""The kernels of attention's backward. P is made again from lse; delta_i = sum_j P_ij dP_ij of softmax is a first walk over
the keys. An lse of 50 rounded to float32 is off by 2e-6, and so would be every weight of its row: for float32 inputs that
walk also sums the weights and keeps their log as `low`.
"""

import triton
import triton.language as tl

from ._attention_bwd_sums import key_side, query_side, sums_of
from ._attention_host import UNSPECIALIZED
from ._attention_terms import (
    finite_distances,
    last_key,
    listed,
    mean_gradient,
    of_sample,
    part_of,
    places,
    row_factor,
    slope_of,
    visited,
)
from ._attention_tiles import (
    POLICY,
    SOFTMAX,
    add_weighted,
    clean_parts,
    offsets,
    product_gradient,
    row_products,
    scaled_parts,
    store_parts,
    term_gradient,
    weights,
    zero_parts,
)
from ._tiles import LOG2E


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, sum_ptr, dlse_ptr, delta_ptr, low_ptr, dq_ptr, drow_ptr, dfactor_ptr, dsink_ptr,
    dweight_ptr, dslope_ptr, dxy_ptr, dratio_ptr, dgain_ptr, dshare_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, dlse_strides, dq_strides, d_strides, term_strides, visit_strides, sizes,
    parts, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """delta - dlse, dq, the row sums of dS and of the gradients of gain and of weight (dshare), and the gradients of query_weight
    [B, Nq, H] and of q_xy [B, Nq, H, 2], of BLOCK_M queries of one head and sample, and their share of dfactor, dsink, dslope and
    dratio, [programs / heads, heads]; over all visits or one of `parts` of them, which then have an axis in front, but for what the
    first writes for all from their sums.
    Grid: heads (fastest) x query tiles x samples on axis 0, parts on axis 1.
    Any strides: q, k, v, dout, dlse, dq and the terms."""
    heads, offset, total = sizes[3], sizes[4], sizes[8]
    pid = tl.program_id(0)
    part = tl.program_id(1)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    last = last_key(terms, sizes, row, sizes[2], offset, CAUSAL, BLOCK_M)
    begin, end, visits = listed(count_ptr, visit_strides, image, head, row // BLOCK_M, 0, last, BLOCK_N)
    begin, end = part_of(begin, end, part, parts)
    factor = row_factor(terms, term_strides, head, scale)
    q, dout, lse, low, live, real, flat = query_side(
        q_ptr, dout_ptr, lse_ptr, low_ptr if NORM == POLICY else None, terms, q_strides, dout_strides, d_strides, image, head, i,
        sizes, NORM, WIDTHS, WIDTHS_V, ALIGN)
    delta = tl.zeros([BLOCK_M], tl.float32)
    drow = tl.zeros([BLOCK_M], tl.float32)
    once = real & (i * 0 + part == 0)

    if delta_ptr is not None:
        if sum_ptr is None:
            delta, norm = sums_of(
                q, dout, lse, low, live, k_ptr, v_ptr, visit_ptr, visits, begin, end, factor, terms, k_strides, v_strides,
                d_strides, term_strides, image, head, row, sizes, threshold, keep_scale,
                NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, WIDTHS_V, ALIGN, CLIP, BLOCK_M, BLOCK_N, STAGES)
        else:
            delta = tl.load(sum_ptr + flat, mask=real, other=0.0)
            norm = tl.load(sum_ptr + (total.to(tl.int64) * heads + flat), mask=real, other=0.0)
    if NORM == POLICY:
        tl.store(delta_ptr + flat, delta, mask=once)
    if NORM == SOFTMAX:
        share = tl.zeros([BLOCK_M], tl.float32)                                        # of the sink
        if terms[4] is not None:
            sink = tl.load(terms[4] + head.to(tl.int64) * term_strides[13]).to(tl.float32)
            share = tl.where(live, tl.exp2((sink - lse) * LOG2E), 0.0)
        if low_ptr is not None:
            norm += share
            norm = tl.where(norm == 0.0, 1.0, norm)
            delta = delta / norm
            share = share / norm
            low = tl.log2(norm)
            tl.store(low_ptr + flat, low, mask=once)
        dlse = tl.zeros([BLOCK_M], tl.float32)
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + offsets(image, head, i + sizes[8], dlse_strides, 1), mask=live, other=0.0).to(tl.float32)
        drow = delta * share + dlse * (1.0 - share)         # the sum of dS, whose terms cancel
        delta -= dlse
        tl.store(delta_ptr + flat, delta, mask=once)
        if drow_ptr is not None:
            tl.store(drow_ptr + flat, drow, mask=once)
        if dsink_ptr is not None:
            tl.store(dsink_ptr + pid, -tl.sum(share * delta, 0), mask=part == 0)

    TABLED: tl.constexpr = terms[25] is not None and terms[26] is not None             # registers are short
    EDGES: tl.constexpr = dweight_ptr is not None or dslope_ptr is not None or dxy_ptr is not None or dratio_ptr is not None
    ROWS: tl.constexpr = dgain_ptr is not None or dshare_ptr is not None
    if dq_ptr is not None or dfactor_ptr is not None or EDGES or ROWS or (drow_ptr is not None and NORM != SOFTMAX):
        dweight = tl.zeros([BLOCK_M], tl.float32)
        dslope = tl.zeros([BLOCK_M], tl.float32)
        dratio = tl.zeros([BLOCK_M], tl.float32)
        dgain = tl.zeros([BLOCK_M], tl.float32)
        dshare = tl.zeros([BLOCK_M], tl.float32)
        dy = tl.zeros([BLOCK_M], tl.float32)
        dx = tl.zeros([BLOCK_M], tl.float32)
        dq = zero_parts(BLOCK_M, WIDTHS)
        dfactor = tl.zeros([BLOCK_M], tl.float32)
        for n in tl.range(begin, end, num_stages=STAGES, disable_licm=TABLED):
            start = visited(visit_ptr, visits, n, BLOCK_N)
            j = start + tl.arange(0, BLOCK_N)
            k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes,
                             WIDTHS, WIDTHS_V, ALIGN)
            a = row_products(q, k, WIDTHS)
            p, slope, kept, dp, given, bare = weights(
                a, factor, lse, low, live, v, dout, terms, term_strides, image, head, row, start, sizes,
                threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V, BLOCK_M, BLOCK_N)
            ds = slope * (dp - delta[:, None])                                         # [BLOCK_M, BLOCK_N]
            if NORM != SOFTMAX:
                drow += tl.sum(ds, 1)
            if dweight_ptr is not None:
                dweight += tl.sum(p * mean_gradient(terms, term_strides, image, head, start, sizes, BLOCK_N)[None, :], 1)
            if dratio_ptr is not None:
                later = term_gradient(
                    a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, sizes, 28, AXES, FAR, CLIP,
                    BLOCK_M, BLOCK_N)
                dratio += tl.sum(tl.where(j[None, :] > i[:, None], later, 0.0), 1)
            if dgain_ptr is not None:
                dgain += tl.sum(term_gradient(
                    a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, sizes, 6, AXES, FAR, CLIP,
                    BLOCK_M, BLOCK_N), 1)
            if dshare_ptr is not None:
                dshare += tl.sum(term_gradient(
                    a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, sizes, 7, AXES, FAR, CLIP,
                    BLOCK_M, BLOCK_N), 1)
            if dslope_ptr is not None or dxy_ptr is not None:
                y, x, length = finite_distances(terms, term_strides, image, row, start, sizes, BLOCK_M, BLOCK_N)
                dslope -= tl.sum(ds * length, 1)
                pull = ds / tl.where(length == 0.0, 1.0, length)                       # the steps are 0 there
                dy -= tl.sum(pull * y, 1)
                dx -= tl.sum(pull * x, 1)
            ds = product_gradient(ds, terms, term_strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
            if dfactor_ptr is not None:
                dfactor += tl.sum(tl.where(ds == 0.0, 0.0, ds * a), 1)
            if dq_ptr is not None:
                dq = add_weighted(dq, ds, clean_parts(k, WIDTHS), WIDTHS)
        own = part * tl.num_programs(0) + pid
        flat += part.to(tl.int64) * total * heads
        if dfactor_ptr is not None:
            tl.store(dfactor_ptr + own, tl.sum(dfactor, 0))
        if dweight_ptr is not None:
            tl.store(dweight_ptr + flat, dweight, mask=real)
        if dslope_ptr is not None:
            tl.store(dslope_ptr + own, tl.sum(dslope, 0))
        if dratio_ptr is not None:
            tl.store(dratio_ptr + own, tl.sum(dratio, 0))
        if dgain_ptr is not None:
            tl.store(dgain_ptr + flat, dgain, mask=real)
        if dshare_ptr is not None:
            tl.store(dshare_ptr + flat, dshare, mask=real)
        if dxy_ptr is not None:
            slope_h = slope_of(terms, term_strides, head)
            tl.store(dxy_ptr + flat * 2, dy * slope_h, mask=real)
            tl.store(dxy_ptr + (flat * 2 + 1), dx * slope_h, mask=real)
        if dq_ptr is not None:
            dq = scaled_parts(dq, tl.zeros([BLOCK_M], tl.float32) + factor, WIDTHS)
            dq_ptr += part.to(tl.int64) * total * heads * WIDTHS[0]
            store_parts(dq_ptr, offsets(image, head, i + sizes[8], dq_strides, ALIGN), real, 1, dq, WIDTHS)
        if drow_ptr is not None and NORM != SOFTMAX:
            tl.store(drow_ptr + flat, drow, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, dk_ptr, dv_ptr, dcolumn_ptr,
    dxy_ptr, dpolicy_ptr, dgain_ptr, dshare_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, d_strides, term_strides, visit_strides, sizes,
    parts, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head and sample, and for each of its heads the column sums of dS and of the gradients of
    gain and of weight (dshare), and the gradients of k_xy and of the policy; over all visits, or one of `parts` of them, which
    then have an axis in front.
    Grid: key heads (fastest) x key tiles x samples on axis 0, parts on axis 1. Writes [B, Nk, H] each, and dxy [B, Nk, H, 2].
    Any strides: q, k, v, dout, dk, dv and the terms."""
    heads, offset, total = sizes[3], sizes[4], sizes[9]
    pid = tl.program_id(0)
    part = tl.program_id(1)
    key_heads = heads // GROUP
    tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    key_head = pid % key_heads
    start = pid // key_heads % tiles * BLOCK_N
    image = pid // key_heads // tiles
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    j = start + tl.arange(0, BLOCK_N)
    k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, key_head, j, sizes, WIDTHS, WIDTHS_V, ALIGN)
    dk = zero_parts(BLOCK_N, WIDTHS)
    dv = zero_parts(BLOCK_N, WIDTHS_V)
    first = 0
    if CAUSAL:
        first = tl.maximum(start - offset, 0)
    for g in tl.range(0, GROUP, num_stages=1):
        head = key_head * GROUP + g
        factor = row_factor(terms, term_strides, head, scale)
        dcolumn = tl.zeros([BLOCK_N], tl.float32)
        dpolicy = tl.zeros([BLOCK_N], tl.float32)
        dgain = tl.zeros([BLOCK_N], tl.float32)
        dshare = tl.zeros([BLOCK_N], tl.float32)
        dy = tl.zeros([BLOCK_N], tl.float32)
        dx = tl.zeros([BLOCK_N], tl.float32)
        begin, end, visits = listed(
            count_ptr, visit_strides, image, head, start // BLOCK_N, first, queries, BLOCK_M)
        begin, end = part_of(begin, end, part, parts)
        for n in tl.range(begin, end, num_stages=STAGES):
            row = visited(visit_ptr, visits, n, BLOCK_M)
            i = row + tl.arange(0, BLOCK_M)
            q, dout, lse, low, live, real, flat = query_side(
                q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
                NORM, WIDTHS, WIDTHS_V, ALIGN, FOR_KEYS=True)
            delta = tl.zeros([BLOCK_M], tl.float32)
            if delta_ptr is not None:
                delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
            a = row_products(q, k, WIDTHS)
            p, slope, kept, dp, given, bare = weights(
                a, factor, lse, low, live, v, dout, terms, term_strides, image, head, row, start, sizes,
                threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V, BLOCK_M, BLOCK_N)
            ds = slope * (dp - delta[:, None])                                         # [BLOCK_M, BLOCK_N]
            if dgain_ptr is not None:
                dgain += tl.sum(term_gradient(
                    a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, sizes, 6, AXES, FAR, CLIP,
                    BLOCK_M, BLOCK_N), 0)
            if dshare_ptr is not None:
                dshare += tl.sum(term_gradient(
                    a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, sizes, 7, AXES, FAR, CLIP,
                    BLOCK_M, BLOCK_N), 0)
            if dcolumn_ptr is not None:
                dcolumn += tl.sum(ds, 0)
            if dpolicy_ptr is not None:
                moved = (i[:, None] != j[None, :]) | (sizes[12] == 0)
                dpolicy += tl.sum(tl.where(moved, bare * (dp - delta[:, None]), 0.0), 0)
            if dxy_ptr is not None:
                y, x, length = finite_distances(terms, term_strides, image, row, start, sizes, BLOCK_M, BLOCK_N)
                pull = ds / tl.where(length == 0.0, 1.0, length)
                dy += tl.sum(pull * y, 0)
                dx += tl.sum(pull * x, 0)
            if dv_ptr is not None:
                dv = add_weighted(dv, tl.trans(kept), dout, WIDTHS_V)
            if dk_ptr is not None:
                ds = product_gradient(
                    ds, terms, term_strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
                if lse_ptr is None or terms[4] is not None:                            # such a row may see nothing
                    q = clean_parts(q, WIDTHS)
                dk = add_weighted(dk, tl.trans(ds * factor), q, WIDTHS)
        at = (places(terms, image, j, keys, sizes[9]) + part.to(tl.int64) * total) * heads + head
        if dcolumn_ptr is not None:
            tl.store(dcolumn_ptr + at, dcolumn, mask=j < keys)
        if dpolicy_ptr is not None:
            tl.store(dpolicy_ptr + at, dpolicy, mask=j < keys)
        if dgain_ptr is not None:
            tl.store(dgain_ptr + at, dgain, mask=j < keys)
        if dshare_ptr is not None:
            tl.store(dshare_ptr + at, dshare, mask=j < keys)
        if dxy_ptr is not None:
            slope_h = slope_of(terms, term_strides, head)
            tl.store(dxy_ptr + at * 2, dy * slope_h, mask=j < keys)
            tl.store(dxy_ptr + (at * 2 + 1), dx * slope_h, mask=j < keys)
    before = part.to(tl.int64) * total * key_heads
    if dv_ptr is not None:
        dv_ptr += before * WIDTHS_V[0]
        store_parts(dv_ptr, offsets(image, key_head, j + sizes[9], dv_strides, ALIGN), j < keys, 1, dv, WIDTHS_V)
    if dk_ptr is not None:
        dk_ptr += before * WIDTHS[0]
        store_parts(dk_ptr, offsets(image, key_head, j + sizes[9], dk_strides, ALIGN), j < keys, 1, dk, WIDTHS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_bias(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, dbias_ptr, seen_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, seen_strides, sizes, members, chunks,
    scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of one sample and head of a bias, of gain or of weight, summed over a chunk of the samples
    and heads that share it, in order; members = (bias heads, samples sharing, heads sharing). `seen` says which of them see
    something of the tile. TARGET: its place in `terms`.
    Grid: bias heads (fastest) x query tiles x key tiles x bias samples x chunks, on axis 0. Writes [chunks, bias samples,
    bias heads, Nq, Nk].
    Any strides: q, k, v, dout and the terms."""
    batch, queries, keys, offset = sizes[0], sizes[1], sizes[2], sizes[4]
    bias_heads, samples, shared = members
    bias_samples = batch // samples
    pid = tl.program_id(0)
    m_tiles = (queries + BLOCK_M - 1) // BLOCK_M
    n_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    bias_head = pid % bias_heads
    row = pid // bias_heads % m_tiles * BLOCK_M
    start = pid // bias_heads // m_tiles % n_tiles * BLOCK_N
    part = pid // bias_heads // m_tiles // n_tiles
    bias_sample = part % bias_samples
    chunk = (part // bias_samples).to(tl.int64)
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    total = samples * shared
    first = (chunk * total // chunks).to(tl.int32)
    last = ((chunk + 1) * total // chunks).to(tl.int32)
    if CAUSAL:
        last = tl.where(start <= row + (BLOCK_M - 1) + offset, last, first)            # nothing is seen: 0
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in tl.range(first, last, num_stages=STAGES):
        image = bias_sample + member // shared
        head = bias_head + member % shared
        visit = 1
        if seen_ptr is not None:
            at = image.to(tl.int64) * seen_strides[0] + head.to(tl.int64) * seen_strides[1]
            visit = tl.load(seen_ptr + (at + row // BLOCK_M * n_tiles + start // BLOCK_N)).to(tl.int32)
        if visit != 0:
            own = of_sample(terms, sizes, image)
            factor = row_factor(terms, term_strides, head, scale)
            q, dout, lse, low, live, real, flat = query_side(
                q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, own,
                NORM, WIDTHS, WIDTHS_V, ALIGN)
            k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, own,
                             WIDTHS, WIDTHS_V, ALIGN)
            delta = tl.zeros([BLOCK_M], tl.float32)
            if delta_ptr is not None:
                delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
            a = row_products(q, k, WIDTHS)
            p, slope, kept, dp, given, bare = weights(
                a, factor, lse, low, live, v, dout, terms, term_strides, image, head, row, start, own, threshold, keep_scale,
                NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V, BLOCK_M, BLOCK_N)
            dbias += term_gradient(
                a, factor, p, slope, dp, delta, given, terms, term_strides, image, head, row, start, own, TARGET, AXES, FAR, CLIP,
                BLOCK_M, BLOCK_N)
    at = ((chunk * bias_samples + bias_sample) * bias_heads + bias_head) * queries
    tl.store(dbias_ptr + ((at + i)[:, None] * keys + j[None, :]), dbias.to(dbias_ptr.dtype.element_ty),
             mask=(i < queries)[:, None] & (j < keys)[None, :])
