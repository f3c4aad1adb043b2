"""cluster_kmeans: soft k-means on a grid, each token seeing the centres around its cell (Liang et al. 2022).

    repeated `iters` times, with c the centres before:
    d_nm = max(|x_n|^2 + |c_m|^2 - 2 x_n.c_m, 0)
    W_nm = softmax over m of -temperature d_nm, over the m whose cell is at most window // 2 rows and columns from n's
    c_m = sum_n W_nm x_n / max(sum_n W_nm, 1e-16)

The cell of the token at (y, x) of H x W is (y h // H, x w // W). W is a constant for the gradient, which flows through the
last repetition alone: dx_n = sum_m W_nm dc_m / max(sum_n W_nm, 1e-16).
"""

import math

import torch
from torch import Tensor

from vitkern.reference.cluster_tokens import squared_distances

FLOOR = 1e-16


def cluster_kmeans(
    x: Tensor,  # [B, N, C]
    start: Tensor,  # [B, h w, C]
    mask: Tensor | None,  # [B, N] bool, True for a real token
    grid: list[int],  # H, W, h, w with H W = N
    window: int,
    temperature: float,
    iters: int,
    gpu: str = "",
) -> tuple[
    Tensor, Tensor, Tensor
]:  # centers [B, h w, C]; of the last turn: the centres before, and the sum of W [B, h w]
    acc = torch.promote_types(x.dtype, torch.float32)  # float32; float64 stays float64
    v = x.to(acc)  # [B, N, C]
    if mask is not None:
        v = v.masked_fill(~mask[..., None], 0.0)  # [B, N, C]
    c = start.detach().to(acc)  # [B, k, C]
    previous, total = c, torch.ones_like(c[..., 0])  # [B, k, C], [B, k]
    for turn in range(iters):
        previous = c  # [B, k, C]
        weights = near_weights(v.detach(), c, mask, grid, window, temperature)  # [B, N, k]
        total = weights.sum(1).clamp(min=FLOOR)  # [B, k]
        rows = v if turn == iters - 1 else v.detach()  # [B, N, C]
        c = weights.mT @ rows / total[..., None]  # [B, k, C]
    return c.to(x.dtype), previous.clone(), total  # [B, k, C], [B, k, C], [B, k]


def near_weights(v: Tensor, c: Tensor, mask: Tensor | None, grid: list[int], window: int, temperature: float) -> Tensor:
    """W [B, N, k]; 0 for a masked token."""
    rows, columns = cells(grid, v.device)  # [N], [N]
    centre = torch.arange(grid[2] * grid[3], device=v.device)  # [k]
    row, column = torch.div(centre, grid[3], rounding_mode="floor"), centre % grid[3]  # [k], [k]
    reach = window // 2
    near = ((rows[:, None] - row).abs() <= reach) & ((columns[:, None] - column).abs() <= reach)  # [N, k]
    logits = -temperature * squared_distances(v, c)  # [B, N, k]
    weights = logits.masked_fill(~near, -math.inf).softmax(-1)  # [B, N, k]
    return weights if mask is None else weights.masked_fill(~mask[..., None], 0.0)  # [B, N, k]


def cells(grid: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The row and the column of every token's cell, [N] each."""
    high, wide, rows, columns = grid
    token = torch.arange(high * wide, device=device)  # [N]
    y, x = torch.div(token, wide, rounding_mode="floor"), token % wide  # [N], [N]
    row = torch.div(y * rows, high, rounding_mode="floor")  # [N]
    return row, torch.div(x * columns, wide, rounding_mode="floor")  # [N], [N]
