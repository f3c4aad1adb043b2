"""Grids of tokens: adaptive average pooling as two matrix products, and cells that merge where their tokens are alike."""

import torch
from torch import Tensor

from vitkern.ops.merge_tokens import merge_tokens
from vitkern.reference.cluster_kmeans import cells
from vitkern.tokens import MergePlan


def pool(x: Tensor, mask: Tensor | None, grid: list[int]) -> Tensor:
    """The mean of each of h x w bins of the map H x W, [B, h w, C] in float32 (float64): bin i of h has the rows from
    floor(i H / h) to ceil((i + 1) H / h), so that bins overlap where h does not divide H. A bin without a real token is 0.
    """
    high, wide, rows, columns = grid
    acc = torch.promote_types(x.dtype, torch.float32)
    down, across = bins(high, rows, x.device, acc), bins(wide, columns, x.device, acc)  # [h, H], [w, W]
    v = x.to(acc) if mask is None else x.to(acc).masked_fill(~mask[..., None], 0.0)
    mean = down @ v.unflatten(1, (high, wide)).flatten(2)  # [B, h, W C]
    mean = across @ mean.unflatten(2, (wide, -1))  # [B, h, w, C]
    if mask is not None:
        part = down @ mask.to(acc).unflatten(1, (high, wide)) @ across.mT  # [B, h, w]
        mean = mean / torch.where(part > 0, part, 1.0)[..., None]
    return mean.flatten(1, 2)


def bins(length: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weights of each token of an axis in each bin, [count, length]."""
    place, b = torch.arange(length, device=device), torch.arange(count, device=device)[:, None]
    low = torch.div(b * length, count, rounding_mode="floor")
    high = -torch.div(-(b + 1) * length, count, rounding_mode="floor")
    return ((place >= low) & (place < high)).to(dtype) / (high - low).to(dtype)


def labels(grid: list[int], batch: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """The cell of every token, int32 [B, N]; h w for a masked one."""
    row, column = cells(grid, device)
    cell = (row * grid[3] + column).to(torch.int32).expand(batch, -1)
    return cell.clone() if mask is None else cell.masked_fill(~mask, grid[2] * grid[3])


def alike(x: Tensor, cell: Tensor, count: int, threshold: float) -> Tensor:
    """Whether the mean cosine of the pairs in each cell reaches the threshold, [B, count].

    The sum over pairs is |sum of u|^2 - sum of |u|^2 with u the normalised tokens; a cell of one token is not alike.
    """
    v = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    u = v / v.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    plan = MergePlan.from_map(cell, count)
    (total, own), size = merge_tokens((u, u.square().sum(-1)), plan, reduce="sum")
    pairs = size * (size - 1)
    return (pairs > 0) & ((total.square().sum(-1) - own) >= threshold * pairs)
