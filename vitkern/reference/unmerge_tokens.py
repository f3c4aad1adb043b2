"""unmerge_tokens: every token gets the output of its slot, a token without a slot the fill value."""

import torch
from torch import Tensor


def unmerge_tokens(
    y: Tensor,  # [B, n_out, C]
    token_map: Tensor,  # [B, N] int32, n_out for a token without a slot
    perm: Tensor,  # [B, N] int32
    offsets: Tensor,  # [B, n_out + 1] int32
    fill: float,
    gpu: str = "",
) -> Tensor:  # [B, N, C]
    filled = torch.cat((y, y.new_full((y.shape[0], 1, y.shape[2]), fill)), 1)  # [B, n_out + 1, C]
    return filled.gather(1, token_map.long()[..., None].expand(-1, -1, y.shape[2]))  # [B, N, C]
