"""mask_from_logits on a GPU: the maps of the queries stretched, compared, filled and packed to bits in one launch, which the host
never waits for.

The meaning of every argument is that of the definition, `seen_words` in vitkern/mask.py; the arithmetic is that of the CPU's
kernel, rounding by rounding (no fused products), so that both see the same cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power

MAX_KEYS = 2**30                        # kernels count them in 32 bits
MAX_SIDE = 2**24                        # float32 holds every place up to it
MAX_BLOCK = 4096                        # keys at a time, eight or sixteen to a thread


@triton.jit
def _between(place, scale, size):
    """Where a cell of the stretched side lies among `size` cells: behind the first, before the second, with its weight."""
    at = tl.maximum(scale * (place.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), size - 1)
    share = tl.minimum(at - first.to(tl.float32), 1.0)
    return first, tl.where(scale == 1.0, first, tl.minimum(first + 1, size - 1)), share


@triton.jit
def _store_words(ptr, on, start, words, WORDS: tl.constexpr):
    """on [WORDS, 32], 0 or 1, of keys start.. as words."""
    word = start // 32 + tl.arange(0, WORDS)
    tl.store(ptr + word, tl.sum(on << tl.arange(0, 32)[None, :], 1), mask=word < words)


@triton.jit(do_not_specialize=["strides", "rows", "columns", "width", "cells", "among"])
def _seen(
    logits_ptr, open_ptr, out_ptr, strides, open_strides, rows, columns, width, cells, among, scale_y, scale_x, threshold,
    SAME: tl.constexpr, FULL: tl.constexpr, INCLUSIVE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """out [B, queries, words], contiguous, of `among` = (queries, keys, first query, first key, maps of an image); SAME: no side is
    stretched. Any strides: logits [B, Q, rows, columns], open [B, Q]. Grid: queries (fastest) x samples."""
    row = tl.program_id(0).to(tl.int64)
    keys = among[1]
    words = (keys + 31) // 32
    image, query = row // among[0], row % among[0] - among[2]
    out_ptr += row * words
    inside = (query >= 0) & (query < among[4])
    if open_ptr is not None:
        inside &= tl.load(open_ptr + image * open_strides[0] + query * open_strides[1], mask=inside, other=1) == 0
    logits_ptr += image * strides[0] + query * strides[1]
    j = tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    some = tl.zeros([WORDS, 32], tl.int32)
    for start in range(tl.where(inside, 0, keys), keys, WORDS * 32):
        cell = start + j - among[3]
        real = (cell >= 0) & (cell < cells)
        at = tl.where(real, cell, 0)
        if SAME:                                                                       # nothing infinite is multiplied by 0
            y, x = (at // width).to(tl.int64), (at % width).to(tl.int64)
            logit = tl.load(logits_ptr + (y * strides[2] + x * strides[3]), mask=real, other=0.0).to(tl.float32)
        else:
            top, below, down = _between(at // width, scale_y, rows)
            left, right, across = _between(at % width, scale_x, columns)
            top, below = top.to(tl.int64) * strides[2], below.to(tl.int64) * strides[2]
            left, right = left.to(tl.int64) * strides[3], right.to(tl.int64) * strides[3]
            a = tl.load(logits_ptr + (top + left), mask=real, other=0.0).to(tl.float32)
            b = tl.load(logits_ptr + (below + left), mask=real, other=0.0).to(tl.float32)
            c = tl.load(logits_ptr + (top + right), mask=real, other=0.0).to(tl.float32)
            d = tl.load(logits_ptr + (below + right), mask=real, other=0.0).to(tl.float32)
            logit = (a * (1.0 - down) + b * down) * (1.0 - across) + (c * (1.0 - down) + d * down) * across
        on = tl.where(logit > threshold, 1, 0)
        if INCLUSIVE:
            on = tl.where(logit < threshold, 0, 1)                                     # NaN is not below
        some |= tl.where(real, on, 0)
        on = tl.where(real, on, tl.where(start + j < keys, 1, 0))
        _store_words(out_ptr, on, start, words, WORDS)
    fill = inside == 0
    if FULL:
        fill = tl.max(tl.max(some, 1), 0) == 0                                         # so has a row outside, or an open one
    if fill:
        tl.debug_barrier()                                                             # what other threads stored lies below
        for start in range(0, keys, WORDS * 32):
            _store_words(out_ptr, tl.where(start + j < keys, 1, 0), start, words, WORDS)


def supported(
    logits, open_rows, height, width, threshold, full, inclusive, queries, keys, first_query, first_key
) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    why = device_reasons("logits", logits, not isinstance(_seen, triton.JITFunction))
    if 0 in logits.shape[2:]:
        why.append("logits must hold a cell")
    if logits.dtype not in DTYPES:
        why.append(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if keys >= MAX_KEYS:
        why.append(f"there may be fewer than 2^30 keys, got {keys}")
    if max(*logits.shape[2:], height, width) >= MAX_SIDE:
        why.append(f"a side may have fewer than 2^24 cells, got {list(logits.shape[2:])} and {height} x {width}")
    return why


def fwd(
    logits, open_rows, height, width, threshold, full, inclusive, queries, keys, first_query, first_key
) -> Tensor:
    """int32 [B, queries, words of 32 keys]."""
    batch, maps, rows, columns = logits.shape
    out = torch.empty((batch, queries, -(-keys // 32)), dtype=torch.int32, device=logits.device)
    if out.numel():
        block = min(power(keys, 128), MAX_BLOCK)
        _seen[(batch * queries,)](
            logits, None if open_rows is None else open_rows.view(torch.int8), out, logits.stride(),
            (0, 0) if open_rows is None else open_rows.stride(), rows, columns, max(1, width), height * width,
            (queries, keys, first_query, first_key, maps), rows / max(1, height), columns / max(1, width), float(threshold),
            SAME=(rows, columns) == (height, width), FULL=full, INCLUSIVE=inclusive, WORDS=block // 32,
            num_warps=max(4, block // 256), num_stages=1, enable_fp_fusion=False)  # fmt: skip
    return out
