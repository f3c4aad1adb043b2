"""Backward of window attention for windows of several tiles, and for grouped queries.

Three passes, each deterministic: queries (delta, dq, dtau), keys (dk, dv and the pad vectors), and, where the bias
wants a gradient, one tile of it at a time over a chunk of windows. An lse of 50 rounded to float32 is off by 2e-6, and
so would be every weight of its row: for float32 inputs the first pass sums the weights and keeps their log as `low`.
"""

import triton
import triton.language as tl

from ._tiles import clean, store_rows
from ._window_bwd_tiles import key_side, query_side, row_factor, weights
from ._window_host import UNSPECIALIZED
from ._window_tiles import load_bias, row_offsets, seams, sides, unit_rows, unit_rows_grad


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, stream, dout_ptr, lse_ptr, dlse_ptr,
    delta_ptr, low_ptr, dq_ptr, dtau_ptr,
    q_strides, k_strides, v_strides, d_strides, dout_strides, dout_d_stride, dlse_strides, dq_strides, dq_d_stride,
    bias_strides, index_strides, pad_strides, tau_stride, lengths, counts, shifts, table_rows, windows, heads,
    scale, mask_value, cosine_max, cosine_eps, threshold, keep_scale,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """delta - dlse and dq of BLOCK_M queries of one head of one window, and their share of dtau.
    Grid: heads (fastest) x query tiles x windows of all images, on axis 0.
    Any strides: q, k, v, dout, dlse, dq, bias, index, the pad vectors and tau."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    pid = tl.program_id(0)
    head = pid % heads
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    i = pid // heads % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    work = pid // heads // tiles
    image, window = work // windows, work % windows
    seam = seams(window, counts, AXES, SHIFTED)
    sides_i = sides(i, shifts, WINDOW, AXES, SHIFTED)
    factor = row_factor(tau_ptr, tau_stride, head, scale, cosine_max)
    q_raw, dout, lse, dlse, coords_i, tokens, flat, real_i = query_side(
        image, window, head, i, heads, q_ptr, dout_ptr, lse_ptr, dlse_ptr,
        q_strides, dout_strides, dlse_strides, d_strides, dout_d_stride, lengths, counts, shifts,
        WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
    q = q_raw                                                                          # [BLOCK_M, BLOCK_D]
    if tau_ptr is not None:
        q = unit_rows(q_raw, cosine_eps)

    low = tl.zeros([BLOCK_M], tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        j = start + tl.arange(0, BLOCK_N)
        sides_j = sides(j, shifts, WINDOW, AXES, SHIFTED)
        k, v, _, _, _, visible = key_side(
            image, window, head // GROUP, j, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides,
            pad_strides, lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        if tau_ptr is not None:
            k = unit_rows(k, cosine_eps)
        bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)
        _, p, _, dp = weights(
            q, k, v, dout, lse, low, bias, sides_i, sides_j, seam, visible, stream, image, head, tokens,
            start, factor, mask_value, threshold, keep_scale, BLOCK_N, N, PADS, SHIFTED, HIDE, bias_ptr is not None)
        delta += tl.sum(p * dp, 1)
        norm += tl.sum(p, 1)
    if low_ptr is not None:
        norm = tl.where(norm == 0.0, 1.0, norm)
        delta = delta / norm
        low = tl.log2(norm)
        tl.store(low_ptr + flat, low, mask=real_i)
    delta -= dlse
    tl.store(delta_ptr + flat, delta, mask=real_i)

    if dq_ptr is not None or dtau_ptr is not None:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dtau = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_N)
            sides_j = sides(j, shifts, WINDOW, AXES, SHIFTED)
            k, v, _, _, _, visible = key_side(
                image, window, head // GROUP, j, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides,
                pad_strides, lengths, counts, shifts,
                WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
            if tau_ptr is not None:
                k = unit_rows(k, cosine_eps)
            bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)
            a, p, _, dp = weights(
                q, k, v, dout, lse, low, bias, sides_i, sides_j, seam, visible, stream, image, head, tokens,
                start, factor, mask_value, threshold, keep_scale, BLOCK_N, N, PADS, SHIFTED, HIDE, bias_ptr is not None)
            ds = p * (dp - delta[:, None])                                             # [BLOCK_M, BLOCK_N]
            if dtau_ptr is not None:
                dtau += tl.sum(tl.where(ds == 0.0, 0.0, ds * a), 1)
            if dq_ptr is not None:
                dq += tl.dot(ds.to(k.dtype), clean(k).to(k.dtype), input_precision="ieee")
        if dtau_ptr is not None:
            tau = tl.load(tau_ptr + head * tau_stride).to(tl.float32)
            tl.store(dtau_ptr + pid, tl.where(tau <= cosine_max, tl.sum(dtau, 0), 0.0))
        if dq_ptr is not None:
            dq = dq * factor
            if tau_ptr is not None:
                dq = unit_rows_grad(q_raw, dq, cosine_eps)
            at = row_offsets(coords_i, image, head, dq_strides, AXES, ALIGN)
            store_rows(dq_ptr, at, real_i, dq_d_stride, dq, D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, stream, dout_ptr, lse_ptr, delta_ptr,
    low_ptr, dk_ptr, dv_ptr, dk_pad_ptr, dv_pad_ptr,
    q_strides, k_strides, v_strides, d_strides, dout_strides, dout_d_stride, dq_strides, dk_strides, dk_d_stride,
    dv_strides, dv_d_stride, bias_strides, index_strides, pad_strides, tau_stride, lengths, counts, shifts, table_rows,
    windows, heads, scale, mask_value, cosine_max, cosine_eps, threshold, keep_scale,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head of one window, and their share of the pad vectors' gradients.
    Grid: key heads (fastest) x key tiles x windows of all images, on axis 0.
    Any strides: q, k, v, dout, dk, dv, bias, index, the pad vectors and tau."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    if dk_strides is None:
        dk_strides = dq_strides
    if dv_strides is None:
        dv_strides = dq_strides
    pid = tl.program_id(0)
    key_heads = heads // GROUP
    key_head = pid % key_heads
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    start = pid // key_heads % tiles * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    part = (pid // key_heads).to(tl.int64)
    work = pid // key_heads // tiles
    image, window = work // windows, work % windows
    seam = seams(window, counts, AXES, SHIFTED)
    sides_j = sides(j, shifts, WINDOW, AXES, SHIFTED)
    k_raw, v, coords_j, real_j, pad, visible = key_side(
        image, window, key_head, j, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides, pad_strides,
        lengths, counts, shifts,
        WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
    k = k_raw                                                                          # [BLOCK_N, BLOCK_D]
    if tau_ptr is not None:
        k = unit_rows(k_raw, cosine_eps)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    m_tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    for step in tl.range(0, GROUP * m_tiles, num_stages=STAGES):
        head = key_head * GROUP + step // m_tiles
        i = step % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        sides_i = sides(i, shifts, WINDOW, AXES, SHIFTED)
        factor = row_factor(tau_ptr, tau_stride, head, scale, cosine_max)
        q, dout, lse, _, _, tokens, flat, real_i = query_side(
            image, window, head, i, heads, q_ptr, dout_ptr, lse_ptr, None,
            q_strides, dout_strides, q_strides, d_strides, dout_d_stride, lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        delta = tl.load(delta_ptr + flat, mask=real_i, other=0.0)                      # [BLOCK_M]
        low = tl.zeros_like(delta)
        if low_ptr is not None:
            low = tl.load(low_ptr + flat, mask=real_i, other=0.0)
        if tau_ptr is not None:
            q = unit_rows(q, cosine_eps)
        bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)
        _, p, dropped, dp = weights(
            q, k, v, dout, lse, low, bias, sides_i, sides_j, seam, visible, stream, image, head, tokens,
            start, factor, mask_value, threshold, keep_scale, BLOCK_N, N, PADS, SHIFTED, HIDE, bias_ptr is not None)
        if dv_ptr is not None or dv_pad_ptr is not None:
            dv += tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision="ieee")
        if dk_ptr is not None or dk_pad_ptr is not None:
            ds = p * (dp - delta[:, None]) * factor                                    # [BLOCK_M, BLOCK_N]
            dk += tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision="ieee")
    if dv_ptr is not None:
        at = row_offsets(coords_j, image, key_head, dv_strides, AXES, ALIGN)
        store_rows(dv_ptr, at, real_j, dv_d_stride, dv, DV, BLOCK_DV)
    if dv_pad_ptr is not None:
        d = tl.arange(0, BLOCK_DV)
        tl.store(dv_pad_ptr + (part * key_heads + key_head) * DV + d, tl.sum(tl.where(pad[:, None], dv, 0.0), 0),
                 mask=d < DV)
    if dk_ptr is not None or dk_pad_ptr is not None:
        if tau_ptr is not None:
            dk = unit_rows_grad(k_raw, dk, cosine_eps)
        if dk_ptr is not None:
            at = row_offsets(coords_j, image, key_head, dk_strides, AXES, ALIGN)
            store_rows(dk_ptr, at, real_j, dk_d_stride, dk, D, BLOCK_D)
        if dk_pad_ptr is not None:
            d = tl.arange(0, BLOCK_D)
            tl.store(dk_pad_ptr + (part * key_heads + key_head) * D + d, tl.sum(tl.where(pad[:, None], dk, 0.0), 0),
                     mask=d < D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_bias(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, stream, dout_ptr, lse_ptr, delta_ptr,
    low_ptr, dbias_ptr,
    q_strides, k_strides, v_strides, d_strides, dout_strides, dout_d_stride, bias_strides, index_strides, pad_strides,
    tau_stride, lengths, counts, shifts, table_rows, windows, heads, total, chunks,
    scale, mask_value, cosine_max, cosine_eps, threshold, keep_scale,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of one head's bias gradient, summed in float32 over a chunk of all images' windows, in order.
    Grid: heads (fastest) x query tiles x key tiles x chunks, on axis 0. Writes [chunks, H, N, N].
    Any strides: q, k, v, dout, bias, index, the pad vectors and tau."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    pid = tl.program_id(0)
    head = pid % heads
    m_tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    i = pid // heads % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    start = pid // heads // m_tiles % n_tiles * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    chunk = (pid // heads // m_tiles // n_tiles).to(tl.int64)
    factor = row_factor(tau_ptr, tau_stride, head, scale, cosine_max)
    bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)
    sides_i = sides(i, shifts, WINDOW, AXES, SHIFTED)
    sides_j = sides(j, shifts, WINDOW, AXES, SHIFTED)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    first = (chunk * total // chunks).to(tl.int32)
    last = ((chunk + 1) * total // chunks).to(tl.int32)
    for work in tl.range(first, last, num_stages=STAGES):
        image, window = work // windows, work % windows
        seam = seams(window, counts, AXES, SHIFTED)
        q, dout, lse, _, _, tokens, flat, real_i = query_side(
            image, window, head, i, heads, q_ptr, dout_ptr, lse_ptr, None,
            q_strides, dout_strides, q_strides, d_strides, dout_d_stride, lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        k, v, _, _, _, visible = key_side(
            image, window, head // GROUP, j, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides,
            pad_strides, lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        if tau_ptr is not None:
            q = unit_rows(q, cosine_eps)
            k = unit_rows(k, cosine_eps)
        delta = tl.load(delta_ptr + flat, mask=real_i, other=0.0)                      # [BLOCK_M]
        low = tl.zeros_like(delta)
        if low_ptr is not None:
            low = tl.load(low_ptr + flat, mask=real_i, other=0.0)
        _, p, _, dp = weights(
            q, k, v, dout, lse, low, bias, sides_i, sides_j, seam, visible, stream, image, head, tokens,
            start, factor, mask_value, threshold, keep_scale, BLOCK_N, N, PADS, SHIFTED, HIDE, True)
        dbias += p * (dp - delta[:, None])
    part = dbias_ptr + (chunk * heads + head) * N * N
    tl.store(part + (i[:, None] * N + j[None, :]), dbias, mask=(i < N)[:, None] & (j < N)[None, :])
