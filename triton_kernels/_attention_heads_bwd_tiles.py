"""The kernels of the backward of attention whose heads mix."""

import triton
import triton.language as tl

from ._attention_heads_tiles import (
    EARLY_GAIN,
    EARLY_WEIGHT,
    GAIN,
    HEADS,
    PRE,
    head_factors,
    head_gradients,
    keep_heads,
    key_visits,
    known_rows,
    load_heads,
    mixed,
    mixed_scores,
    mixed_weights,
    query_visits,
    row_places,
    score_gradients,
    store_heads,
    tile_weights,
    times_early,
    times_factors,
    token_numbers,
    visited_tile,
)
from ._attention_host import UNSPECIALIZED
from ._attention_terms import of_sample, stream
from ._attention_tiles import SOFTMAX
from ._tiles import LOG2E, clean


@triton.jit
def _add_mixture(acc, x, y, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """acc_igh + sum_j x_gij y_hij."""
    return tl.dot(tl.permute(x, (1, 0, 2)), tl.permute(y, (1, 2, 0)), acc, input_precision="tf32x3")


@triton.jit
def _store_mixture(ptr, pid, acc, heads):
    g = tl.arange(0, HEADS)[:, None]
    h = tl.arange(0, HEADS)[None, :]
    tl.store(ptr + ((pid.to(tl.int64) * heads + g) * heads + h), tl.sum(acc, 0), mask=(g < heads) & (h < heads))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _head_deltas(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, dlse_ptr, delta_ptr, drow_ptr, dsink_ptr, dgiven_ptr, dweight_ptr, dpost_ptr,
    visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, v_strides, dout_strides, dlse_strides, d_strides,
    term_strides, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M queries of all heads of a sample delta - dlse, the sums of dS under softmax, the shares of the gradients of
    sink and post_bias, and the gradient of query_weight; or their share of the gradient of post_weight.
    Grid: query tiles (fastest) x samples, on axis 0. Writes [B, Nq, H] each, and dpost [programs, H, H].
    Any strides: q, k, v, dout, dlse and the terms. The rest is contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    row = pid % tiles * BLOCK_M
    image = pid // tiles
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    begin, end, at = query_visits(count_ptr, visit_strides, terms, image, row, sizes, CAUSAL, BLOCK_M)
    lse, low, live, real, flat = known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM, BLOCK_M)
    delta = tl.zeros([HEADS, BLOCK_M], tl.float32)
    dgiven = tl.zeros([HEADS, BLOCK_M], tl.float32)
    dweight = tl.zeros([HEADS, BLOCK_M], tl.float32)
    dpost = tl.zeros([BLOCK_M, HEADS, HEADS], tl.float32)
    for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        start = visited_tile(visit_ptr, at, n, BLOCK_N)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        p = tile_weights(s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        p = tl.where(live[:, :, None], p, 0.0)
        given, after, before, dp = head_gradients(
            s, live, dout_ptr, v_ptr, mixtures, terms, dout_strides, v_strides, d_strides, term_strides, image, row, start, sizes,
            threshold, keep_scale, AXES, FAR, CLIP, WIDTH_V, GROUP, ALIGN, CHUNK_V, BLOCK_M, BLOCK_N)
        if NORM == SOFTMAX and dpost_ptr is None:
            delta += tl.sum(p * dp, 2)
        if dgiven_ptr is not None:
            dgiven += tl.sum(after, 2)
        if dweight_ptr is not None:
            j = start + tl.arange(0, BLOCK_N)
            mean = token_numbers(terms[16], term_strides, 39, image, j, sizes[2], sizes[9], heads)
            dweight += tl.sum(p * mean[:, None, :], 2)
        if dpost_ptr is not None:
            p = times_factors(p, terms, term_strides, image, row, start, sizes, EARLY_WEIGHT, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
            dpost = _add_mixture(dpost, after, p, BLOCK_M, BLOCK_N)
    if NORM == SOFTMAX and dpost_ptr is None:
        share = tl.zeros([HEADS, BLOCK_M], tl.float32)                                 # of the sink
        if terms[4] is not None:
            h = tl.arange(0, HEADS)
            sink = tl.load(terms[4] + h.to(tl.int64) * term_strides[13], mask=h < heads, other=0.0).to(tl.float32)
            share = tl.where(live, tl.exp2((sink[:, None] - lse) * LOG2E - low), 0.0)
        dlse = tl.zeros([HEADS, BLOCK_M], tl.float32)
        if dlse_ptr is not None:
            dlse = tl.where(live, token_numbers(dlse_ptr, dlse_strides, 0, image, i, sizes[1], sizes[8], heads), 0.0)
        if drow_ptr is not None:
            tl.store(drow_ptr + flat, delta * share + dlse * (1.0 - share), mask=real)  # the terms of the sum cancel
        delta -= dlse
        tl.store(delta_ptr + flat, delta, mask=real)
        if dsink_ptr is not None:
            tl.store(dsink_ptr + flat, -share * delta, mask=real)
    if dgiven_ptr is not None:
        tl.store(dgiven_ptr + flat, dgiven, mask=real)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + flat, dweight, mask=real)
    if dpost_ptr is not None:
        _store_mixture(dpost_ptr, pid, dpost, heads)


@triton.jit
def _gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides, dout_strides,
    d_strides, strides, image, row, start, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of queries row.. and keys start.. of a sample and all heads the products, what is mixed and what comes of it, scores,
    weights, the gradients of the weights that meet the values and of what the second mixture mixes, dS, and that of the mixed
    scores."""
    i = row + tl.arange(0, BLOCK_M)
    lse, low, live, real, flat = known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM, BLOCK_M)
    delta = tl.zeros([HEADS, BLOCK_M], tl.float32)
    if NORM == SOFTMAX:
        delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
    a, x, y, s = mixed_scores(
        q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, strides, image, row, start, sizes, scale,
        AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
    p = tile_weights(s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
    p = tl.where(live[:, :, None], p, 0.0)
    given, after, before, dp = head_gradients(
        s, live, dout_ptr, v_ptr, mixtures, terms, dout_strides, v_strides, d_strides, strides, image, row, start, sizes,
        threshold, keep_scale, AXES, FAR, CLIP, WIDTH_V, GROUP, ALIGN, CHUNK_V, BLOCK_M, BLOCK_N)
    ds = score_gradients(p, s, dp, delta, live, NORM)
    dy = times_factors(ds, terms, strides, image, row, start, sizes, GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    return a, x, y, s, p, given, before, ds, dy


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, dq_ptr, drow_ptr, doffset_ptr, dfactor_ptr, dpre_ptr,
    visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides,
    sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of dq of BLOCK_M queries of all heads of a sample; or the sums of dS without softmax, the shares of the
    gradients of pre_bias and of factor, and their share of that of pre_weight.
    Grid: query tiles (fastest) x samples on axis 0, columns on axis 1. Writes [B, Nq, H, D], [B, Nq, H] and [programs, H, H].
    Any strides: q, k, v, dout and the terms. The rest is contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    row = pid % tiles * BLOCK_M
    image = pid // tiles
    column = tl.program_id(1) * BLOCK_D
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    begin, end, at = query_visits(count_ptr, visit_strides, terms, image, row, sizes, CAUSAL, BLOCK_M)
    flat, real = row_places(terms, image, i, sizes[1], sizes[8], heads)
    factor = head_factors(terms, term_strides, heads, scale)
    dq = tl.zeros([HEADS, BLOCK_M, BLOCK_D], tl.float32)
    drow = tl.zeros([HEADS, BLOCK_M], tl.float32)
    doffset = tl.zeros([HEADS, BLOCK_M], tl.float32)
    dfactor = tl.zeros([HEADS, BLOCK_M], tl.float32)
    dpre = tl.zeros([BLOCK_M, HEADS, HEADS], tl.float32)
    for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        start = visited_tile(visit_ptr, at, n, BLOCK_N)
        a, x, y, s, p, given, before, ds, dy = _gradients(
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides,
            dout_strides, d_strides, term_strides, image, row, start, sizes, scale, threshold, keep_scale,
            NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTH, WIDTH_V, ALIGN, CLIP, ALIKE, CHUNK, CHUNK_V, BLOCK_M, BLOCK_N)
        if drow_ptr is not None:
            drow += tl.sum(ds, 2)
        if dpre_ptr is not None:
            dpre = _add_mixture(dpre, dy, clean(x), BLOCK_M, BLOCK_N)
        if doffset_ptr is not None:
            doffset += tl.sum(dy, 2)
        dx = tl.where(a == a, mixed(mixtures[PRE], dy, heads, True, BLOCK_M, BLOCK_N), 0.0)
        dx = times_early(dx, s, terms, term_strides, image, row, start, sizes, EARLY_GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        if dfactor_ptr is not None:
            dfactor += tl.sum(dx * clean(a), 2)
        if dq_ptr is not None:
            j = start + tl.arange(0, BLOCK_N)
            inside = (tl.arange(0, HEADS) < heads)[:, None] & (j < sizes[2])[None, :]
            k = load_heads(k_ptr, k_strides, d_strides[1], image, j + sizes[9], inside, column, heads, WIDTH, BLOCK_D, GROUP, ALIGN)
            dq = tl.dot(dx.to(k.dtype), clean(k).to(k.dtype), dq, input_precision="ieee")
    if dq_ptr is not None:
        store_heads(dq_ptr, flat, real, column, dq * factor, WIDTH, BLOCK_D)
    if drow_ptr is not None:
        tl.store(drow_ptr + flat, drow, mask=real)
    if doffset_ptr is not None:
        tl.store(doffset_ptr + flat, doffset, mask=real)
    if dfactor_ptr is not None:
        tl.store(dfactor_ptr + flat, dfactor, mask=real)
    if dpre_ptr is not None:
        _store_mixture(dpre_ptr, pid, dpre, heads)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, dk_ptr, dcolumn_ptr,
    visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides,
    sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of the gradient that every head gives to BLOCK_N keys of a sample; or the column sums of dS.
    Grid: key tiles (fastest) x samples on axis 0, columns on axis 1. Writes [B, Nk, H, D] and [B, Nk, H].
    Any strides: q, k, v, dout and the terms. The rest is contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    start = pid % tiles * BLOCK_N
    image = pid // tiles
    column = tl.program_id(1) * BLOCK_D
    sizes = of_sample(terms, sizes, image)
    factor = head_factors(terms, term_strides, heads, scale)
    dk = tl.zeros([HEADS, BLOCK_N, BLOCK_D], tl.float32)
    dcolumn = tl.zeros([HEADS, BLOCK_N], tl.float32)
    begin, end, at = key_visits(count_ptr, visit_strides, image, start, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_M if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        row = visited_tile(visit_ptr, at, n, BLOCK_M)
        a, x, y, s, p, given, before, ds, dy = _gradients(
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides,
            dout_strides, d_strides, term_strides, image, row, start, sizes, scale, threshold, keep_scale,
            NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTH, WIDTH_V, ALIGN, CLIP, ALIKE, CHUNK, CHUNK_V, BLOCK_M, BLOCK_N)
        if dcolumn_ptr is not None:
            dcolumn += tl.sum(ds, 1)
        if dk_ptr is not None:
            i = row + tl.arange(0, BLOCK_M)
            inside = (tl.arange(0, HEADS) < heads)[:, None] & (i < sizes[1])[None, :]
            q = load_heads(q_ptr, q_strides, d_strides[0], image, i + sizes[8], inside, column, heads, WIDTH, BLOCK_D, 1, ALIGN)
            dx = tl.where(a == a, mixed(mixtures[PRE], dy, heads, True, BLOCK_M, BLOCK_N) * factor, 0.0)
            dx = times_early(dx, s, terms, term_strides, image, row, start, sizes, EARLY_GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
            dk = tl.dot(tl.permute(dx, (0, 2, 1)).to(q.dtype), clean(q).to(q.dtype), dk, input_precision="ieee")
    flat, real = row_places(terms, image, start + tl.arange(0, BLOCK_N), sizes[2], sizes[9], heads)
    if dk_ptr is not None:
        store_heads(dk_ptr, flat, real, column, dk, WIDTH, BLOCK_D)
    if dcolumn_ptr is not None:
        tl.store(dcolumn_ptr + flat, dcolumn, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_values(
    q_ptr, k_ptr, dout_ptr, lse_ptr, low_ptr, dv_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides,
    dout_strides, d_strides, term_strides, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """CHUNK_V columns of the gradient that every head gives to BLOCK_N values of a sample.
    Grid: key tiles (fastest) x samples on axis 0, columns on axis 1. Writes [B, Nk, H, Dv].
    Any strides: q, k, dout and the terms. The rest is contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    start = pid % tiles * BLOCK_N
    image = pid // tiles
    column = tl.program_id(1) * CHUNK_V
    sizes = of_sample(terms, sizes, image)
    dv = tl.zeros([HEADS, BLOCK_N, CHUNK_V], tl.float32)
    begin, end, at = key_visits(count_ptr, visit_strides, image, start, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_M if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        row = visited_tile(visit_ptr, at, n, BLOCK_M)
        i = row + tl.arange(0, BLOCK_M)
        lse, low, live, real, flat = known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM, BLOCK_M)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        p = tile_weights(s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        p = tl.where(live[:, :, None], p, 0.0)
        p = mixed_weights(p, s, mixtures, terms, term_strides, image, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        if terms[5] is not None:
            p = tl.where(keep_heads(stream(terms), image, i, start, threshold, BLOCK_N, sizes[1]), p * keep_scale, 0.0)
        dout = load_heads(
            dout_ptr, dout_strides, d_strides[3], image, i + sizes[8], real, column, heads, WIDTH_V, CHUNK_V, 1, ALIGN)
        dv = tl.dot(tl.permute(p, (0, 2, 1)).to(dout.dtype), dout, dv, input_precision="ieee")
    flat, real = row_places(terms, image, start + tl.arange(0, BLOCK_N), sizes[2], sizes[9], heads)
    store_heads(dv_ptr, flat, real, column, dv, WIDTH_V, CHUNK_V)


@triton.jit
def target_gradient(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides, dout_strides,
    d_strides, strides, image, row, start, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TARGET: tl.constexpr,
):  # fmt: skip
    """What queries row.. and keys start.. of a sample and all heads give to the bias or factor TARGET, a place in `terms`."""
    heads = sizes[3]
    a, x, y, s, p, given, before, ds, dy = _gradients(
        q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides, dout_strides,
        d_strides, strides, image, row, start, sizes, scale, threshold, keep_scale,
        NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTH, WIDTH_V, ALIGN, CLIP, ALIKE, CHUNK, CHUNK_V, BLOCK_M, BLOCK_N)
    if TARGET == 7 or TARGET == 27 or TARGET == 28:
        p = mixed_weights(p, s, mixtures, terms, strides, image, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, TARGET)
        x = p * given
    elif TARGET == 34:
        x = p * before
    elif TARGET == 33:
        dx = mixed(mixtures[PRE], dy, heads, True, BLOCK_M, BLOCK_N)
        one = tl.full([HEADS, BLOCK_M, BLOCK_N], 1.0, tl.float32)
        one = times_factors(one, terms, strides, image, row, start, sizes, EARLY_GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        dx = tl.where((one != one) & (s == float("-inf")), 0.0, dx)                    # the factor counted as 1
        x = tl.where(a == a, dx * (clean(a) * head_factors(terms, strides, heads, scale)), 0.0)
    elif TARGET == 6 or TARGET == 26:
        x = tl.where(ds == 0.0, 0.0, ds * y)
        x = times_factors(x, terms, strides, image, row, start, sizes, GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, TARGET)
    else:
        x = ds
    return x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_bias(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, dbias_ptr, seen_ptr,
    mixtures, terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, seen_strides, sizes, members, chunks,
    origin, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARED: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of one sample of a bias or factor TARGET, a place in `terms`, summed over a chunk of the samples
    that share it, and over the heads if SHARED; members = (bias samples, samples sharing), from the sample `origin` on. `seen`
    says which of them see something of the tile.
    Grid: query tiles (fastest) x key tiles x bias samples x chunks, on axis 0. Writes [chunks, bias samples, bias heads, Nq, Nk].
    Any strides: q, k, v, dout and the terms."""
    queries, keys, heads = sizes[1], sizes[2], sizes[3]
    bias_samples, samples = members
    pid = tl.program_id(0)
    m_tiles = (queries + BLOCK_M - 1) // BLOCK_M
    n_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    row = pid % m_tiles * BLOCK_M
    start = pid // m_tiles % n_tiles * BLOCK_N
    part = pid // m_tiles // n_tiles
    bias_sample = part % bias_samples
    chunk = (part // bias_samples).to(tl.int64)
    acc = tl.zeros([HEADS, BLOCK_M, BLOCK_N], tl.float32)
    first = (chunk * samples // chunks).to(tl.int32)
    last = ((chunk + 1) * samples // chunks).to(tl.int32)
    if CAUSAL:
        last = tl.where(start <= row + (BLOCK_M - 1) + sizes[4], last, first)          # nothing is seen: 0
    for member in tl.range(first, last, num_stages=1, disable_licm=True):
        image = origin + bias_sample + member
        visit = 1
        if seen_ptr is not None:
            at = image.to(tl.int64) * seen_strides[0] + row // BLOCK_M * n_tiles + start // BLOCK_N
            visit = tl.load(seen_ptr + at).to(tl.int32)
        if visit != 0:
            own = of_sample(terms, sizes, image)
            acc += target_gradient(
                q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides,
                dout_strides, d_strides, term_strides, image, row, start, own, scale, threshold, keep_scale,
                NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTH, WIDTH_V, ALIGN, CLIP, ALIKE, CHUNK, CHUNK_V, BLOCK_M, BLOCK_N, TARGET)
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    at = chunk * bias_samples + bias_sample
    inside = (i < queries)[:, None] & (j < keys)[None, :]
    if SHARED:
        tl.store(dbias_ptr + ((at * queries + i)[:, None] * keys + j[None, :]), tl.sum(acc, 0), mask=inside)
    else:
        h = tl.arange(0, HEADS)
        flat = (((at * heads + h)[:, None] * queries + i[None, :])[:, :, None] * keys) + j[None, None, :]
        tl.store(dbias_ptr + flat, acc, mask=(h < heads)[:, None, None] & inside[None, :, :])
