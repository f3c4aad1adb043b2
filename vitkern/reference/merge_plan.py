"""merge_plan: which sources join their partners, and the output slot of every token (Bolya et al. 2023).

    eligible: sources with a finite score          r_b = min(r, most, eligible_b), at most the scores >= threshold_b
    raised to what n_out slots need; the r_b eligible tokens of largest score, ties by position, join dst

Slots, in this order: "split": protected tokens, then other sources and bystanders, then destinations, each by position;
"score": the same with the second group by descending score; "position": all by position. Masked tokens have none.
"""

import torch
from torch import Tensor

from vitkern.reference.bipartite_match import DESTINATION, MASKED, PROTECTED, SOURCE


def merge_plan(
    score: Tensor,  # [B, N] float32
    dst: Tensor,  # [B, N] int32
    role: Tensor,  # [B, N] int8
    r: Tensor | None,  # [B] int32; None: most
    threshold: Tensor | None,  # [B] float32
    most: int,
    n_out: int,
    order: str,
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # token_map [B, N], perm [B, N], offsets [B, n_out + 1], lengths [B]: int32
    batch, tokens = score.shape
    position = torch.arange(tokens, device=score.device).expand(batch, tokens)  # [B, N]
    eligible = (role == SOURCE) & score.isfinite()  # [B, N]
    available = eligible.sum(1)  # [B]
    count = available.clamp(max=most)  # [B]
    if r is not None:
        count = torch.minimum(count, r.clamp(min=0))  # [B]
    if threshold is not None:
        count = torch.minimum(count, (eligible & (score >= threshold[:, None])).sum(1))  # [B]
    real = (role != MASKED).sum(1)  # [B]
    count = torch.minimum(torch.maximum(count, real - n_out), available)  # [B]
    key = torch.where(eligible, score, -torch.inf)  # [B, N]
    rank = inverse(key.argsort(dim=1, descending=True, stable=True))  # [B, N] place among the scores
    merged = eligible & (rank < count[:, None])  # [B, N]
    kept = ~merged & (role != MASKED)  # [B, N]
    group = torch.where(role == PROTECTED, 0, torch.where(role == DESTINATION, 2, 1))  # [B, N]
    if order == "position":
        group = torch.zeros_like(group)
    inside = torch.where((group == 1) & (order == "score"), rank, position)  # [B, N] place inside the group
    group = group.masked_fill(~kept, 3)  # [B, N]
    slot = inverse((group * (tokens + 1) + inside).argsort(dim=1))  # [B, N]
    lengths = kept.sum(1)  # [B]
    refuse_too_many(lengths, n_out)
    lost = merged & ~kept.gather(1, dst.long())  # [B, N] no partner of bipartite_match is
    slot = torch.where(merged, slot.gather(1, dst.long()), slot).masked_fill(lost, n_out)  # [B, N]
    token_map = torch.where(role == MASKED, n_out, slot).clamp(max=n_out)  # [B, N]
    perm, offsets = segments(token_map, n_out, merged)  # [B, N], [B, n_out + 1]
    return tuple(t.to(torch.int32) for t in (token_map, perm, offsets, lengths))


def segments(token_map: Tensor, n_out: int, later: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """perm [B, N] and offsets [B, n_out + 1] int64: the tokens of each slot by position, those in `later` after the rest."""
    key = token_map.long() * 2  # [B, N]
    if later is not None:
        key = key + later  # [B, N]
    perm = key.argsort(dim=1, stable=True)  # [B, N]
    counts = torch.zeros(key.shape[0], n_out + 2, dtype=torch.int64, device=key.device)  # [B, n_out + 2]
    counts = counts.scatter_add(1, token_map.long() + 1, torch.ones_like(key))  # [B, n_out + 2]
    return perm, counts[:, : n_out + 1].cumsum(1)  # [B, N], [B, n_out + 1]


def inverse(order: Tensor) -> Tensor:
    """The place of every element in `order`, [B, N] int64."""
    place = torch.arange(order.shape[1], device=order.device).expand(order.shape)  # [B, N]
    return torch.zeros_like(order).scatter(1, order, place)  # [B, N]


def refuse_too_many(lengths: Tensor, n_out: int) -> None:
    """Raises where a sample needs more slots than there are; not while tracing, and not on a GPU."""
    plain = type(lengths) is Tensor and lengths.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    if not torch.compiler.is_compiling() and plain and lengths.numel() and int(lengths.max()) > n_out:
        worst = int(lengths.argmax())
        raise ValueError(
            f"merge_plan: r must be at most what every sample can merge, or n_max larger: sample {worst} keeps "
            f"{int(lengths[worst])} tokens, there are {n_out} slots"
        )
