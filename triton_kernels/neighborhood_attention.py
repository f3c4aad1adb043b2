"""neighborhood_attention on a GPU: softmax attention of every token over the window around it.

The meaning of every argument is that of the reference, vitkern/reference/neighborhood_attention.py. A program takes a tile of
queries of one group of tokens and walks the box of keys that they see together with an online softmax; a tile is as near to a
cube as the window allows, since keys outside a query's own window are computed for nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._neighborhood_host import UNSPECIALIZED, arguments, reasons
from ._neighborhood_tiles import (
    box_at,
    broken,
    columns,
    finished,
    group_of,
    inside,
    load_rpb,
    numbers,
    offsets,
    on_map,
    rows,
    sees,
    slots,
    tile_of,
    windows,
)
from ._tiles import LN2, LOG2E, clean, load_rows, store_rows


@triton.jit
def box_of(
    first, sizes, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The first key that a tile sees, and the sides of its box."""
    a0, b0 = slots(first[0], sizes[0], KERNEL[0], STRIDE[0], CAUSAL[0], ZERO)
    a1, b1 = slots(first[1], sizes[1], KERNEL[1], STRIDE[1], CAUSAL[1], ZERO)
    a2, b2 = slots(first[2], sizes[2], KERNEL[2], STRIDE[2], CAUSAL[2], ZERO)
    x0, y0 = slots(tl.minimum(first[0] + TILE[0], sizes[0]) - 1, sizes[0], KERNEL[0], STRIDE[0], CAUSAL[0], ZERO)
    x1, y1 = slots(tl.minimum(first[1] + TILE[1], sizes[1]) - 1, sizes[1], KERNEL[1], STRIDE[1], CAUSAL[1], ZERO)
    x2, y2 = slots(tl.minimum(first[2] + TILE[2], sizes[2]) - 1, sizes[2], KERNEL[2], STRIDE[2], CAUSAL[2], ZERO)
    return (a0, a1, a2), (y0 - a0, y1 - a1, y2 - a2)


