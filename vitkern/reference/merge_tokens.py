"""merge_tokens: one output per slot of a plan, reduced over the tokens of the slot (Bolya et al. 2023).

    W_o = sum of w_i over the tokens i of slot o
    "mean": sum w_i x_i / W_o, 0 where W_o = 0     "sum": sum w_i x_i     "max": elementwise     "first": the destination
    "mlerp" (Kim et al. 2024): u M / max(|u|, 1e-12), u the mean and M the largest |x_i| of the slot, its first where they tie

Without weights w_i = 1. `include_dst=False` leaves the first token of every slot out of sums. Products and sums are
float32 (float64 for float64). A token without a slot is seen by nothing and gets gradient 0.
"""

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor,  # [B, N, C]
    token_map: Tensor,  # [B, N] int32, n_out for a token without a slot
    perm: Tensor,  # [B, N] int32: tokens by slot, the destination first
    offsets: Tensor,  # [B, n_out + 1] int32
    weight: Tensor | None,  # [B, N]
    reduce: str,
    include_dst: bool,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # y [B, n_out, C], size [B, n_out]
    acc = torch.promote_types(x.dtype, torch.float32)  # float32; float64 stays float64
    slots, width = offsets.shape[1] - 1, x.shape[2]
    slot = token_map.long()  # [B, N]
    kept = slot < slots  # [B, N]
    v = x.to(acc).masked_fill(~kept[..., None], 0.0)  # [B, N, C]
    if weight is None:
        w = torch.ones(slot.shape, dtype=torch.float32, device=x.device)  # [B, N]
    else:
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))  # [B, N]
    first, empty = destinations(perm, offsets)  # [B, n_out], [B, n_out]
    used = kept  # [B, N]
    if not include_dst:
        is_first = torch.zeros_like(slot).scatter_add(1, first, (~empty).long())  # [B, N]
        used = kept & (is_first == 0)  # [B, N]
    w = w.masked_fill(~used, 0.0)  # [B, N]
    padded = w.new_zeros(w.shape[0], slots + 1).scatter_add(1, slot, w)  # [B, n_out + 1]
    size = padded[:, :slots]  # [B, n_out]
    wide = slot[..., None].expand(-1, -1, width)  # [B, N, C]
    if reduce == "first":
        y = v.gather(1, first[..., None].expand(-1, -1, width)).masked_fill(empty[..., None], 0.0)  # [B, n_out, C]
    elif reduce == "max":
        y = v.new_full(
            (v.shape[0], slots + 1, width), -torch.inf
        )  # [B, n_out + 1, C] a 0 here would share the gradient
        y = y.scatter_reduce(1, wide, v, "amax")[:, :slots].masked_fill(empty[..., None], 0.0)  # [B, n_out, C]
    else:
        c = w.to(acc)  # [B, N]
        if reduce != "sum":
            total = padded.to(acc)  # [B, n_out + 1]
            c = (c / total.masked_fill(total == 0, 1.0).gather(1, slot)).masked_fill((total == 0).gather(1, slot), 0.0)
        v = v.masked_fill(~used[..., None], 0.0)  # [B, N, C]
        y = v.new_zeros(v.shape[0], slots + 1, width)  # [B, n_out + 1, C]
        y = y.scatter_add(1, wide, c[..., None] * v)[:, :slots]  # [B, n_out, C]
    if reduce == "mlerp":
        norm = torch.linalg.vector_norm(v, dim=-1)  # [B, N]
        longest = norm.gather(1, leaders(norm.detach(), slot, perm, slots)).masked_fill(empty, 0.0)  # [B, n_out]
        length = torch.linalg.vector_norm(y, dim=-1)  # [B, n_out]
        y = y * (longest / length.clamp(min=1e-12))[..., None]  # [B, n_out, C]
    return y.to(x.dtype), size.clone()  # [B, n_out, C], [B, n_out]


def destinations(perm: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The first token of every slot, [B, n_out] int64, and whether the slot has none."""
    start = offsets.long()  # [B, n_out + 1]
    empty = start[:, 1:] == start[:, :-1]  # [B, n_out]
    if perm.shape[1] == 0:
        return start[:, :-1], empty
    first = perm.long().gather(1, start[:, :-1].clamp(max=perm.shape[1] - 1))  # [B, n_out]
    return first, empty


def leaders(norm: Tensor, slot: Tensor, perm: Tensor, slots: int) -> Tensor:
    """The token of largest norm in every slot, the first of the plan's order: [B, n_out] int64, any where there is none."""
    order = perm.long()  # [B, N]
    ranked, where = norm.gather(1, order), slot.gather(1, order)  # [B, N], [B, N]
    largest = norm.new_zeros(norm.shape[0], slots + 1).scatter_reduce(1, where, ranked, "amax")  # [B, n_out + 1]
    tokens = order.shape[1]
    place = torch.arange(tokens, device=norm.device).where(ranked == largest.gather(1, where), tokens)  # [B, N]
    first = place.new_full((norm.shape[0], slots + 1), tokens).scatter_reduce(1, where, place, "amin")  # [B, n_out + 1]
    if tokens == 0:
        return first[:, :slots]
    return order.gather(1, first[:, :slots].clamp(max=tokens - 1))  # [B, n_out]
