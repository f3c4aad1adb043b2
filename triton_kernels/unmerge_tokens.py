"""unmerge_tokens on a GPU: one program per token copies its slot's row; backward is the sum of merge_tokens.

The meaning of every argument is that of the reference, vitkern/reference/unmerge_tokens.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import merge_tokens
from ._host import power


@triton.jit
def _unmerge(
    y_ptr, token_map_ptr, x_ptr, rows_ptr, strides, rows_strides, tokens, slots, fill,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x [B, N, C], contiguous; a token without a slot gets its own of `rows`, else `fill`. Grid: tokens (fastest) x
    samples, on axis 0."""
    at = tl.program_id(0).to(tl.int64)
    sample = at // tokens
    slot = tl.load(token_map_ptr + at)
    c = tl.arange(0, BLOCK_C)
    found = slot + 0 * c < slots                                                       # [BLOCK_C]
    row = tl.load(y_ptr + sample * strides[0] + slot * strides[1] + c * strides[2], mask=(c < C) & found, other=0.0)
    other = tl.zeros([BLOCK_C], tl.float32) + fill
    if rows_ptr is not None:
        rows_ptr += sample * rows_strides[0] + at % tokens * rows_strides[1]
        other = tl.load(rows_ptr + c * rows_strides[2], mask=(c < C) & (found == 0), other=0.0).to(tl.float32)
    row = tl.where(found, row.to(tl.float32), other)
    tl.store(x_ptr + at * C + c, row.to(x_ptr.dtype.element_ty), mask=c < C)


def supported(y, token_map, perm, offsets, fill) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return [r.replace("x ", "y ", 1) for r in merge_tokens.supported(y, token_map, perm, offsets, None, "sum", True)]


def fwd(y, token_map, perm, offsets, fill) -> Tensor:
    """x [B, N, C] in y's dtype, contiguous."""
    return gathered(y, token_map, fill)


def gathered(y, token_map, fill=0.0, rows=None, dtype=None) -> Tensor:
    """y [B, K, C] by token_map [B, N]; where that is K, the row of `rows` (any strides, 0 among them) or `fill`."""
    width = y.shape[2]
    x = torch.empty((*token_map.shape, width), dtype=dtype or y.dtype, device=y.device)
    if x.numel():
        _unmerge[(token_map.numel(),)](
            y_ptr=y, token_map_ptr=token_map, x_ptr=x, rows_ptr=rows, strides=y.stride(),
            rows_strides=(0, 0, 0) if rows is None else rows.stride(), tokens=token_map.shape[1],
            slots=y.shape[1], fill=float(fill), C=width, BLOCK_C=power(width),
            num_warps=8 if width > 2048 else 4 if width > 256 else 1,
        )  # fmt: skip
    return x


def bwd(dx, y, token_map, perm, offsets, fill, need) -> Tensor | None:
    """dy [B, n_out, C]: the sum over the tokens of each slot, in the plan's order."""
    if dx is None or not need & 1:
        return None
    return merge_tokens.fwd(dx, token_map, perm, offsets, None, "sum", True, with_size=False)[0].to(y.dtype)
