"""sampled_window_attention on a GPU: the queries of a window attend to samples of a map, read at given places.

The meaning of every argument is that of the reference, vitkern/reference/sampled_window_attention.py. A program takes some
queries of one window and head and walks its samples with an online softmax; the samples are read from their four corners and
stored nowhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._sampled_tiles import (
    UNSPECIALIZED,
    arguments,
    load_queries,
    places,
    query_rows,
    reasons,
    sample_rows,
    scores,
    value_places,
    window_count,
)
from ._tiles import LOG2E, clean, store_rows
from .sampled_window_attention_bwd import bwd

__all__ = ["bwd", "fwd", "supported"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    q_ptr, k_ptr, v_ptr, coord_ptr, coord_v_ptr, of_ptr, bias_ptr, index_ptr, out_ptr,
    q_strides, k_strides, v_strides, coord_strides, coord_v_strides, of_strides, bias_strides, index_strides, table_rows,
    sizes, counts, heads, samples, scale,
    WINDOW: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, heads, Dv], contiguous. Grid: heads (fastest) x blocks of queries x windows of all images, on axis 0."""
    blocks: tl.constexpr = (WINDOW[0] * WINDOW[1] + BLOCK_M - 1) // BLOCK_M
    head = tl.program_id(0) % heads
    image = tl.program_id(0) // heads // blocks // (counts[0] * counts[1])
    window = tl.program_id(0) // heads // blocks % (counts[0] * counts[1])
    first = tl.program_id(0) // heads % blocks * BLOCK_M
    i, y, x, real = query_rows(first, window, WINDOW, BLOCK_M, sizes, counts)
    q = load_queries(q_ptr, q_strides, image, head, y, x, real, D, BLOCK_D)            # [BLOCK_M, BLOCK_D]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    bad = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)                                    # who sees a value that is not finite
    for start in tl.range(0, samples, BLOCK_N, num_stages=1):
        j = start + tl.arange(0, BLOCK_N)
        alive, left, top_row, fx, fy = places(
            coord_ptr, coord_strides, image, window, head, j, samples, sizes, counts, D, BLOCK_D, PARTS, SHARED)
        k = sample_rows(k_ptr, k_strides, image, head // GROUP, alive, left, top_row, fx, fy, sizes, D, BLOCK_D, 0)
        s = scores(q, k, alive, i, j, real, samples, scale, of_ptr, bias_ptr, index_ptr, of_strides, bias_strides, index_strides,
                   table_rows, image, window, head, MASK)                              # [BLOCK_M, BLOCK_N]
        alive, left, top_row, fx, fy = value_places(
            coord_ptr, coord_v_ptr, coord_strides, coord_v_strides, image, window, head, j, samples, sizes, counts,
            DV, BLOCK_DV, PARTS, SHARED)
        v = sample_rows(v_ptr, v_strides, image, head // GROUP, alive, left, top_row, fx, fy, sizes, DV, BLOCK_DV, 0)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((s - base[:, None]) * LOG2E)                                         # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2((top - base) * LOG2E)
        norm = norm * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(q.dtype), clean(v).to(q.dtype), input_precision="ieee")
        top = higher
        broken = tl.where(tl.abs(v) < float("inf"), 0.0, 1.0)
        if tl.sum(broken) > 0:
            seen = tl.where(s == float("-inf"), 0.0, 1.0).to(tl.float16)
            bad += tl.dot(seen, broken.to(tl.float16))
    acc = acc / tl.where(norm == 0.0, 1.0, norm)[:, None]
    acc = tl.where(bad > 0.0, float("nan"), acc)
    at = ((image.to(tl.int64) * sizes[0] + y) * sizes[1] + x) * heads + head           # [BLOCK_M]
    store_rows(out_ptr, at * DV, real, 1, acc, DV, BLOCK_DV)


def supported(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return reasons(q, k, v, coords, coords_v, of_window, bias, not isinstance(_forward, triton.JITFunction))


def fwd(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask) -> Tensor:
    """out [B, H, W, heads, Dv], contiguous."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=v.dtype, device=q.device)
    if not out.numel():
        return out
    given = arguments(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask)
    blocks = triton.cdiv(window[0] * window[1], given["BLOCK_M"])
    _forward[(given["heads"] * blocks * window_count(coords),)](**given, out_ptr=out)
    return out
