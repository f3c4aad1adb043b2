"""Sums in a fixed order: partial sums of chunks, and a dense bias gradient into the rows of its table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

SCAN_LIMIT = 2**23                                          # table rows x index entries; above it the index is sorted


@triton.jit(do_not_specialize=("parts", "size"))
def _add_parts(part_ptr, out_ptr, parts, size, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum of the parts, float32, one rounding at the end.
    Grid: blocks of elements, on axis 0.
    Contiguous: parts [parts, size] and out [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    for first in tl.range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        acc += tl.load(part_ptr + p[:, None].to(tl.int64) * size + at[None, :],
                       mask=(p < parts)[:, None] & (at < size)[None, :], other=0.0)
    tl.store(out_ptr + at, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=("entries", "rows", "heads", "index_stride0", "index_stride1", "n"))
def _scan_table(
    dense_ptr, index_ptr, out_ptr, entries, rows, heads, n, index_stride0, index_stride1,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_R rows of one head's table: every index entry is compared with every row.
    Grid: heads (fastest) x blocks of rows, on axis 0.
    Any strides: index. dense [H, n, n] and out [R, H] are contiguous."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    row = pid // heads * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_R, BLOCK], tl.float32)
    for first in tl.range(0, entries, BLOCK):
        e = first + tl.arange(0, BLOCK)
        named = tl.load(index_ptr + (e // n).to(tl.int64) * index_stride0 + (e % n).to(tl.int64) * index_stride1,
                        mask=e < entries, other=0)
        named = tl.minimum(tl.maximum(named, 0), rows - 1)
        value = tl.load(dense_ptr + head * entries + e, mask=e < entries, other=0.0)
        acc += tl.where(row[:, None] == named[None, :], value[None, :], 0.0)           # [BLOCK_R, BLOCK]
    tl.store(out_ptr + row.to(tl.int64) * heads + head, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=("entries", "heads"))
def _gather_table(dense_ptr, order_ptr, first_ptr, out_ptr, entries, heads, BLOCK: tl.constexpr):
    """Gradient of one row of one head's table: the entries that name it, in the order of a stable sort.
    Grid: heads (fastest) x rows, on axis 0.
    Contiguous: dense [H, entries], order [entries], first [R + 1] and out [R, H]."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid % heads
    row = pid // heads
    last = tl.load(first_ptr + row + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(tl.load(first_ptr + row), last, BLOCK):
        e = first + tl.arange(0, BLOCK)
        at = tl.load(order_ptr + e, mask=e < last, other=0)
        acc += tl.load(dense_ptr + head * entries + at, mask=e < last, other=0.0)
    tl.store(out_ptr + pid, tl.sum(acc, 0).to(out_ptr.dtype.element_ty))


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis of contiguous float32 parts, rounded once to dtype."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    size, count = out.numel(), parts.shape[0]
    block_p = min(64, triton.next_power_of_2(count))
    _add_parts[(triton.cdiv(size, 64),)](
        parts, out, count, size, BLOCK_P=block_p, BLOCK=64, num_warps=4, enable_fp_fusion=True)
    return out


def table_gradient(dense: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """[R, H]: the sums of dense [H, N, K] over the entries of index [N, K] that name each row."""
    heads, queries, n = dense.shape
    out = torch.empty((rows, heads), dtype=dtype, device=dense.device)
    if rows * queries * n <= SCAN_LIMIT:
        _scan_table[(heads * triton.cdiv(rows, 16),)](
            dense, index, out, queries * n, rows, heads, n, index.stride(0), index.stride(1),
            BLOCK_R=16, BLOCK=256, num_warps=4, enable_fp_fusion=True)
        return out
    named, order = torch.sort(index.clamp(0, rows - 1).flatten(), stable=True)
    first = torch.searchsorted(named, torch.arange(rows + 1, dtype=named.dtype, device=named.device))
    _gather_table[(heads * rows,)](
        dense, order, first, out, queries * n, heads, BLOCK=512, num_warps=4, enable_fp_fusion=True)
    return out
