"""grid_sum: what linear attention with a decay in two dimensions sums on a grid (RMT, Fan et al. 2024; PPMA, Zhao et al. 2025).

    out_i = sum_j M_ij <a_i, b_j> c_j

M is the exponential of the links on the way from the query along its row, then along the key's column; ``row[y, x]`` is the link of
(y, x) to its left, ``col[y, x]`` the one upwards. All of it is float32 (float64 for float64).
"""

import torch
from torch import Tensor


def grid_sum(
    a: Tensor,  # [B, Hs, Ws, H, F]
    b: Tensor,  # [B, Hs, Ws, H, F]
    c: Tensor,  # [B, Hs, Ws, H, C]
    row: Tensor,  # [B, Hs, Ws, H]; column 0 is not used
    col: Tensor,  # [B, Hs, Ws, H]; row 0 is not used
    turned: bool = False,  # M is transposed: along the query's column, then along the key's row
    gpu: str = "",
) -> Tensor:
    """``[B, Hs, Ws, H, C]``."""
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    x, y, z = (t.to(acc) for t in (a, b, c))  # [B, Hs, Ws, H, .]
    scores = torch.einsum("byxhf,bvuhf->byxvuh", x, y)  # [B, Hs, Ws, Hs, Ws, H]
    m = mask(row.to(acc), col.to(acc))  # [B, Hs, Ws, Hs, Ws, H]
    m = m.permute(0, 3, 4, 1, 2, 5) if turned else m  # [B, Hs, Ws, Hs, Ws, H]
    return torch.einsum("byxvuh,bvuhc->byxhc", scores * m, z)  # [B, Hs, Ws, H, C]


def mask(row: Tensor, col: Tensor) -> Tensor:
    """M ``[B, Hs, Ws, Hs, Ws, H]``."""
    along = torch.cat((torch.zeros_like(row[:, :, :1]), row[:, :, 1:]), 2).cumsum(2)  # [B, Hs, Ws, H]
    down = torch.cat((torch.zeros_like(col[:, :1]), col[:, 1:]), 1).cumsum(1)  # [B, Hs, Ws, H]
    x, y = (torch.arange(n, device=row.device) for n in (row.shape[2], row.shape[1]))  # [Ws], [Hs]
    right, left = torch.maximum(x[:, None], x), torch.minimum(x[:, None], x)  # [Ws, Ws]
    below, above = torch.maximum(y[:, None], y), torch.minimum(y[:, None], y)  # [Hs, Hs]
    r = along[:, :, right] - along[:, :, left]  # [B, Hs, Ws, Ws, H]
    k = down[:, below] - down[:, above]  # [B, Hs, Hs, Ws, H]
    return (r[:, :, :, None] + k[:, :, None]).exp()  # [B, Hs, Ws, Hs, Ws, H]


def grid_links(
    dout: Tensor,  # [B, Hs, Ws, H, C]
    a: Tensor,  # [B, Hs, Ws, H, F]
    b: Tensor,  # [B, Hs, Ws, H, F]
    c: Tensor,  # [B, Hs, Ws, H, C]
    row: Tensor,  # [B, Hs, Ws, H]
    col: Tensor,  # [B, Hs, Ws, H]
    turned: bool = False,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:
    """The gradients of row and col, where dout is that of grid_sum: of each link the sum over the pairs whose way crosses it."""
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    x, y, z, g = (t.to(acc) for t in (a, b, c, dout))  # [B, Hs, Ws, H, .]
    weight = torch.einsum("byxhf,bvuhf->byxvuh", x, y) * torch.einsum("byxhc,bvuhc->byxvuh", g, z)
    weight = weight.permute(0, 3, 4, 1, 2, 5) if turned else weight  # [B, Hs, Ws, Hs, Ws, H]
    weight = weight * mask(row.to(acc), col.to(acc))  # [B, Hs, Ws, Hs, Ws, H]: the way from (y, x) to (v, u)
    drow = torch.einsum("byxuh,xul->bylh", weight.sum(3), crossed(row.shape[2], weight))  # [B, Hs, Ws, H]
    dcol = torch.einsum("byvuh,yvl->bluh", weight.sum(2), crossed(col.shape[1], weight))  # [B, Hs, Ws, H]
    return drow, dcol


def crossed(side: int, like: Tensor) -> Tensor:
    """``[L, L, L]``, 1 where the way between two places crosses a link."""
    at = torch.arange(side, device=like.device)  # [L]
    low, high = torch.minimum(at[:, None], at), torch.maximum(at[:, None], at)  # [L, L]
    return ((at > low[..., None]) & (at <= high[..., None])).to(like.dtype)
