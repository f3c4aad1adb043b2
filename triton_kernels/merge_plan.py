"""merge_plan on a GPU: one program per sample decides who merges, numbers the slots and lists their tokens.

The meaning of every argument is that of the reference, vitkern/reference/merge_plan.py. Integers only: the outputs are
those of the reference, bit for bit. Where a sample keeps more tokens than there are slots the rest have none.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._choose import ascending, before, largest, ordered, ranks, total
from ._host import plan_reasons, plan_shape

SOURCE, DESTINATION, PROTECTED, MASKED = (tl.constexpr(n) for n in (0, 1, 3, 4))
ORDERS = ("split", "score", "position")


@triton.jit
def _numbered(key, role, kept, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """The slots of the tokens that are kept, [BLOCK]."""
    if ORDER == 2:
        slot = before(kept)
    else:
        first, last = kept & (role == PROTECTED), kept & (role == DESTINATION)
        middle = kept & (role != PROTECTED) & (role != DESTINATION)
        place = before(middle)
        if ORDER == 1:
            place = ranks(key, middle, BLOCK)
        start = total(first)
        slot = tl.where(first, before(first), tl.where(last, start + total(middle) + before(last), start + place))
    return slot


@triton.jit(do_not_specialize=["tokens", "most", "slots"])
def _plan(
    score_ptr, dst_ptr, role_ptr, r_ptr, threshold_ptr, token_map_ptr, perm_ptr, offsets_ptr, lengths_ptr,
    tokens, most, slots, ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The plan of one sample, all tensors contiguous. Grid: samples."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < tokens
    at = sample * tokens + i
    score = tl.load(score_ptr + at, mask=real, other=0.0)                              # [BLOCK]
    role = tl.load(role_ptr + at, mask=real, other=MASKED)
    partner = tl.load(dst_ptr + at, mask=real, other=0)
    partner = tl.minimum(tl.maximum(partner, 0), tl.maximum(tokens, 1) - 1)
    eligible = (role == SOURCE) & (tl.abs(score) < float("inf"))
    available, present = total(eligible), total(role != MASKED)
    count = tl.minimum(available, most)
    if r_ptr is not None:
        count = tl.minimum(count, tl.maximum(tl.load(r_ptr + sample), 0))
    if threshold_ptr is not None:
        count = tl.minimum(count, total(eligible & (score >= tl.load(threshold_ptr + sample))))
    count = tl.minimum(tl.maximum(count, present - slots), available)
    key = tl.where(eligible, ordered(score), 0)
    merged = largest(key, count)
    kept = (role != MASKED) & (merged == 0)
    slot = tl.where(kept, tl.minimum(_numbered(key, role, kept, ORDER, BLOCK), slots), slots)
    slot = tl.where(merged, tl.gather(slot, partner, 0), slot)
    tl.store(token_map_ptr + at, slot, mask=real)
    tl.store(lengths_ptr + sample, present - count)

    # the tokens by slot, the kept one of a slot first, and in the end those past the sample
    item = tl.where(real, (2 * slot + merged.to(tl.int32)) * BLOCK + i, 2147483647)
    item = ascending(item, BLOCK)
    tl.store(perm_ptr + at, item % BLOCK, mask=real)
    owner, leads = item // (2 * BLOCK), item // BLOCK % 2 == 0
    offsets_ptr += sample * (slots + 1)
    stop = total(real & (slot < slots))
    tl.store(offsets_ptr + owner, i, mask=real & leads & (owner < slots))
    tl.store(offsets_ptr + i, stop, mask=(i >= present - count) & (i < slots))
    tl.store(offsets_ptr + slots, stop)


def supported(score, dst, role, r, threshold, most, n_out, order) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    return plan_reasons(score, not isinstance(_plan, triton.JITFunction))


def fwd(score, dst, role, r, threshold, most, n_out, order) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_map [B, N], perm [B, N], offsets [B, n_out + 1], lengths [B]: int32, contiguous."""
    batch, tokens = score.shape
    shapes = ((batch, tokens), (batch, tokens), (batch, n_out + 1), (batch,))
    made = tuple(torch.empty(shape, dtype=torch.int32, device=score.device) for shape in shapes)
    if batch:
        inputs = (None if t is None else t.contiguous() for t in (score, dst, role, r, threshold))
        _plan[(batch,)](*inputs, *made, tokens=tokens, most=most, slots=n_out, ORDER=ORDERS.index(order), **plan_shape(tokens))
    return made
