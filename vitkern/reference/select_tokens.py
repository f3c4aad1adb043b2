"""select_tokens: which tokens are kept, as a plan by which merge_tokens moves the rows (Liang et al. 2022).

    kept: the first `protect` tokens and the `most` others of largest score, ties by position; with a threshold only those
    of at least that. NaN counts as -inf, and -inf passes no threshold.

Slots: protected tokens by position, kept ones by position or by descending score; `fuse`: one last slot, after all
`slots`, for the others whose score is finite. Tokens without a slot have `n_out = slots + fuse`.
"""

import torch
from torch import Tensor

from vitkern.reference.merge_plan import inverse, segments


def select_tokens(
    score: Tensor,  # [B, N] float32
    threshold: Tensor | None,  # [B] float32
    protect: int,
    most: int,
    slots: int,
    by_score: bool,
    fuse: bool,
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # token_map [B, N], perm [B, N], offsets [B, n_out + 1], lengths [B]: int32
    batch, tokens = score.shape
    position = torch.arange(tokens, device=score.device)  # [N]
    ranked = torch.where(score.isnan(), -torch.inf, score)  # [B, N]
    key = torch.where(position < protect, torch.inf, ranked)  # [B, N]
    rank = inverse(key.argsort(dim=1, descending=True, stable=True))  # [B, N] place among the scores
    count = torch.full_like(rank[:, 0] if tokens else rank.sum(1), min(most, tokens - protect))  # [B]
    if threshold is not None:
        passes = (position >= protect) & (ranked >= threshold[:, None]) & (ranked > -torch.inf)  # [B, N]
        count = torch.minimum(count, passes.sum(1))  # [B]
    kept = rank < (count + protect)[:, None]  # [B, N]
    slot = rank if by_score else kept.cumsum(1) - 1  # [B, N]
    fused = ~kept & score.isfinite() if fuse else torch.zeros_like(kept)  # [B, N]
    n_out = slots + int(fuse)
    token_map = torch.where(kept, slot, torch.where(fused, slots, n_out))  # [B, N]
    perm, offsets = segments(token_map, n_out)  # [B, N], [B, n_out + 1]
    lengths = count + protect + int(fuse)  # [B]
    return tuple(t.to(torch.int32) for t in (token_map, perm, offsets, lengths))
