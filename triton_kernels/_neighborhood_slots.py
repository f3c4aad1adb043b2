"""The halves of neighbourhood attention on a GPU, whose scores or weights are stored: products of a token's row with those of its
window, their weighted sum, the sum the other way round, and the sum of the scores of one offset.

They serve code written for two separate ops, and models that look at the weights; each walks slot by slot and needs no matrix
product. x and y are maps, a [B, L0, L1, L2, H, n]."""

import triton
import triton.language as tl

from ._neighborhood_host import UNSPECIALIZED
from ._neighborhood_tiles import inside, load_rpb, offsets, on_map, windows
from ._tiles import clean, load_rows, store_rows


@triton.jit
def token_groups(n, lengths, DILATION: tl.constexpr):
    """Coordinates of tokens n on the map, in their groups, the groups, and their sides."""
    c = (n // lengths[2] // lengths[1], n // lengths[2] % lengths[1], n % lengths[2])
    group = (c[0] % DILATION[0], c[1] % DILATION[1], c[2] % DILATION[2])
    i = (c[0] // DILATION[0], c[1] // DILATION[1], c[2] // DILATION[2])
    s0 = (lengths[0] - group[0] + DILATION[0] - 1) // DILATION[0]
    s1 = (lengths[1] - group[1] + DILATION[1] - 1) // DILATION[1]
    s2 = (lengths[2] - group[2] + DILATION[2] - 1) // DILATION[2]
    return c, i, group, (s0, s1, s2)


@triton.jit
def _in_slot(slot, start, end, KERNEL: tl.constexpr):
    """The key in a slot, and whether it is visible."""
    j0 = start[0] + slot // (KERNEL[1] * KERNEL[2])
    j1 = start[1] + slot // KERNEL[2] % KERNEL[1]
    j2 = start[2] + slot % KERNEL[2]
    return (j0, j1, j2), (j0 < end[0]) & (j1 < end[1]) & (j2 < end[2])


@triton.jit
def _at_offset(r, i, SIDE: tl.constexpr, KERNEL: tl.constexpr, AWAY: tl.constexpr):
    """What lies at the offset number r from i, key minus query: keys of queries, or with AWAY queries of keys."""
    d0 = r // (SIDE[1] * SIDE[2]) - (KERNEL[0] - 1)
    d1 = r // SIDE[2] % SIDE[1] - (KERNEL[1] - 1)
    d2 = r % SIDE[2] - (KERNEL[2] - 1)
    if AWAY:
        return (i[0] - d0, i[1] - d1, i[2] - d2)
    return (i[0] + d0, i[1] + d1, i[2] + d2)


@triton.jit
def _slot_of(i, j, sizes, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr):
    """The slot of key j in the window of query i, and whether it is visible."""
    start, end = windows(i, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
    seen = (start[0] <= j[0]) & (j[0] < end[0]) & (start[1] <= j[1]) & (j[1] < end[1]) & (start[2] <= j[2]) & (j[2] < end[2])
    return ((j[0] - start[0]) * KERNEL[1] + j[1] - start[1]) * KERNEL[2] + j[2] - start[2], seen & inside(i, sizes)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _scores(
    x_ptr, y_ptr, rpb_ptr, a_ptr, x_strides, y_strides, d_strides, rpb_strides, lengths, heads, tokens, scale,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
    UNSEEN: tl.constexpr,
):  # fmt: skip
    """a = scale x.y + rpb, contiguous; UNSEEN in a slot that is not visible. As a gradient (UNSEEN 0) what is not finite in y is 0.
    Grid: heads (fastest) x blocks of tokens x images, on axis 0."""
    pid = tl.program_id(0)
    head = pid % heads
    blocks = (tokens + BLOCK_M - 1) // BLOCK_M
    image = pid // heads // blocks
    n = pid // heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c, i, group, sizes = token_groups(n, lengths, DILATION)
    here = n < tokens
    start, end = windows(i, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
    x = load_rows(x_ptr, offsets(c, image, head, x_strides, ALIGN), here, d_strides[0], D, BLOCK_D).to(tl.float32)
    slots: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    at = ((image.to(tl.int64) * tokens + n) * heads + head) * slots
    for slot in tl.range(0, slots):
        j, seen = _in_slot(slot, start, end, KERNEL)
        seen &= here
        rows = offsets(on_map(j, group, DILATION), image, head // GROUP, y_strides, ALIGN)
        y = load_rows(y_ptr, rows, seen & inside(j, sizes), d_strides[1], D, BLOCK_D).to(tl.float32)
        s = tl.sum(x * (clean(y) if UNSEEN == 0.0 else y), 1) * scale
        if UNSEEN != 0.0:
            s += tl.sum(y * 0.0, 1)
        if rpb_ptr is not None:
            bias = load_rpb(rpb_ptr, rpb_strides, head, i, j, seen, KERNEL)
            s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
        tl.store(a_ptr + at + slot, tl.where(seen, s, UNSEEN).to(a_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _apply(
    a_ptr, y_ptr, out_ptr, a_strides, y_strides, d_strides, lengths, heads, tokens, scale,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """out_i = scale sum_s a_is y of the visible slots, contiguous.
    What is not finite in y makes its channel NaN; with CLEAN it is 0.
    Grid: heads (fastest) x blocks of tokens x images, on axis 0."""
    pid = tl.program_id(0)
    head = pid % heads
    blocks = (tokens + BLOCK_M - 1) // BLOCK_M
    image = pid // heads // blocks
    n = pid // heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c, i, group, sizes = token_groups(n, lengths, DILATION)
    here = n < tokens
    start, end = windows(i, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
    at = offsets(c, image, head, a_strides, 1)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in tl.range(0, KERNEL[0] * KERNEL[1] * KERNEL[2]):
        j, seen = _in_slot(slot, start, end, KERNEL)
        seen &= here
        a = tl.load(a_ptr + at + (at * 0 + slot) * d_strides[0], mask=seen, other=0.0).to(tl.float32)
        rows = offsets(on_map(j, group, DILATION), image, head // GROUP, y_strides, ALIGN)
        y = load_rows(y_ptr, rows, seen & inside(j, sizes), d_strides[1], D, BLOCK_D).to(tl.float32)
        acc += a[:, None] * tl.where(tl.abs(y) < float("inf"), y, 0.0 if CLEAN else float("nan"))
    store_rows(out_ptr, ((image.to(tl.int64) * tokens + n) * heads + head) * D, here, 1, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _spread(
    a_ptr, x_ptr, out_ptr, a_strides, x_strides, d_strides, lengths, heads, tokens, scale,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """out_j = scale sum over the queries i of all heads of a group that see j of a_i,slot(j) x_i, contiguous.
    Grid: heads of k (fastest) x blocks of tokens x images, on axis 0."""
    pid = tl.program_id(0)
    kv_heads = heads // GROUP
    kv_head = pid % kv_heads
    blocks = (tokens + BLOCK_M - 1) // BLOCK_M
    image = pid // kv_heads // blocks
    n = pid // kv_heads % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c, j, group, sizes = token_groups(n, lengths, DILATION)
    here = n < tokens
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for r in tl.range(0, SIDE[0] * SIDE[1] * SIDE[2]):
        i = _at_offset(r, j, SIDE, KERNEL, True)
        slot, seen = _slot_of(i, j, sizes, KERNEL, STRIDE, CAUSAL, ZERO)
        seen &= here
        at = on_map(i, group, DILATION)
        for head in tl.range(kv_head * GROUP, (kv_head + 1) * GROUP):
            of_query = offsets(at, image, head, a_strides, 1) + slot.to(tl.int64) * d_strides[0]
            a = tl.load(a_ptr + of_query, mask=seen, other=0.0)
            x = load_rows(x_ptr, offsets(at, image, head, x_strides, ALIGN), seen, d_strides[1], D, BLOCK_D)
            acc += a.to(tl.float32)[:, None] * x.to(tl.float32)
    store_rows(out_ptr, ((image.to(tl.int64) * tokens + n) * kv_heads + kv_head) * D, here, 1, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _entries(
    a_ptr, out_ptr, a_strides, d_strides, lengths, heads, tokens, total, chunks,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Sums of a over the queries of a chunk of all images' blocks, for one offset: [chunks, H, offsets].
    Grid: heads (fastest) x offsets x chunks, on axis 0. `total` counts blocks."""
    R: tl.constexpr = SIDE[0] * SIDE[1] * SIDE[2]
    pid = tl.program_id(0)
    head, r = pid % heads, pid // heads % R
    chunk = (pid // heads // R).to(tl.int64)
    blocks = (tokens + BLOCK_M - 1) // BLOCK_M
    acc = tl.zeros([BLOCK_M], tl.float32)
    for work in tl.range((chunk * total // chunks).to(tl.int32), ((chunk + 1) * total // chunks).to(tl.int32)):
        n = work % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        c, i, group, sizes = token_groups(n, lengths, DILATION)
        slot, seen = _slot_of(i, _at_offset(r, i, SIDE, KERNEL, False), sizes, KERNEL, STRIDE, CAUSAL, ZERO)
        at = offsets(c, work // blocks, head, a_strides, 1) + slot.to(tl.int64) * d_strides[0]
        acc += tl.load(a_ptr + at, mask=seen & (n < tokens), other=0.0).to(tl.float32)
    tl.store(out_ptr + (chunk * heads + head) * R + r, tl.sum(acc))
