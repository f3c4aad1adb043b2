"""restore_tokens: rows back to their positions, the fill elsewhere (He et al. 2022).

out[index_o] = y_o          out[i] = fill_i, mask_token or value, for a position i that is not in index
"""

import torch
from torch import Tensor

from vitkern.reference.unmerge_tokens import unmerge_tokens


def restore_tokens(
    y: Tensor,  # [B, K, C]
    index: Tensor,  # [B, K] int32: distinct positions, n for a row that goes nowhere
    fill: Tensor | None,  # [B, n, C]
    mask_token: Tensor | None,  # [C]
    n: int,
    value: float,
    gpu: str = "",
) -> Tensor:  # [B, n, C]
    place = places(index, n)  # [B, n]
    out = unmerge_tokens(y, place, place, place, value)  # [B, n, C]
    other = fill if fill is not None else mask_token  # [B, n, C] or [C]
    if other is None:
        return out
    acc = torch.promote_types(y.dtype, torch.float32)  # float32; float64 stays float64
    missing = (place == y.shape[1])[..., None]  # [B, n, 1]
    return torch.where(missing, other.to(acc), out.to(acc)).to(y.dtype)  # [B, n, C]


def places(index: Tensor, n: int) -> Tensor:
    """Where each position stands in index [B, K], K for one that does not: int32 [B, n]."""
    batch, rows = index.shape
    at = torch.arange(rows, dtype=torch.int32, device=index.device).expand(batch, rows)  # [B, K]
    place = torch.full((batch, n + 1), rows, dtype=torch.int32, device=index.device)  # [B, n + 1]
    return place.scatter(1, index.long().clamp(0, n), at)[:, :n]  # [B, n]
