"""bipartite_match: the best partner of every source token (token merging, Bolya et al. 2023).

    m_i = mean over heads of metric_i                      r_i = 1 / max(|m_i|, eps), 1 for plain products
    s_ij = r_i r_j m_i.m_j                                 a NaN, or a NaN or infinity in m_i or m_j, counts as -inf
    allowed(i, j): i is a source, j a destination, their segments are equal, j lies in the window around i
    score_i = max over allowed j of s_ij > -inf            dst_i = the smallest such j that attains it

A token without a partner has score -inf and dst_i = i. A zero row has similarity 0 to everything. Nothing has a gradient.
"""

import math

import torch
from torch import Tensor

BLOCK = 2048  # sources whose similarities exist at one time
SOURCE, DESTINATION, BYSTANDER, PROTECTED, MASKED = range(5)  # the values of role


def bipartite_match(
    metric: Tensor,  # [B, N, C] or [B, N, H, C]
    role: Tensor | None,  # [B|1, N] int8; None: even positions are sources, odd ones destinations
    segments: Tensor | None,  # [B|1, N] int32
    protect: int,  # the first tokens, protected; used where role is None
    window: list[int],  # [] everywhere; [w]: |i - j| <= w; [wy, wx, Hs, Ws]: on the grid of the last Hs Ws tokens
    cosine: bool,
    eps: float,
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # score [B, N] float32, dst [B, N] int32, role [B, N] int8
    acc = torch.promote_types(metric.dtype, torch.float32)  # float32; float64 stays float64
    m = metric.detach().to(acc)  # [B, N, (H,) C]
    if m.dim() == 4:
        m = m.mean(2)  # [B, N, C]
    batch, tokens, _ = m.shape
    position = torch.arange(tokens, device=m.device)  # [N]
    if role is None:
        role = torch.where(position < protect, PROTECTED, position % 2).to(torch.int8)[None]  # [1, N]
    m = m.masked_fill(~m.isfinite().all(-1, keepdim=True), math.nan)  # [B, N, C]
    if cosine:
        m = m / m.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)  # [B, N, C]
    found = [
        best_of(m, role, segments, i, position, window)  # [B, R] each, R sources at a time
        for i in position.split(max(1, tokens if torch.compiler.is_compiling() else BLOCK))
    ]
    score, dst = (torch.cat(parts, 1) for parts in zip(*found, strict=True))  # [B, N], [B, N]
    return score.float(), dst.to(torch.int32), role.expand(batch, tokens).clone()  # [B, N] each


def best_of(
    m: Tensor, role: Tensor, segments: Tensor | None, i: Tensor, j: Tensor, window: list[int]
) -> tuple[Tensor, Tensor]:
    """Score and partner of the tokens at the positions i [R] among those at j [N]: [B, R], [B, R] int64."""
    s = m[:, i] @ m.mT  # [B, R, N]
    allowed = (role[:, i] == SOURCE)[:, :, None] & (role == DESTINATION)[:, None, :]  # [B|1, R, N]
    if segments is not None:
        allowed = allowed & (segments[:, i, None] == segments[:, None, :])  # [B|1, R, N]
    if window:
        allowed = allowed & near(i, j, window)  # [B|1, R, N]
    s = s.masked_fill(~allowed | s.isnan(), -math.inf)  # [B, R, N]
    if j.shape[0] == 0:
        return s.sum(-1), torch.zeros_like(s.sum(-1), dtype=torch.int64)  # [B, 0], [B, 0]
    score = s.amax(-1)  # [B, R]
    best = (s == score[..., None]) & (s > -math.inf)  # [B, R, N]
    first = torch.where(best, j, j.shape[0]).amin(-1)  # [B, R]
    return score, torch.where(first < j.shape[0], first, i)  # [B, R], [B, R]


def near(i: Tensor, j: Tensor, window: list[int]) -> Tensor:
    """Whether j [N] lies in the window around i [R]: [R, N]. A token beside the grid is near nothing."""
    if len(window) == 1:
        return (i[:, None] - j[None, :]).abs() <= window[0]  # [R, N]
    high, wide, rows, columns = window
    start = j.shape[0] - rows * columns
    a, b = (i - start)[:, None], (j - start)[None, :]  # [R, 1], [1, N] places on the grid; negative before it
    rows_apart = torch.div(a, columns, rounding_mode="floor") - torch.div(b, columns, rounding_mode="floor")  # [R, N]
    columns_apart = a % columns - b % columns  # [R, N]
    return (rows_apart.abs() <= high) & (columns_apart.abs() <= wide) & (a >= 0) & (b >= 0)  # [R, N]
