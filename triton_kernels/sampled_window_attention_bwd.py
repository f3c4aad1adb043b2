"""Gradients of sampled_window_attention on a GPU; see sampled_window_attention.py.

No atomics: a first kernel leaves every query's log-sum and mean slope and writes dq, a second the gradients of a window's sampled
keys and values and of its places, which deformable attention's sort adds to the maps; the bias is summed over windows by chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import add_parts, table_gradient
from ._sampled_tiles import (
    UNSPECIALIZED,
    arguments,
    load_queries,
    places,
    query_rows,
    sample_rows,
    scores,
    value_places,
    window_count,
)
from ._tiles import LN2, LOG2E, clean, store_rows
from .deformable_attention import scatter

BIAS_PROGRAMS = 1024                    # that share the windows of a bias's gradient
BIAS_BYTES = 2**26                      # of their partial sums


@triton.jit
def _tile(
    q, dout, i, j, real, image, window, head, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr,
    k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows, sizes, counts,
    samples, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    SHARED: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores and dP [BLOCK_M, BLOCK_N], and the sampled keys and values as the products take them."""
    alive, left, top, fx, fy = places(
        coord_ptr, coord_strides, image, window, head, j, samples, sizes, counts, D, BLOCK_D, PARTS, SHARED)
    k = sample_rows(k_ptr, k_strides, image, head // GROUP, alive, left, top, fx, fy, sizes, D, BLOCK_D, 0)
    s = scores(q, k, alive, i, j, real, samples, scale, of_ptr, bias_ptr, index_ptr, of_strides, bias_strides, index_strides,
               table_rows, image, window, head, MASK)
    alive, left, top, fx, fy = value_places(
        coord_ptr, coord_v_ptr, coord_strides, coord_v_strides, image, window, head, j, samples, sizes, counts,
        DV, BLOCK_DV, PARTS, SHARED)
    v = clean(sample_rows(v_ptr, v_strides, image, head // GROUP, alive, left, top, fx, fy, sizes, DV, BLOCK_DV, 0)).to(q.dtype)
    dp = tl.dot(dout.to(q.dtype), tl.trans(v), input_precision="ieee")
    return s, dp, clean(k).to(q.dtype), v


@triton.jit
def _slopes(s, dp, lse, delta):
    """Weights and dS; both are 0 where a query does not see a sample."""
    p = tl.where(s == float("-inf"), 0.0, tl.exp2((s - lse[:, None]) * LOG2E))
    return p, tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _queries(
    q_ptr, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_strides, k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, dout_strides,
    table_rows, sizes, counts, heads, samples, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse and delta = sum P dP, float32 [windows of all images, heads, N], and where asked for dq [B, H, W, heads, D]; contiguous.
    Grid: heads (fastest) x blocks of queries x windows of all images, on axis 0."""
    blocks: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % heads
    unit = tl.program_id(0) // heads // blocks
    image = unit // (counts[0] * counts[1])
    window = unit % (counts[0] * counts[1])
    first = tl.program_id(0) // heads % blocks * BLOCK_M
    i, y, x, real = query_rows(first, window, WINDOW, BLOCK_M, sizes, counts)
    q = load_queries(q_ptr, q_strides, image, head, y, x, real, D, BLOCK_D)
    dout = load_queries(dout_ptr, dout_strides, image, head, y, x, real, DV, BLOCK_DV)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, samples, BLOCK_N, num_stages=1):
        j = start + tl.arange(0, BLOCK_N)
        s, dp, k, v = _tile(
            q, dout, i, j, real, image, window, head, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr,
            k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows, sizes,
            counts, samples, scale, D, DV, BLOCK_D, BLOCK_DV, GROUP, PARTS, SHARED, MASK)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((top - base) * LOG2E)
        norm = norm * shrink + tl.sum(p, 1)
        slope = slope * shrink + tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)
        top = higher
    full = tl.where(norm == 0.0, 1.0, norm)
    lse = tl.where(norm == 0.0, 0.0, top + tl.log2(full) * LN2)
    delta = slope / full
    at = (unit.to(tl.int64) * heads + head) * (WINDOW[0] * WINDOW[1]) + i
    tl.store(lse_ptr + at, lse, mask=i < WINDOW[0] * WINDOW[1])
    tl.store(delta_ptr + at, delta, mask=i < WINDOW[0] * WINDOW[1])
    if dq_ptr is not None:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in tl.range(0, samples, BLOCK_N, num_stages=1):
            j = start + tl.arange(0, BLOCK_N)
            s, dp, k, v = _tile(
                q, dout, i, j, real, image, window, head, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr,
                k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows, sizes,
                counts, samples, scale, D, DV, BLOCK_D, BLOCK_DV, GROUP, PARTS, SHARED, MASK)
            p, ds = _slopes(s, dp, lse, delta)
            acc += tl.dot(ds.to(q.dtype), k, input_precision="ieee")
        to = ((image.to(tl.int64) * sizes[0] + y) * sizes[1] + x) * heads + head
        store_rows(dq_ptr, to * D, real, 1, acc * scale, D, BLOCK_D)


@triton.jit
def _store_rows(ptr, image, window, head, j, windows, samples, heads, rows, D: tl.constexpr, BLOCK_D: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """Gradients of sampled rows as scatter wants them: [B, windows, samples, GROUP, kv heads, D], contiguous."""
    n = (image.to(tl.int64) * windows + window) * samples + j
    at = (n * GROUP + head % GROUP) * (heads // GROUP) + head // GROUP
    store_rows(ptr, at * D, j < samples, 1, rows, D, BLOCK_D)


@triton.jit
def _part_sums(x, part, D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr):
    """The sum over the channels of a part: [BLOCK_N, BLOCK_D] -> [BLOCK_N]."""
    d = tl.arange(0, BLOCK_D)
    if PARTS > 1:
        x = tl.where((d // (D // PARTS) == part)[None, :], x, 0.0)
    return tl.sum(x, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _samples(
    q_ptr, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    dplace_ptr, dplace_v_ptr,
    q_strides, k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, dout_strides,
    table_rows, sizes, counts, heads, samples, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where asked for, float32: the gradients of the sampled rows (see _store_rows), and of every head's places,
    [B, windows, samples, heads, PARTS, 2], those of k and v together where they share them.
    Grid: heads (fastest) x blocks of samples x windows of all images, on axis 0."""
    blocks = tl.cdiv(samples, BLOCK_N)
    windows = counts[0] * counts[1]
    head = tl.program_id(0) % heads
    unit = tl.program_id(0) // heads // blocks
    image = unit // windows
    window = unit % windows
    j = tl.program_id(0) // heads % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    bad = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)                                    # seen by a dout that is not finite
    for first in tl.range(0, WINDOW[0] * WINDOW[1], BLOCK_M, num_stages=1):
        i, y, x, real = query_rows(first, window, WINDOW, BLOCK_M, sizes, counts)
        q = load_queries(q_ptr, q_strides, image, head, y, x, real, D, BLOCK_D)
        dout = load_queries(dout_ptr, dout_strides, image, head, y, x, real, DV, BLOCK_DV)
        s, dp, k, v = _tile(
            q, dout, i, j, real, image, window, head, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr,
            k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows, sizes,
            counts, samples, scale, D, DV, BLOCK_D, BLOCK_DV, GROUP, PARTS, SHARED, MASK)
        at = (unit.to(tl.int64) * heads + head) * (WINDOW[0] * WINDOW[1]) + i
        lse = tl.load(lse_ptr + at, mask=i < WINDOW[0] * WINDOW[1], other=0.0)
        delta = tl.load(delta_ptr + at, mask=i < WINDOW[0] * WINDOW[1], other=0.0)
        p, ds = _slopes(s, dp, lse, delta)
        dk += tl.dot(tl.trans(ds.to(q.dtype)), clean(q), input_precision="ieee")
        dv += tl.dot(tl.trans(p.to(q.dtype)), clean(dout).to(q.dtype), input_precision="ieee")
        broken = tl.where(tl.abs(dout.to(tl.float32)) < float("inf"), 0.0, 1.0)
        if tl.sum(broken) > 0:
            seen = tl.where(s == float("-inf"), 0.0, 1.0).to(tl.float16)
            bad += tl.dot(tl.trans(seen), broken.to(tl.float16))
    dk *= scale
    dv = tl.where(bad > 0.0, float("nan"), dv)
    if dk_ptr is not None:
        _store_rows(dk_ptr, image, window, head, j, windows, samples, heads, dk, D, BLOCK_D, GROUP)
    if dv_ptr is not None:
        _store_rows(dv_ptr, image, window, head, j, windows, samples, heads, dv, DV, BLOCK_DV, GROUP)
    to = ((unit.to(tl.int64) * samples + j) * heads + head) * PARTS
    if dplace_ptr is not None:
        alive, left, top, fx, fy = places(
            coord_ptr, coord_strides, image, window, head, j, samples, sizes, counts, D, BLOCK_D, PARTS, SHARED)
        for side in tl.static_range(2):
            slope = dk * sample_rows(k_ptr, k_strides, image, head // GROUP, alive, left, top, fx, fy, sizes, D, BLOCK_D, 1 + side)
            for part in tl.static_range(PARTS):
                tl.store(dplace_ptr + (to + part) * 2 + side, _part_sums(slope, part, D, BLOCK_D, PARTS), mask=j < samples)
    if dplace_v_ptr is not None:
        alive, left, top, fx, fy = value_places(
            coord_ptr, coord_v_ptr, coord_strides, coord_v_strides, image, window, head, j, samples, sizes, counts,
            DV, BLOCK_DV, PARTS, SHARED)
        for side in tl.static_range(2):
            slope = dv * sample_rows(
                v_ptr, v_strides, image, head // GROUP, alive, left, top, fx, fy, sizes, DV, BLOCK_DV, 1 + side)
            for part in tl.static_range(PARTS):
                tl.store(dplace_v_ptr + (to + part) * 2 + side, _part_sums(slope, part, DV, BLOCK_DV, PARTS), mask=j < samples)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _bias(
    q_ptr, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr, dout_ptr, lse_ptr, delta_ptr, part_ptr,
    q_strides, k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, dout_strides,
    table_rows, sizes, counts, heads, samples, total, chunks, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of dS over each chunk of the windows of all images: [chunks, heads, N, samples] float32, contiguous.
    Grid: heads (fastest) x blocks of queries x blocks of samples x chunks, on axis 0."""
    blocks: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads % blocks * BLOCK_M
    tiles = tl.cdiv(samples, BLOCK_N)
    j = tl.program_id(0) // heads // blocks % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = (tl.program_id(0) // heads // blocks // tiles).to(tl.int64)
    windows = counts[0] * counts[1]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    begin = chunk * total // chunks
    for step in tl.range(0, ((chunk + 1) * total // chunks - begin).to(tl.int32), num_stages=1):
        unit = begin + step
        image = unit // windows
        window = unit % windows
        i, y, x, real = query_rows(first, window, WINDOW, BLOCK_M, sizes, counts)
        q = load_queries(q_ptr, q_strides, image, head, y, x, real, D, BLOCK_D)
        dout = load_queries(dout_ptr, dout_strides, image, head, y, x, real, DV, BLOCK_DV)
        s, dp, k, v = _tile(
            q, dout, i, j, real, image, window, head, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr,
            k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows, sizes,
            counts, samples, scale, D, DV, BLOCK_D, BLOCK_DV, GROUP, PARTS, SHARED, MASK)
        at = (unit * heads + head) * (WINDOW[0] * WINDOW[1]) + i
        lse = tl.load(lse_ptr + at, mask=i < WINDOW[0] * WINDOW[1], other=0.0)
        delta = tl.load(delta_ptr + at, mask=i < WINDOW[0] * WINDOW[1], other=0.0)
        p, ds = _slopes(s, dp, lse, delta)
        acc += ds
    i = first + tl.arange(0, BLOCK_M)
    to = ((chunk * heads + head) * (WINDOW[0] * WINDOW[1]) + i)[:, None] * samples + j[None, :]
    tl.store(part_ptr + to, acc, mask=(i < WINDOW[0] * WINDOW[1])[:, None] & (j < samples)[None, :])


def bwd(
    dout, q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask, need
) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, coords, coords_v, of_window and bias, where bits 0 to 6 of need ask for them."""
    inputs = (q, k, v, coords, coords_v, of_window, bias)
    wanted = [t is not None and bool(need >> bit & 1) for bit, t in enumerate(inputs)]
    if not q.numel():
        return tuple(torch.zeros_like(t) if w else None for t, w in zip(inputs, wanted, strict=True))
    given = arguments(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask)
    given |= {"dout_ptr": dout, "dout_strides": dout.stride()}
    batch, samples, heads, parts = q.shape[0], coords.shape[3], q.shape[3], given["PARTS"]
    units, n, windows = window_count(coords), window[0] * window[1], coords.shape[1] * coords.shape[2]
    blocks, tiles = triton.cdiv(n, given["BLOCK_M"]), triton.cdiv(samples, given["BLOCK_N"])

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    given |= {"lse_ptr": new(units, heads, n), "delta_ptr": new(units, heads, n)}
    dq = new(*q.shape, dtype=q.dtype) if wanted[0] else None
    _queries[(heads * blocks * units,)](**given, dq_ptr=dq)
    grads: list[Tensor | None] = [dq] + [None] * 6
    if any(wanted[1:5]):
        rows = [new(batch, windows * samples, heads, t.shape[4]) if w else None for t, w in zip((k, v), wanted[1:3], strict=True)]
        apart = coords_v is not None
        of_v = wanted[4] if apart else wanted[3]
        moved = [new(units, samples, heads, parts, 2) if w else None for w in (wanted[3], of_v)]
        _samples[(heads * tiles * units,)](
            **given, dk_ptr=rows[0], dv_ptr=rows[1], dplace_ptr=moved[0], dplace_v_ptr=moved[1])  # fmt: skip
        for at, row, x, c in ((1, rows[0], k, coords), (2, rows[1], v, coords_v if apart else coords)):
            grads[at] = None if row is None else _to_map(row, x, c, parts)
        if apart:
            grads[3:5] = [None if m is None else _to_places(m, c) for m, c in zip(moved, (coords, coords_v), strict=True)]
        elif moved[0] is not None:
            grads[3] = _to_places(moved[0] + moved[1], coords)
    if wanted[5] or wanted[6]:
        fit = BIAS_BYTES // (4 * heads * n * samples)
        chunks = units if wanted[5] else max(1, min(units, fit, BIAS_PROGRAMS // (heads * blocks * tiles)))
        sums = new(chunks, heads, n, samples)
        _bias[(heads * blocks * tiles * chunks,)](**given, part_ptr=sums, total=units, chunks=chunks)
        if wanted[5]:
            grads[5] = sums.view(of_window.shape).to(of_window.dtype)
        if wanted[6] and index is None:
            grads[6] = add_parts(sums, bias.dtype)
        elif wanted[6]:
            grads[6] = table_gradient(add_parts(sums, torch.float32), index, bias.shape[0], bias.dtype)
    return tuple(grads)


def _to_map(rows: Tensor, x: Tensor, coords: Tensor, parts: int) -> Tensor:
    """rows [B, windows samples, H, C], whose heads stand by their place in a kv head's group, added to the map of x."""
    batch, height, width, kv_heads, dim = x.shape
    points, group = rows.shape[1], rows.shape[2] // kv_heads
    where = coords.reshape(batch, points, -1, 2)
    if where.shape[2] == 1:
        where = where[:, :, :, None].expand(-1, -1, group, kv_heads, -1)
    else:
        where = where.unflatten(2, (kv_heads, group, parts)).transpose(2, 3)
    where = where.reshape(batch, points * group, kv_heads * parts, 2)
    rows = rows.view(batch, points * group, kv_heads * parts, dim // parts)
    return scatter(rows, where, height, width, x.dtype).view(x.shape)


def _to_places(moved: Tensor, coords: Tensor) -> Tensor:
    """The gradient of coords from that of every head's places: those that all heads share sum theirs."""
    if coords.shape[4] == 1:
        moved = moved.flatten(2, 3).sum(2, keepdim=True)
    return moved.to(coords.dtype).view(coords.shape)
