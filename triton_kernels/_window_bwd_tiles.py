"""The two sides of a window and the gradients between them, for the backward kernels of window attention."""

import triton
import triton.language as tl

from ._tiles import LOG2E, clean, keep_tile, load_rows
from ._window_tiles import (
    PADS_HIDDEN,
    PADS_VISIBLE,
    load_keys,
    mask_scores,
    row_offsets,
    token_numbers,
    window_slots,
)


@triton.jit
def row_factor(tau_ptr, tau_stride, head, scale, cosine_max):
    """What the product of q and k is multiplied by in this head."""
    factor = scale
    if tau_ptr is not None:
        factor = tl.exp(tl.minimum(tl.load(tau_ptr + head * tau_stride).to(tl.float32), cosine_max))
    return factor


@triton.jit
def query_side(
    image, window, head, i, heads, q_ptr, dout_ptr, lse_ptr, dlse_ptr,
    q_strides, dout_strides, dlse_strides, d_strides, dout_d_stride, lengths, counts, shifts,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """q, dout, lse (+inf where no row is written: P is 0), dlse, and where the rows stand."""
    coords, real = window_slots(window, i, lengths, counts, shifts, WINDOW, AXES, N, PADS, SHIFTED, ROLL_FIRST)
    tokens = token_numbers(coords, lengths)
    image_tokens = lengths[0].to(tl.int64) * lengths[1] * lengths[2] * lengths[3]
    flat = (image * image_tokens + tokens) * heads + head                              # [i] into [B, T, H]
    q = load_rows(q_ptr, row_offsets(coords, image, head, q_strides, AXES, ALIGN), real, d_strides[0], D, BLOCK_D)
    dout = load_rows(dout_ptr, row_offsets(coords, image, head, dout_strides, AXES, ALIGN), real, dout_d_stride,
                     DV, BLOCK_DV)
    lse = tl.load(lse_ptr + flat, mask=real, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    dlse = tl.zeros_like(lse)
    if dlse_ptr is not None:
        at = row_offsets(coords, image, head, dlse_strides, AXES, 1)
        dlse = tl.load(dlse_ptr + at, mask=real, other=0.0).to(tl.float32)
    return q, dout, lse, dlse, coords, tokens, flat, real


@triton.jit
def key_side(
    image, window, head, j, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides, pad_strides,
    lengths, counts, shifts,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """k, v (0 where not finite) of key head `head`, and which slots are visible, tokens and pads."""
    coords, real = window_slots(window, j, lengths, counts, shifts, WINDOW, AXES, N, PADS, SHIFTED, ROLL_FIRST)
    pad = (j < N) & ~real
    visible = real
    if PADS == PADS_VISIBLE:
        visible = j < N
    k = load_keys(k_ptr, row_offsets(coords, image, head, k_strides, AXES, ALIGN), real, pad, d_strides[1],
                  k_pad_ptr, (pad_strides[0], pad_strides[1]), head, D, BLOCK_D, PADS)
    v = load_keys(v_ptr, row_offsets(coords, image, head, v_strides, AXES, ALIGN), real, pad, d_strides[2],
                  v_pad_ptr, (pad_strides[2], pad_strides[3]), head, DV, BLOCK_DV, PADS)
    return k, clean(v).to(v.dtype), coords, real, pad, visible


@triton.jit
def weights(
    q, k, v, dout, lse, low, bias, sides_i, sides_j, seam, visible, stream, image, head, tokens, start,
    factor, mask_value, threshold, keep_scale,
    BLOCK_N: tl.constexpr, N: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr, HIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scaled products a, P, P after dropout and dP, all [i, j] in float32; low is what lse lacks, in base 2."""
    a = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    s = mask_scores(a, bias, sides_i, sides_j, seam, visible, mask_value, HAS_BIAS, SHIFTED, HIDE,
                    N % BLOCK_N != 0 or PADS == PADS_HIDDEN)
    p = tl.exp2((s - lse[:, None]) * LOG2E - low[:, None])
    p = tl.where((lse < float("inf"))[:, None], p, 0.0)  # a NaN may be seen by such rows only
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    dropped = p
    if stream is not None:
        keep = keep_tile(stream, image, head, tokens, start, threshold, BLOCK_N)
        dropped = tl.where(keep, p * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return a, p, dropped, dp
