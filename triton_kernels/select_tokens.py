"""select_tokens on a GPU: one program per sample chooses its tokens and lists them; merge_tokens moves the rows.

The meaning of every argument is that of the reference, vitkern/reference/select_tokens.py. Integers only: the outputs are
those of the reference, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._choose import before, largest, ordered, ranks, total
from ._host import plan_reasons, plan_shape


@triton.jit(do_not_specialize=["tokens", "protect", "most", "slots"])
def _select(
    score_ptr, threshold_ptr, token_map_ptr, perm_ptr, offsets_ptr, lengths_ptr, tokens, protect, most, slots,
    BY_SCORE: tl.constexpr, FUSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The plan of one sample, all tensors contiguous. Grid: samples."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    real = i < tokens
    score = tl.load(score_ptr + sample * tokens + i, mask=real, other=0.0)             # [BLOCK]
    key = tl.where(real, ordered(tl.where(i < protect, float("inf"), score)), 0)
    count = most
    if threshold_ptr is not None:
        passes = real & (i >= protect) & (score >= tl.load(threshold_ptr + sample)) & (score > float("-inf"))
        count = tl.minimum(count, total(passes))
    count += protect
    kept = largest(key, count)
    slot = before(kept)
    if BY_SCORE:
        slot = ranks(key, kept, BLOCK)
    fused = real & (kept == 0) & (tl.abs(score) < float("inf")) & (FUSE == 1)
    rest = real & (kept == 0) & (fused == 0)
    stop = count + total(fused)
    place = tl.where(kept, slot, tl.where(fused, count + before(fused), stop + before(rest)))
    tl.store(perm_ptr + sample * tokens + place, i, mask=real)
    tl.store(token_map_ptr + sample * tokens + i, tl.where(kept, slot, tl.where(fused, slots, slots + FUSE)), mask=real)
    offsets_ptr += sample * (slots + FUSE + 1)
    tl.store(offsets_ptr + i, tl.minimum(i, count), mask=i < slots)
    tl.store(offsets_ptr + slots, count)
    if FUSE:
        tl.store(offsets_ptr + slots + 1, stop)
    tl.store(lengths_ptr + sample, count + FUSE)


def supported(score, threshold, protect, most, slots, by_score, fuse) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    return plan_reasons(score, not isinstance(_select, triton.JITFunction))


def fwd(score, threshold, protect, most, slots, by_score, fuse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_map [B, N], perm [B, N], offsets [B, n_out + 1], lengths [B]: int32, contiguous."""
    batch, tokens = score.shape
    shapes = ((batch, tokens), (batch, tokens), (batch, slots + int(fuse) + 1), (batch,))
    made = tuple(torch.empty(shape, dtype=torch.int32, device=score.device) for shape in shapes)
    if batch:
        _select[(batch,)](
            score.contiguous(), None if threshold is None else threshold.contiguous(), *made, tokens=tokens,
            protect=protect, most=min(most, tokens - protect), slots=slots, BY_SCORE=by_score, FUSE=int(fuse),
            **plan_shape(tokens),
        )  # fmt: skip
    return made
