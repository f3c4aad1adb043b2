"""mask_from_logits on a GPU: the maps of the queries stretched, compared and filled in one launch, which the host never waits for.

The meaning of every argument is that of the definition, `seen_cells` in vitkern/mask.py; the arithmetic is that of the CPU's
kernel, rounding by rounding (no fused products), so that both see the same cells.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power

MAX_CELLS = 2**30                       # kernels count them in 32 bits
MAX_SIDE = 2**24                        # float32 holds every place up to it
MAX_BLOCK = 4096                        # cells at a time, eight or sixteen to a thread


@triton.jit
def _between(place, scale, size):
    """Where a cell of the stretched side lies among `size` cells: behind the first, before the second, with its weight."""
    at = tl.maximum(scale * (place.to(tl.float32) + 0.5) - 0.5, 0.0)
    first = tl.minimum(at.to(tl.int32), size - 1)
    share = tl.minimum(at - first.to(tl.float32), 1.0)
    return first, tl.where(scale == 1.0, first, tl.minimum(first + 1, size - 1)), share


@triton.jit(do_not_specialize=["strides", "queries", "rows", "columns", "width", "cells"])
def _seen(
    logits_ptr, open_ptr, out_ptr, strides, open_strides, queries, rows, columns, width, cells, scale_y, scale_x, threshold,
    SAME: tl.constexpr, FULL: tl.constexpr, INCLUSIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, Q, cells] int8, contiguous; SAME: no side is stretched. Any strides: logits [B, Q, rows, columns], open [B, Q].
    Grid: queries (fastest) x samples."""
    row = tl.program_id(0).to(tl.int64)
    image, query = row // queries, row % queries
    logits_ptr += image * strides[0] + query * strides[1]
    out_ptr += row * cells
    begin = 0
    if open_ptr is not None:
        begin = tl.where(tl.load(open_ptr + image * open_strides[0] + query * open_strides[1]) != 0, cells, 0)
    some = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        real = cell < cells
        if SAME:                                                                       # nothing infinite is multiplied by 0
            y, x = (cell // width).to(tl.int64), (cell % width).to(tl.int64)
            logit = tl.load(logits_ptr + (y * strides[2] + x * strides[3]), mask=real, other=0.0).to(tl.float32)
        else:
            top, below, down = _between(cell // width, scale_y, rows)
            left, right, across = _between(cell % width, scale_x, columns)
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
        tl.store(out_ptr + cell, on.to(tl.int8), mask=real)
        some |= tl.where(real, on, 0)
    fill = begin == cells
    if FULL:
        fill = tl.max(some, 0) == 0                                                    # so has an open row
    if fill:
        tl.debug_barrier()                                                             # what other threads stored lies below
        for start in range(0, cells, BLOCK):
            cell = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + cell, tl.full([BLOCK], 1, tl.int8), mask=cell < cells)


def supported(logits, open_rows, height, width, threshold, full, inclusive) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    why = device_reasons("logits", logits, not isinstance(_seen, triton.JITFunction))
    if 0 in logits.shape[2:]:
        why.append("logits must hold a cell")
    if logits.dtype not in DTYPES:
        why.append(f"logits must be float32, bfloat16 or float16, got {logits.dtype}")
    if height * width >= MAX_CELLS:
        why.append(f"a map may have fewer than 2^30 cells, got {height} x {width}")
    if max(*logits.shape[2:], height, width) >= MAX_SIDE:
        why.append(f"a side may have fewer than 2^24 cells, got {list(logits.shape[2:])} and {height} x {width}")
    return why


def fwd(logits, open_rows, height, width, threshold, full, inclusive) -> Tensor:
    """bool [B, Q, height width]."""
    batch, queries, rows, columns = logits.shape
    cells = height * width
    out = torch.empty((batch, queries, cells), dtype=torch.int8, device=logits.device)
    if out.numel():
        block = min(power(cells, 128), MAX_BLOCK)
        _seen[(batch * queries,)](
            logits, None if open_rows is None else open_rows.view(torch.int8), out, logits.stride(),
            (0, 0) if open_rows is None else open_rows.stride(), queries, rows, columns, width, cells, rows / height,
            columns / width, float(threshold), SAME=(rows, columns) == (height, width), FULL=full, INCLUSIVE=inclusive, BLOCK=block,
            num_warps=max(4, block // 256), num_stages=1, enable_fp_fusion=False)  # fmt: skip
    return out.view(torch.bool)
