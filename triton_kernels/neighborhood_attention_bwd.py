"""Gradients of neighborhood_attention on a GPU: of queries by tiles of queries, of keys and values by tiles of keys, of rpb by
offset, each a sum that one program takes in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._neighborhood_host import UNSPECIALIZED, arguments, row_strides
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
    reach,
    rows,
    sees,
    slopes,
    slots,
    tile_of,
    windows,
)
from ._tiles import clean, load_rows, store_rows
from .neighborhood_attention import box_of, extra_tile, extra_values, key_tile

RPB_PROGRAMS = 1024                     # of the sums over queries of one offset's products, where there is work for them
EXTRA_PROGRAMS = 256


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_queries(
    q_ptr, k_ptr, v_ptr, rpb_ptr, mask_ptr, ke_ptr, ve_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, dout_strides, dlse_strides, d_strides, rpb_strides, ke_strides, ve_strides, lengths,
    tiles, heads, extras, scale, dout_step,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """delta = sum P dP and then dq of a tile of queries of one group and head.
    Grid: heads (fastest) x tiles x groups x images, on axis 0. delta is [B, tokens, H], dq contiguous and may be null."""
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
        q = load_rows(q_ptr, offsets(c, image, head, q_strides, ALIGN), here, d_strides[0], D, BLOCK_D)
        dout = load_rows(dout_ptr, offsets(c, image, head, dout_strides, ALIGN), here, dout_step, DV, BLOCK_DV)
        at = numbers(c, image, lengths) * heads + head                                 # [BLOCK_M]
        lse = tl.load(lse_ptr + at, mask=here, other=0.0)
        dlse = tl.zeros([TILE[0] * TILE[1] * TILE[2]], tl.float32)
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + offsets(c, image, head, dlse_strides, 1), mask=here, other=0.0)
        delta = tl.zeros([TILE[0] * TILE[1] * TILE[2]], tl.float32)
        dq = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_D], tl.float32)
        for turn in tl.static_range(2):                     # delta, then dq
            for base in tl.range(0, counts[0] * counts[1] * counts[2], BLOCK_N, num_stages=STAGES):
                s, k, at_j, real = key_tile(
                    q, base, i, start, end, box, counts, sizes, group, image, head, scale, k_ptr, rpb_ptr, mask_ptr,
                    k_strides, d_strides[1], rpb_strides, lengths, KERNEL, DILATION, D, BLOCK_D, BLOCK_N, GROUP, ALIGN)
                v = load_rows(v_ptr, offsets(at_j, image, head // GROUP, v_strides, ALIGN), real, d_strides[2], DV, BLOCK_DV)
                dp = tl.dot(dout, tl.trans(clean(v).to(v.dtype)), input_precision="ieee")
                p, ds = slopes(s, lse[:, None], dlse[:, None], delta[:, None], dp)
                if turn == 0:
                    delta += tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
                else:
                    dq += tl.dot(ds.to(k.dtype), clean(k).to(k.dtype), input_precision="ieee")
            if ke_ptr is not None:
                for base in tl.range(0, extras, BLOCK_N, num_stages=1):
                    s, k, n = extra_tile(q, base, image, head, scale, ke_ptr, ke_strides, extras, D, BLOCK_D, BLOCK_N, GROUP)
                    v = extra_values(base, image, head, ve_ptr, ve_strides, extras, DV, BLOCK_DV, BLOCK_N, GROUP)
                    dp = tl.dot(dout, tl.trans(clean(v).to(dout.dtype)), input_precision="ieee")
                    p, ds = slopes(s, lse[:, None], dlse[:, None], delta[:, None], dp)
                    if turn == 0:
                        delta += tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
                    else:
                        dq += tl.dot(ds.to(k.dtype), clean(k).to(k.dtype), input_precision="ieee")
        tl.store(delta_ptr + at, delta - dlse, mask=here)
        if dq_ptr is not None:
            store_rows(dq_ptr, at * D, here, 1, dq * scale, D, BLOCK_D)


@triton.jit
def _query_side(
    c, here, image, head, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, q_step, dout_step, lengths, heads,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Queries and dout at coordinates of the map, what they hold that is finite, lse, delta, and NaN where a dout is not finite."""
    q = load_rows(q_ptr, offsets(c, image, head, q_strides, ALIGN), here, q_step, D, BLOCK_D)
    dout = load_rows(dout_ptr, offsets(c, image, head, dout_strides, ALIGN), here, dout_step, DV, BLOCK_DV)
    at = numbers(c, image, lengths) * heads + head
    lse = tl.load(lse_ptr + at, mask=here, other=0.0)
    delta = tl.load(delta_ptr + at, mask=here, other=0.0)
    return q, dout, clean(q).to(q.dtype), clean(dout).to(dout.dtype), lse, delta, broken(dout)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_keys(
    q_ptr, k_ptr, v_ptr, rpb_ptr, mask_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_strides, k_strides, v_strides, dout_strides, d_strides, rpb_strides, lengths, tiles, heads, scale, dout_step,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys of one group and head of k.
    Grid: heads of k (fastest) x tiles x groups x images, on axis 0. dk and dv are contiguous; either may be null."""
    pid = tl.program_id(0)
    kv_heads = heads // GROUP
    kv_head = pid % kv_heads
    tile = pid // kv_heads % (tiles[0] * tiles[1] * tiles[2])
    of_image = pid // kv_heads // (tiles[0] * tiles[1] * tiles[2])
    group, sizes = group_of(of_image % (DILATION[0] * DILATION[1] * DILATION[2]), lengths, DILATION)
    image = of_image // (DILATION[0] * DILATION[1] * DILATION[2])
    first, j = tile_of(tile, tiles, TILE)
    if inside(first, sizes):
        here = inside(j, sizes)
        c = on_map(j, group, DILATION)
        kept = here
        if mask_ptr is not None:
            kept &= tl.load(mask_ptr + numbers(c, image, lengths), mask=here, other=0) != 0
        k = load_rows(k_ptr, offsets(c, image, kv_head, k_strides, ALIGN), kept, d_strides[1], D, BLOCK_D)
        v = load_rows(v_ptr, offsets(c, image, kv_head, v_strides, ALIGN), kept, d_strides[2], DV, BLOCK_DV)
        bad, v = broken(k), clean(v).to(v.dtype)
        last0 = tl.minimum(first[0] + TILE[0], sizes[0]) - 1
        last1 = tl.minimum(first[1] + TILE[1], sizes[1]) - 1
        last2 = tl.minimum(first[2] + TILE[2], sizes[2]) - 1
        a0, b0 = reach(first[0], last0, sizes[0], KERNEL[0], STRIDE[0], CAUSAL[0], ZERO)
        a1, b1 = reach(first[1], last1, sizes[1], KERNEL[1], STRIDE[1], CAUSAL[1], ZERO)
        a2, b2 = reach(first[2], last2, sizes[2], KERNEL[2], STRIDE[2], CAUSAL[2], ZERO)
        box, counts = (a0, a1, a2), (b0 - a0, b1 - a1, b2 - a2)
        total = counts[0] * counts[1] * counts[2]
        dk = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_D], tl.float32)
        dv = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_DV], tl.float32)
        for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP):
            for base in tl.range(0, total, BLOCK_N, num_stages=STAGES):
                n = base + tl.arange(0, BLOCK_N)
                i = box_at(n, box, counts)
                start, end = windows(i, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
                q, dout, q_finite, dout_finite, lse, delta, spoilt = _query_side(
                    on_map(i, group, DILATION), n < total, image, head, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides,
                    dout_strides, d_strides[0], dout_step, lengths, heads, D, DV, BLOCK_D, BLOCK_DV, ALIGN)
                seen = sees(columns(start), columns(end), rows(j)) & kept[:, None] & (n < total)[None, :]
                bias = 0.0
                if rpb_ptr is not None:
                    bias = load_rpb(rpb_ptr, rpb_strides, head, columns(i), rows(j), seen, KERNEL)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale             # [keys, queries]
                s = finished(s + bad[:, None], bias, seen, rpb_ptr is not None)
                dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
                p, ds = slopes(s, lse[None, :], 0.0, delta[None, :], dp)
                dk += tl.dot(ds.to(q.dtype), q_finite, input_precision="ieee")
                p = tl.where(p == 0.0, 0.0, p + spoilt[None, :])
                dv += tl.dot(p.to(dout.dtype), dout_finite, input_precision="ieee")
        at = numbers(c, image, lengths) * kv_heads + kv_head
        if dk_ptr is not None:
            store_rows(dk_ptr, at * D, here, 1, dk * scale, D, BLOCK_D)
        if dv_ptr is not None:
            store_rows(dv_ptr, at * DV, here, 1, dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_rpb(
    q_ptr, k_ptr, v_ptr, rpb_ptr, mask_ptr, dout_ptr, lse_ptr, delta_ptr, drpb_ptr,
    q_strides, k_strides, v_strides, dout_strides, d_strides, rpb_strides, lengths, tiles, heads, scale, dout_step, total, chunks,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of dS over rows of queries for one offset on the two outer axes and BLOCK_N keys of a row: every row of BLOCK_M queries
    lies likewise to its keys, so the tiles are added as they are and their diagonals, the offsets on the last axis, at the end.
    Grid: heads (fastest) x offsets on axis 1 x on axis 0 x blocks of keys x chunks. `total` counts rows of queries: images x groups
    x tiles, which are (1, 1, BLOCK_M) here. Writes [chunks, H, 2 K0 - 1, 2 K1 - 1, blocks, BLOCK_N + BLOCK_M - 1]."""
    R0: tl.constexpr = 2 * KERNEL[0] - 1
    R1: tl.constexpr = 2 * KERNEL[1] - 1
    blocks: tl.constexpr = (2 * KERNEL[2] + BLOCK_M - 2 + BLOCK_N - 1) // BLOCK_N
    SPAN: tl.constexpr = BLOCK_N + BLOCK_M - 1
    pid = tl.program_id(0)
    head = pid % heads
    r1 = pid // heads % R1
    r0 = pid // heads // R1 % R0
    block = pid // heads // R1 // R0 % blocks
    chunk = (pid // heads // R1 // R0 // blocks).to(tl.int64)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    each = tiles[0] * tiles[1] * tiles[2]
    for work in tl.range((chunk * total // chunks).to(tl.int32), ((chunk + 1) * total // chunks).to(tl.int32), num_stages=1):
        of_image = work // each
        group, sizes = group_of(of_image % (DILATION[0] * DILATION[1] * DILATION[2]), lengths, DILATION)
        image = of_image // (DILATION[0] * DILATION[1] * DILATION[2])
        i0 = work % each // tiles[2] // tiles[1]
        i1 = work % each // tiles[2] % tiles[1]
        i2 = work % tiles[2] * BLOCK_M + m
        j0, j1 = i0 + r0 - (KERNEL[0] - 1), i1 + r1 - (KERNEL[1] - 1)
        s0, e0 = slots(i0, sizes[0], KERNEL[0], STRIDE[0], CAUSAL[0], ZERO)
        s1, e1 = slots(i1, sizes[1], KERNEL[1], STRIDE[1], CAUSAL[1], ZERO)
        if (i0 < sizes[0]) & (i1 < sizes[1]) & (s0 <= j0) & (j0 < e0) & (s1 <= j1) & (j1 < e1):
            s2, e2 = slots(i2, sizes[2], KERNEL[2], STRIDE[2], CAUSAL[2], ZERO)
            j2 = work % tiles[2] * BLOCK_M - (KERNEL[2] - 1) + block * BLOCK_N + n
            i, j = (i0 + m * 0, i1 + m * 0, i2), (j0 + n * 0, j1 + n * 0, j2)
            here, real = i2 < sizes[2], inside(j, sizes)
            at_j = on_map(j, group, DILATION)
            seen = (s2[:, None] <= j2[None, :]) & (j2[None, :] < e2[:, None]) & here[:, None]
            if mask_ptr is not None:
                kept = tl.load(mask_ptr + numbers(at_j, image, lengths), mask=real, other=1) != 0
                seen &= kept[None, :]
                real &= kept
            q, dout, q_finite, dout_finite, lse, delta, spoilt = _query_side(
                on_map(i, group, DILATION), here, image, head, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides,
                d_strides[0], dout_step, lengths, heads, D, DV, BLOCK_D, BLOCK_DV, ALIGN)
            k = load_rows(k_ptr, offsets(at_j, image, head // GROUP, k_strides, ALIGN), real, d_strides[1], D, BLOCK_D)
            v = load_rows(v_ptr, offsets(at_j, image, head // GROUP, v_strides, ALIGN), real, d_strides[2], DV, BLOCK_DV)
            bias = load_rpb(rpb_ptr, rpb_strides, head, rows(i), columns(j), seen, KERNEL)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = finished(s + broken(k)[None, :], bias, seen, True)
            dp = tl.dot(dout, tl.trans(clean(v).to(v.dtype)), input_precision="ieee")
            p, ds = slopes(s, lse[:, None], 0.0, delta[:, None], dp)
            acc += ds
    at = ((((chunk * heads + head) * R0 + r0) * R1 + r1) * blocks + block) * SPAN
    for e in tl.range(0, SPAN, num_stages=1):
        tl.store(drpb_ptr + at + e, tl.sum(tl.where(n[None, :] - m[:, None] == e - (BLOCK_M - 1), acc, 0.0)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_extras(
    q_ptr, ke_ptr, ve_ptr, dout_ptr, lse_ptr, delta_ptr, dke_ptr, dve_ptr,
    q_strides, dout_strides, d_strides, ke_strides, ve_strides, lengths, heads, extras, scale, dout_step, tokens, chunks,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M extra keys from one chunk of an image's queries.
    Grid: heads of k (fastest) x blocks of keys x chunks x images, on axis 0. Writes [B, chunks, E, Hk, D] and
    [B, chunks, E, Hk, Dv]."""
    pid = tl.program_id(0)
    kv_heads = heads // GROUP
    kv_head = pid % kv_heads
    blocks = (extras + BLOCK_M - 1) // BLOCK_M
    m = pid // kv_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = (pid // kv_heads // blocks % chunks).to(tl.int64)
    image = pid // kv_heads // blocks // chunks
    at = image.to(tl.int64) * ke_strides[0] + m.to(tl.int64) * ke_strides[1] + kv_head.to(tl.int64) * ke_strides[2]
    k = load_rows(ke_ptr, at, m < extras, ke_strides[3], D, BLOCK_D).to(q_ptr.dtype.element_ty)
    at = image.to(tl.int64) * ve_strides[0] + m.to(tl.int64) * ve_strides[1] + kv_head.to(tl.int64) * ve_strides[2]
    v = clean(load_rows(ve_ptr, at, m < extras, ve_strides[3], DV, BLOCK_DV)).to(q_ptr.dtype.element_ty)
    bad = broken(k)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    last = ((chunk + 1) * tokens // chunks).to(tl.int32)
    for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for base in tl.range((chunk * tokens // chunks).to(tl.int32), last, BLOCK_N, num_stages=STAGES):
            n = base + tl.arange(0, BLOCK_N)
            c = (n // lengths[2] // lengths[1], n // lengths[2] % lengths[1], n % lengths[2])
            q, dout, q_finite, dout_finite, lse, delta, spoilt = _query_side(
                c, n < last, image, head, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, d_strides[0], dout_step,
                lengths, heads, D, DV, BLOCK_D, BLOCK_DV, ALIGN)
            s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
            s = finished(s + bad[:, None], 0.0, (m < extras)[:, None] & (n < last)[None, :], False)
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
            p, ds = slopes(s, lse[None, :], 0.0, delta[None, :], dp)
            dk += tl.dot(ds.to(q.dtype), q_finite, input_precision="ieee")
            p = tl.where(p == 0.0, 0.0, p + spoilt[None, :])
            dv += tl.dot(p.to(dout.dtype), dout_finite, input_precision="ieee")
    at = ((image.to(tl.int64) * chunks + chunk) * extras + m) * kv_heads + kv_head
    store_rows(dke_ptr, at * D, m < extras, 1, dk * scale, D, BLOCK_D)
    store_rows(dve_ptr, at * DV, m < extras, 1, dv, DV, BLOCK_DV)


def bwd(
    dout, dlse, lse, q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale, need,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, drpb, dk_extra, dv_extra; None for those that `need` does not ask for."""
    given = (q, k, v, rpb, k_extra, v_extra)
    found = [torch.zeros_like(t, memory_format=torch.contiguous_format) if need >> bit & 1 and t is not None else None
             for bit, t in enumerate(given)]  # fmt: skip
    if q.numel() == 0 or need == 0:
        return tuple(found)
    dq, dk, dv, drpb, dk_extra, dv_extra = found
    dout = torch.zeros((1,), dtype=v.dtype, device=v.device).expand(*q.shape[:-1], v.shape[-1]) if dout is None else dout
    delta = torch.empty_like(lse)
    grid, shared, launch = arguments(
        q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale, dout
    )
    shared |= {"dout_ptr": dout, "dout_strides": row_strides(dout), "dout_step": dout.stride(-1)}
    shared |= {"lse_ptr": lse, "delta_ptr": delta}
    _backward_queries[(grid,)](
        **shared, dlse_ptr=dlse, dlse_strides=(0,) * 5 if dlse is None else row_strides(dlse), dq_ptr=dq, **launch
    )
    of_extras = {name: shared.pop(name) for name in ("ke_ptr", "ve_ptr", "ke_strides", "ve_strides", "extras")}
    if dk is not None or dv is not None:
        _backward_keys[(grid // shared["GROUP"],)](**shared, dk_ptr=dk, dv_ptr=dv, **launch)
    if drpb is not None:
        drpb.copy_(_sum_rpb(shared, q, rpb, kernel, dilation, launch))
    if dk_extra is not None or dv_extra is not None:
        for total, part in zip((dk_extra, dv_extra), _sum_extras(shared, of_extras, q, k_extra, v_extra, launch), strict=True):
            if total is not None:
                total.copy_(part.sum(0, keepdim=True) if total.shape[0] == 1 else part)
    return tuple(found)


def _sum_rpb(shared: dict, q: Tensor, rpb: Tensor, kernel: list[int], dilation: list[int], launch: dict) -> Tensor:
    """drpb in float32."""
    batch, *lengths, heads, _ = q.shape
    shared = {name: x for name, x in shared.items() if name not in ("TILE", "BLOCK_N", "tiles")}
    r0, r1, r2 = (2 * n - 1 for n in kernel)
    block_m, block_n = 16, 16 if r2 == 1 else 32
    blocks, span = -(-(r2 + block_m - 1) // block_n), block_n + block_m - 1
    sides = [-(-n // d) for n, d in zip(lengths, dilation, strict=True)]
    tiles = (sides[0], sides[1], -(-sides[2] // block_m))
    total = batch * dilation[0] * dilation[1] * dilation[2] * tiles[0] * tiles[1] * tiles[2]
    fans = heads * r0 * r1 * blocks
    chunks = max(1, min(total, RPB_PROGRAMS // fans))
    parts = torch.empty((chunks, heads, r0, r1, blocks, span), dtype=torch.float32, device=q.device)
    _backward_rpb[(fans * chunks,)](
        **shared, drpb_ptr=parts, tiles=tiles, total=total, chunks=chunks, BLOCK_M=block_m, BLOCK_N=block_n, **launch
    )
    parts = parts.sum(0)                                                               # [H, R0, R1, blocks, span]
    # entry e of a block is the offset block * BLOCK_N + e - (BLOCK_M - 1)
    wide = parts.new_zeros((heads, r0, r1, blocks * block_n + block_m - 1))
    for block in range(blocks):
        wide[..., block * block_n : block * block_n + span] += parts[..., block, :]
    return wide[..., block_m - 1 : block_m - 1 + r2]


def _sum_extras(shared, of_extras, q, k_extra, v_extra, launch) -> tuple[Tensor, Tensor]:
    """Gradients of the extra keys and values of every image in float32: [B, E, Hk, D], [B, E, Hk, Dv]."""
    batch, *lengths, heads, _ = q.shape
    names = ("q_ptr", "dout_ptr", "lse_ptr", "delta_ptr", "q_strides", "dout_strides", "d_strides", "lengths", "heads", "scale",
             "dout_step", "D", "DV", "BLOCK_D", "BLOCK_DV", "GROUP", "ALIGN", "STAGES")  # fmt: skip
    extras, kv_heads = k_extra.shape[1:3]
    tokens = lengths[0] * lengths[1] * lengths[2]
    fans = kv_heads * -(-extras // 16) * batch
    chunks = max(1, min(-(-tokens // 64), EXTRA_PROGRAMS // fans))
    parts = [torch.empty((batch, chunks, *x.shape[1:]), dtype=torch.float32, device=q.device) for x in (k_extra, v_extra)]
    block_n = shared["BLOCK_N"]
    _backward_extras[(fans * chunks,)](
        **{name: shared[name] for name in names}, **of_extras, dke_ptr=parts[0], dve_ptr=parts[1], tokens=tokens, chunks=chunks,
        BLOCK_M=16, BLOCK_N=block_n, **launch,
    )  # fmt: skip
    return parts[0].sum(1), parts[1].sum(1)