@triton.jit
def key_tile(
    q, base, i, start, end, box, counts, sizes, group, image, head, scale,
    k_ptr, rpb_ptr, mask_ptr, k_strides, d_stride, rpb_strides, lengths,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Scores of the queries against the keys base.. of the box, -inf where hidden, those keys, where they lie on the map, and
    whether they are there."""
    n = base + tl.arange(0, BLOCK_N)
    j = box_at(n, box, counts)
    real = (n < counts[0] * counts[1] * counts[2]) & inside(j, sizes)
    c = on_map(j, group, DILATION)
    seen = sees(rows(start), rows(end), columns(j)) & (n < counts[0] * counts[1] * counts[2])[None, :]
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + numbers(c, image, lengths), mask=real, other=1) != 0
        seen &= kept[None, :]
        real &= kept
    k = load_rows(k_ptr, offsets(c, image, head // GROUP, k_strides, ALIGN), real, d_stride, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    bias = 0.0
    if rpb_ptr is not None:
        bias = load_rpb(rpb_ptr, rpb_strides, head, rows(i), columns(j), seen, KERNEL)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                         # [BLOCK_M, BLOCK_N]
    return finished(s + broken(k)[None, :], bias, seen, rpb_ptr is not None), k, c, real


@triton.jit
def extra_tile(
    q, base, image, head, scale, k_ptr, strides, extras,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same of the extra keys base..; strides are (batch, keys, head, dim)."""
    n = base + tl.arange(0, BLOCK_N)
    at = image.to(tl.int64) * strides[0] + n.to(tl.int64) * strides[1] + (head // GROUP).to(tl.int64) * strides[2]
    k = load_rows(k_ptr, at, n < extras, strides[3], D, BLOCK_D).to(q.dtype)           # [BLOCK_N, BLOCK_D]
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale                         # [BLOCK_M, BLOCK_N]
    return finished(s + broken(k)[None, :], 0.0, (n < extras)[None, :], False), k, n


@triton.jit
def extra_values(
    base, image, head, v_ptr, strides, extras, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """The values of the extra keys base..: [BLOCK_N, BLOCK_DV]."""
    n = base + tl.arange(0, BLOCK_N)
    at = image.to(tl.int64) * strides[0] + n.to(tl.int64) * strides[1] + (head // GROUP).to(tl.int64) * strides[2]
    return load_rows(v_ptr, at, n < extras, strides[3], DV, BLOCK_DV)


@triton.jit
def _add_values(s, v, top, norm, acc, bad, EXACT: tl.constexpr):
    """One step of the online softmax. With EXACT values that are not finite count for 0 and are noted in `bad` by those who see
    them."""
    higher = tl.maximum(top, tl.max(s, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2((s - base[:, None]) * LOG2E)                                             # [BLOCK_M, BLOCK_N]
    shrink = tl.exp2((top - base) * LOG2E)
    if EXACT:
        seen = tl.where(s == float("-inf"), 0.0, 1.0).to(tl.float16)
        broken = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.float16)
        bad += tl.dot(seen, broken)
        v = clean(v).to(v.dtype)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return higher, norm * shrink + tl.sum(p, 1), acc, bad


@triton.jit
def _walk(
    q, i, start, end, box, counts, sizes, group, image, head, scale,
    k_ptr, v_ptr, rpb_ptr, mask_ptr, ke_ptr, ve_ptr, k_strides, v_strides, d_strides, rpb_strides, ke_strides, ve_strides,
    lengths, extras,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Largest score, sum of the weights, their products with the values, and with EXACT the values that are not finite."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bad = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for base in tl.range(0, counts[0] * counts[1] * counts[2], BLOCK_N, num_stages=STAGES):
        s, k, c, real = key_tile(
            q, base, i, start, end, box, counts, sizes, group, image, head, scale, k_ptr, rpb_ptr, mask_ptr, k_strides,
            d_strides[1], rpb_strides, lengths, KERNEL, DILATION, D, BLOCK_D, BLOCK_N, GROUP, ALIGN)
        v = load_rows(v_ptr, offsets(c, image, head // GROUP, v_strides, ALIGN), real, d_strides[2], DV, BLOCK_DV)
        top, norm, acc, bad = _add_values(s, v, top, norm, acc, bad, EXACT)
    if ke_ptr is not None:
        for base in tl.range(0, extras, BLOCK_N, num_stages=1):
            s, k, n = extra_tile(q, base, image, head, scale, ke_ptr, ke_strides, extras, D, BLOCK_D, BLOCK_N, GROUP)
            v = extra_values(base, image, head, ve_ptr, ve_strides, extras, DV, BLOCK_DV, BLOCK_N, GROUP).to(q.dtype)
            top, norm, acc, bad = _add_values(s, v, top, norm, acc, bad, EXACT)
    return top, norm, acc, bad


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    q_ptr, k_ptr, v_ptr, rpb_ptr, mask_ptr, ke_ptr, ve_ptr, out_ptr, lse_ptr,
    q_strides, k_strides, v_strides, d_strides, rpb_strides, ke_strides, ve_strides, lengths, tiles, heads, extras, scale,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of queries of one group and head.
    Grid: heads (fastest) x tiles x groups x images, on axis 0.
    Any strides: q, k, v, rpb and the extra keys and values. out and lse are contiguous."""
    pid = tl.program_id(0)
    head = pid % heads
    tile = pid // heads % (tiles[0] * tiles[1] * tiles[2])
    of_image = pid // heads // (tiles[0] * tiles[1] * tiles[2])
    group, sizes = group_of(of_image % (DILATION[0] * DILATION[1] * DILATION[2]), lengths, DILATION)
    image = of_image // (DILATION[0] * DILATION[1] * DILATION[2])
    first, i = tile_of(tile, tiles, TILE)
    if inside(first, sizes):
        start, end = windows(i, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
        box, counts = box_of(first, sizes, KERNEL, STRIDE, CAUSAL, ZERO, TILE)
        here = inside(i, sizes)
        c = on_map(i, group, DILATION)
        q = load_rows(q_ptr, offsets(c, image, head, q_strides, ALIGN), here, d_strides[0], D, BLOCK_D)   # [BLOCK_M, BLOCK_D]
        top, norm, acc, bad = _walk(
            q, i, start, end, box, counts, sizes, group, image, head, scale, k_ptr, v_ptr, rpb_ptr, mask_ptr, ke_ptr, ve_ptr,
            k_strides, v_strides, d_strides, rpb_strides, ke_strides, ve_strides, lengths, extras,
            KERNEL, DILATION, D, DV, BLOCK_D, BLOCK_DV, TILE[0] * TILE[1] * TILE[2], BLOCK_N, GROUP, ALIGN, False, STAGES)
        if tl.sum(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
            top, norm, acc, bad = _walk(
                q, i, start, end, box, counts, sizes, group, image, head, scale, k_ptr, v_ptr, rpb_ptr, mask_ptr, ke_ptr,
                ve_ptr, k_strides, v_strides, d_strides, rpb_strides, ke_strides, ve_strides, lengths, extras,
                KERNEL, DILATION, D, DV, BLOCK_D, BLOCK_DV, TILE[0] * TILE[1] * TILE[2], BLOCK_N, GROUP, ALIGN, True, 1)
            acc = tl.where(bad > 0.0, float("nan"), acc)
        full = tl.where(norm == 0.0, 1.0, norm)
        lse = tl.where(norm == 0.0, float("-inf"), top + tl.log2(full) * LN2)
        at = numbers(c, image, lengths) * heads + head                                 # [BLOCK_M]
        store_rows(out_ptr, at * DV, here, 1, acc / full[:, None], DV, BLOCK_DV)
        tl.store(lse_ptr + at, lse, mask=here)


def supported(
    q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale,
) -> list[str]:  # fmt: skip
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return reasons({"q": q, "k": k, "v": v}, rpb, not isinstance(_forward, triton.JITFunction))


def fwd(
    q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, L0, L1, L2, H, Dv] in v's dtype and lse [B, L0, L1, L2, H] in float32, both contiguous."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    grid, shared, launch = arguments(
        q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale
    )
    _forward[(grid,)](**shared, out_ptr=out, lse_ptr=lse, **launch)
    return out, lse


def bwd(*args) -> tuple[Tensor | None, ...]:
    """The gradients, as the op's `_bwd` gives them."""
    from .neighborhood_attention_bwd import bwd as gradients

    return gradients(*args)
