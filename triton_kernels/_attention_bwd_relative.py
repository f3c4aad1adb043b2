"""The gradients of rel_y and rel_x, what a query adds to the rows and to the columns of the grid of keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd_sums import key_side, query_side
from ._attention_host import UNSPECIALIZED
from ._attention_terms import of_sample, row_factor
from ._attention_tiles import row_products, weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_relative(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, dy_ptr, dx_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, sizes, sides, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of dS over the columns and over the rows of the grid of keys, sides (kh, kw), for BLOCK_M queries of one head and sample
    and BLOCK_N columns of the grid, row by row.
    Grid: heads (fastest) x query tiles x samples x column tiles, on axis 0. Writes dy [column tiles, B, Nq, H, kh] and dx
    [B, Nq, H, kw].
    Any strides: q, k, v, dout and the terms."""
    batch, queries, heads, total = sizes[0], sizes[1], sizes[3], sizes[8]
    kh, kw = sides
    pid = tl.program_id(0)
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles % batch
    part = pid // heads // tiles // batch
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    x = part * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = row_factor(terms, term_strides, head, scale)
    q, dout, lse, low, live, real, flat = query_side(
        q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
        NORM, WIDTHS, WIDTHS_V, ALIGN)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for y in tl.range(0, kh, num_stages=STAGES):
        start = y * kw + part * BLOCK_N
        j = start + tl.arange(0, BLOCK_N)
        k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes,
                        WIDTHS, WIDTHS_V, ALIGN)
        p, slope, kept, dp, given, bare = weights(
            row_products(q, k, WIDTHS), factor, lse, low, live, v, dout, terms, term_strides, image, head, row, start,
            sizes, threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, True, WIDTHS_V, BLOCK_M, BLOCK_N, False)
        ds = tl.where((x < kw)[None, :], slope * (dp - delta[:, None]), 0.0)           # [BLOCK_M, BLOCK_N]
        dx += ds
        if dy_ptr is not None:
            at = part.to(tl.int64) * total * heads + flat
            tl.store(dy_ptr + (at * kh + y), tl.sum(ds, 1), mask=real)
    if dx_ptr is not None:
        tl.store(dx_ptr + (flat[:, None] * kw + x[None, :]), dx, mask=real[:, None] & (x < kw)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_relative_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, dy_ptr, dx_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, sizes, sides, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same sums the other way round: over the grid of queries, sides (qh, qw), for BLOCK_N keys of one head and sample and
    BLOCK_M columns of the grid. Not of packed sequences.
    Grid: heads (fastest) x key tiles x samples x column tiles, on axis 0. Writes dy [column tiles, B, Nk, H, qh] and dx
    [B, Nk, H, qw].
    Any strides: q, k, v, dout and the terms."""
    batch, keys, heads, total = sizes[0], sizes[2], sizes[3], sizes[9]
    qh, qw = sides
    pid = tl.program_id(0)
    tiles = (keys + BLOCK_N - 1) // BLOCK_N
    head = pid % heads
    start = pid // heads % tiles * BLOCK_N
    image = pid // heads // tiles % batch
    part = pid // heads // tiles // batch
    sizes = of_sample(terms, sizes, image)
    j = start + tl.arange(0, BLOCK_N)
    x = part * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = row_factor(terms, term_strides, head, scale)
    k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes, WIDTHS, WIDTHS_V, ALIGN)
    flat = (image.to(tl.int64) * keys + j) * heads + head
    dx = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for y in tl.range(0, qh, num_stages=STAGES):
        row = y * qw + part * BLOCK_M
        i = row + tl.arange(0, BLOCK_M)
        q, dout, lse, low, live, real, of_query = query_side(
            q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
            NORM, WIDTHS, WIDTHS_V, ALIGN)
        delta = tl.zeros([BLOCK_M], tl.float32)
        if delta_ptr is not None:
            delta = tl.load(delta_ptr + of_query, mask=real, other=0.0)
        p, slope, kept, dp, given, bare = weights(
            row_products(q, k, WIDTHS), factor, lse, low, live, v, dout, terms, term_strides, image, head, row, start,
            sizes, threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V, BLOCK_M, BLOCK_N)
        ds = tl.where((x < qw)[:, None], slope * (dp - delta[:, None]), 0.0)           # [BLOCK_M, BLOCK_N]
        dx += ds
        if dy_ptr is not None:
            at = part.to(tl.int64) * total * heads + flat
            tl.store(dy_ptr + (at * qh + y), tl.sum(ds, 0), mask=j < keys)
    if dx_ptr is not None:
        tl.store(dx_ptr + (flat[None, :] * qw + x[:, None]), dx, mask=(j < keys)[None, :] & (x < qw)[:, None])


def path_gradient(steps: Tensor, axis: int, sides: tuple[int, int]) -> Tensor:
    """The gradient of path_row (axis 0) or path_col from the sums of dS between places of the grid of `sides` along the other axis:
    [B, N, H, side] to [B, N, H]."""
    steps = steps.unflatten(1, sides)
    steps = steps.transpose(1, 2) if axis else steps                   # [B, other side, own side, H, own side]
    grad = _between(steps.permute(0, 1, 3, 2, 4)).transpose(2, 3)      # [B, other side, own side, H]
    return (grad.transpose(1, 2) if axis else grad).flatten(1, 2)


def _between(x: Tensor) -> Tensor:
    """For every t the sum of x[..., a, b] over min(a, b) < t <= max(a, b)."""
    both = (x + x.mT).cumsum(-2).flip(-1).cumsum(-1).flip(-1)              # over a' <= a and b' >= b
    return torch.nn.functional.pad(both.diagonal(1, -2, -1), (1, 0))
