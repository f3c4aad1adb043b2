"""window_attention on a GPU: softmax attention inside the windows of a map, shifted windows included.

The meaning of every argument is that of the reference, vitkern/reference/window_attention.py. One query tile of one
head walks a chunk of windows. Windows of at most 64 tokens are one key tile, and their bias stays in registers over the
chunk; larger ones visit key tiles with an online softmax. A NaN or infinity in a value is found in the result (0 x NaN
is NaN) and only then are the products of that window done again with a record of who sees it, so that rows that do not
see it stay as they are; finite maps pay one comparison per output element.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import config, family, power
from ._tiles import LN2, LOG2E, clean, keep_tile, load_rows, store_rows
from ._window_host import UNSPECIALIZED, arguments, reasons
from ._window_tiles import (
    PADS_HIDDEN,
    PADS_VISIBLE,
    load_bias,
    load_keys,
    mask_scores,
    row_offsets,
    seams,
    sides,
    token_numbers,
    unit_rows,
    window_slots,
)


@triton.jit
def _key_tile(
    q, start, bias, sides_i, image, window, head, row_scale,
    k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, i,
    k_strides, v_strides, d_strides, bias_strides, index_strides, pad_strides, lengths, counts, shifts, table_rows,
    mask_value, cosine_eps,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr,
    SHIFTED: tl.constexpr, ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scores of the query tile against keys start.., and their values: [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_DV]."""
    j = start + tl.arange(0, BLOCK_N)
    coords, real = window_slots(
        window, j, lengths, counts, shifts, WINDOW, AXES, N, PADS, SHIFTED, ROLL_FIRST)
    pad = (j < N) & ~real
    visible = real
    if PADS == PADS_VISIBLE:
        visible = j < N
    key_head = head // GROUP
    at = row_offsets(coords, image, key_head, k_strides, AXES, ALIGN)
    k = load_keys(k_ptr, at, real, pad, d_strides[1], k_pad_ptr, (pad_strides[0], pad_strides[1]), key_head,
                  D, BLOCK_D, PADS)                                                    # [BLOCK_N, BLOCK_D]
    at = row_offsets(coords, image, key_head, v_strides, AXES, ALIGN)
    v = load_keys(v_ptr, at, real, pad, d_strides[2], v_pad_ptr, (pad_strides[2], pad_strides[3]), key_head,
                  DV, BLOCK_DV, PADS)                                                  # [BLOCK_N, BLOCK_DV]
    if tau_ptr is not None:
        k = unit_rows(k, cosine_eps)
    if N > BLOCK_N:
        bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * row_scale                     # [BLOCK_M, BLOCK_N]
    s = mask_scores(s, bias, sides_i, sides(j, shifts, WINDOW, AXES, SHIFTED), seams(window, counts, AXES, SHIFTED),
                    visible, mask_value, bias_ptr is not None, SHIFTED, HIDE,
                    N % BLOCK_N != 0 or PADS == PADS_HIDDEN)
    return s, v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, stream, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, d_strides, bias_strides, index_strides, pad_strides, tau_stride,
    lengths, counts, shifts, table_rows, windows, heads, total, chunks,
    scale, mask_value, cosine_max, cosine_eps, threshold, keep_scale,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head, in each window of a chunk of all images' windows.
    Grid: heads (fastest) x query tiles x chunks, on axis 0.
    Any strides: q, k, v, bias, index, the pad vectors and tau. out and lse are contiguous."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    pid = tl.program_id(0)
    head = pid % heads
    tiles: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    i = pid // heads % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = (pid // heads // tiles).to(tl.int64)
    row_scale = scale
    if tau_ptr is not None:
        row_scale = tl.exp(tl.minimum(tl.load(tau_ptr + head * tau_stride).to(tl.float32), cosine_max))
    sides_i = sides(i, shifts, WINDOW, AXES, SHIFTED)
    bias = 0.0
    if N <= BLOCK_N:
        j = tl.arange(0, BLOCK_N)
        bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, j, N)

    first = (chunk * total // chunks).to(tl.int32)
    last = ((chunk + 1) * total // chunks).to(tl.int32)
    for work in tl.range(first, last, num_stages=STAGES):
        image, window = work // windows, work % windows
        coords, real = window_slots(
            window, i, lengths, counts, shifts, WINDOW, AXES, N, PADS, SHIFTED, ROLL_FIRST)
        tokens = token_numbers(coords, lengths)
        at = row_offsets(coords, image, head, q_strides, AXES, ALIGN)
        q = load_rows(q_ptr, at, real, d_strides[0], D, BLOCK_D)                       # [BLOCK_M, BLOCK_D]
        if tau_ptr is not None:
            q = unit_rows(q, cosine_eps)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        norm = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            s, v = _key_tile(
                q, start, bias, sides_i, image, window, head, row_scale,
                k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, i,
                k_strides, v_strides, d_strides, bias_strides, index_strides, pad_strides, lengths, counts, shifts,
                table_rows, mask_value, cosine_eps,
                WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, GROUP, PADS, SHIFTED, ROLL_FIRST, HIDE, ALIGN)
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2((s - base[:, None]) * LOG2E)                                     # [BLOCK_M, BLOCK_N]
            shrink = tl.exp2((top - base) * LOG2E)
            norm = norm * shrink + tl.sum(p, 1)
            if stream is not None:
                p = tl.where(keep_tile(stream, image, head, tokens, start, threshold, BLOCK_N), p, 0.0)
            acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            top = higher

        if tl.sum(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
            # Something is not finite: again, counting for each row and channel the visible values that are not.
            base = tl.where(top == float("-inf"), 0.0, top)
            acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            bad = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            for start in tl.range(0, N, BLOCK_N, num_stages=1):
                s, v = _key_tile(
                    q, start, bias, sides_i, image, window, head, row_scale,
                    k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, i,
                    k_strides, v_strides, d_strides, bias_strides, index_strides, pad_strides, lengths, counts, shifts,
                    table_rows, mask_value, cosine_eps,
                    WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, GROUP, PADS, SHIFTED, ROLL_FIRST, HIDE, ALIGN)
                p = tl.exp2((s - base[:, None]) * LOG2E)
                if stream is not None:
                    p = tl.where(keep_tile(stream, image, head, tokens, start, threshold, BLOCK_N), p, 0.0)
                acc += tl.dot(p.to(v.dtype), clean(v), input_precision="ieee")
                seen = tl.where(s == float("-inf"), 0.0, 1.0).to(tl.float16)
                broken = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.float16)
                bad += tl.dot(seen, broken)
            acc = tl.where(bad > 0.0, float("nan"), acc)

        full = tl.where(norm == 0.0, 1.0, norm)
        lse = tl.where(norm == 0.0, float("-inf"), top + tl.log2(full) * LN2)
        o = acc * (keep_scale / full)[:, None]                                         # [BLOCK_M, BLOCK_DV]
        image_tokens = lengths[0].to(tl.int64) * lengths[1] * lengths[2] * lengths[3]
        at = (image * image_tokens + tokens) * heads + head                            # [BLOCK_M]
        store_rows(out_ptr, at * DV, real, 1, o, DV, BLOCK_DV)
        tl.store(lse_ptr + at, lse, mask=real)


def supported(
    q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible, scale, mask_value,
    cosine_max, cosine_eps, dropout_p,
) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return reasons(q, k, v, bias, index, window, dropout_p, not isinstance(_forward, triton.JITFunction))


def fwd(
    q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible, scale, mask_value,
    cosine_max, cosine_eps, dropout_p,
) -> tuple[Tensor, Tensor]:
    """out [B, *L, H, Dv] in v's dtype and lse [B, *L, H] in float32, both contiguous."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    shared = arguments(q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible,
                       scale, mask_value, cosine_max, cosine_eps, dropout_p)
    n, width = shared["N"], max(shared["BLOCK_D"], shared["BLOCK_DV"])
    tuned = config("window_attention", family(q.device), "forward", n, width, q.element_size())
    block_m, block_n = min(tuned["block_m"], power(n)), min(tuned["block_n"], power(n))
    total = q.shape[0] * shared["windows"]
    fans = shared["heads"] * -(-n // block_m)                                          # programs per chunk
    chunks = min(total, max(1, tuned["programs"] // fans)) if n <= block_n else total
    _forward[(fans * chunks,)](
        **shared, out_ptr=out, lse_ptr=lse, total=total, chunks=chunks, BLOCK_M=block_m, BLOCK_N=block_n,
        STAGES=tuned["stages"], num_warps=tuned["warps"], num_stages=tuned["stages"], enable_fp_fusion=True,
    )
    return out, lse
