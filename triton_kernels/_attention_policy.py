"""What a policy divides the rows of attention by: the largest score of every row, and the sum of what it keeps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_host import UNSPECIALIZED, programs, tuned
from ._attention_terms import last_key, listed, of_sample, places, row_factor, scores, visited
from ._attention_tiles import load_parts, offsets, policy_tile, row_products
from ._attention_visits import lists
from ._tiles import LOG2E


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _policy_rows(
    q_ptr, k_ptr, top_ptr, total_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, d_strides, term_strides, visit_strides, sizes, eps, scale,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M queries of one head and sample the largest score of the visible keys, those of policy 0 too, and
    eps + the sum of the exponentials times the policy.
    Grid: heads (fastest) x query tiles x samples, on axis 0. Writes [B, Nq, H] twice.
    Any strides: q, k and the terms."""
    heads, offset = sizes[3], sizes[4]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    i = row + tl.arange(0, BLOCK_M)
    real = i < queries
    last = last_key(terms, sizes, row, keys, offset, CAUSAL, BLOCK_M)
    begin, end, visits = listed(count_ptr, visit_strides, image, head, row // BLOCK_M, 0, last, BLOCK_N)
    factor = row_factor(terms, term_strides, head, scale)
    q = load_parts(q_ptr, offsets(image, head, i + sizes[8], q_strides, ALIGN), real, d_strides[0], WIDTHS)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(begin, end, num_stages=STAGES):
        start = visited(visit_ptr, visits, n, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        at = offsets(image, head // GROUP, j + sizes[9], k_strides, ALIGN)
        k = load_parts(k_ptr, at, j < keys, d_strides[1], WIDTHS)
        a = row_products(q, k, WIDTHS)
        a += a * 0.0                                                                   # an infinity becomes NaN
        s = scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                   AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp2((s - base[:, None]) * LOG2E) * policy_tile(terms, term_strides, image, row, start, sizes, BLOCK_M, BLOCK_N)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.where(s == float("-inf"), 0.0, kept), 1)
        top = higher
    flat = places(terms, image, i, queries, sizes[8]) * heads + head
    tl.store(top_ptr + flat, tl.where(total == total, top, float("nan")), mask=real)
    tl.store(total_ptr + flat, total + eps, mask=real)


def policy_rows(shared: dict, eps: float) -> tuple[Tensor, Tensor]:
    """The largest score of every row and what its exponentials are divided by, [B, Nq, H] float32 each."""
    q = shared["q_ptr"]
    top, total = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
    blocks = tuned("backward_queries", shared)
    names = ("q_ptr", "k_ptr", "terms", "q_strides", "k_strides", "d_strides", "term_strides", "sizes", "scale", "AXES", "RULE",
             "FAR", "CAUSAL", "GROUP", "WIDTHS", "ALIGN")  # fmt: skip
    if top.numel():
        _policy_rows[(programs(shared, -(-shared["sizes"][1] // blocks["BLOCK_M"])),)](
            **{n: shared[n] for n in names}, **blocks, **lists(shared, blocks), top_ptr=top, total_ptr=total, eps=eps)
    return top, total
