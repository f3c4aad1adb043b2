"""sampled_window_attention: the queries of a window attend to K samples of a map, read at given places (Zhang et al. 2022, VSA).

    k~_j = sum_ab (1 - |y_j - row_a|) (1 - |x_j - column_b|) k(row_a, column_b)        v~_j likewise, at its own places if given
    s_ij = scale q_i.k~_j + bias_ij,   P_ij = exp(s_ij) / sum_j exp(s_ij),   o_i = sum_j P_ij v~_j

(x, y) are pixels of the map of k and v, 0 the centre of the first column and row. The corners around a place that lie outside the map
count 0. A place that is not finite, or outside (-1, size), gives k~ = v~ = 0 and has gradient 0; with `mask` a sample whose places in k
are all such is hidden. Places are float32 (float64 beside float64), k~ and v~ are rounded to the dtype of q. A NaN or infinity in k~
makes the rows that see it NaN; one in v~ makes them NaN in that channel. A row that sees nothing gives 0. A corner of weight 0 is read.
"""

import math

import torch
from torch import Tensor

from vitkern.reference.window_attention import dense_bias, gather, geometry


def sampled_window_attention(
    q: Tensor,  # [B, H, W, heads, D]
    k: Tensor,  # [B, Hk, Wk, kv_heads, D]
    v: Tensor,  # [B, Hk, Wk, kv_heads, Dv]
    coords: Tensor,  # [B, nWy, nWx, K, G, 2]: x, y; G is 1, heads, or heads r
    coords_v: Tensor | None,  # the places of v; None: those of k
    of_window: Tensor | None,  # [B, nW, heads, N, K]: a bias of every window
    bias: Tensor | None,  # [heads, N, K] of all windows, or a table [R, heads] where index is given
    index: Tensor | None,  # [N, K] int32, rows of the table
    window: list[int],
    scale: float,
    mask: bool,  # out_of_range="mask"
    gpu: str = "",
) -> Tensor:  # [B, H, W, heads, Dv]
    acc = torch.promote_types(q.dtype, torch.float32)  # float32; float64 stays float64
    lengths, heads = list(q.shape[1:3]), q.shape[3]
    token, _, slot = geometry(lengths, window, [0, 0], False, q.device)  # [nW, N], _, [T]
    qw = gather(q, token, None).to(acc)  # [B, nW, heads, N, D]
    kw, seen = sampled(k, coords, heads)  # [B, nW, heads, K, D], [B, nW, heads, K]
    vw, _ = sampled(v, coords if coords_v is None else coords_v, heads)  # [B, nW, heads, K, Dv]
    broken = ~kw.isfinite().all(-1)  # [B, nW, heads, K]
    kw = kw.masked_fill(~kw.isfinite(), 0.0)  # [B, nW, heads, K, D]
    s = (qw @ kw.mT * scale).masked_fill(broken[:, :, :, None], math.nan)  # [B, nW, heads, N, K]
    if of_window is not None:
        s = (s + of_window.to(acc)).masked_fill(of_window == -math.inf, -math.inf)  # [B, nW, heads, N, K]
    if bias is not None:
        dense = dense_bias(bias, index, "sampled_window_attention").to(acc)  # [heads, N, K]
        s = (s + dense).masked_fill(dense == -math.inf, -math.inf)  # [B, nW, heads, N, K]
    if mask:
        s = s.masked_fill(~seen[:, :, :, None], -math.inf)  # [B, nW, heads, N, K]
    unseen = s == -math.inf  # [B, nW, heads, N, K]
    empty = unseen.all(-1, keepdim=True)  # [B, nW, heads, N, 1]
    top = (
        s.detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)
    )  # [B, nW, heads, N, 1] the result does not depend on it
    e = (s - top).exp()  # [B, nW, heads, N, K]
    p = e / e.sum(-1, keepdim=True).masked_fill(empty, 1.0)  # [B, nW, heads, N, K]
    finite = vw.isfinite()  # [B, nW, heads, K, Dv]
    o = p.to(q.dtype).to(acc) @ vw.masked_fill(~finite, 0.0)  # [B, nW, heads, N, Dv]
    o = o.masked_fill((~unseen).to(acc) @ (~finite).to(acc) > 0, math.nan)  # [B, nW, heads, N, Dv]
    out = o.transpose(2, 3).flatten(1, 2)[:, slot].to(v.dtype)  # [B, T, heads, Dv]
    return out.unflatten(1, lengths)  # [B, H, W, heads, Dv]


def sampled(x: Tensor, coords: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Samples of x [B, Hk, Wk, kv_heads, C], [B, nW, heads, K, C], rounded to its dtype; and which of them lie on the map."""
    acc = torch.promote_types(x.dtype, torch.float32)
    batch, height, width, kv_heads, dim = x.shape
    samples, groups = coords.shape[3:5]
    parts = max(groups // heads, 1)
    place = coords.flatten(1, 2).to(acc).expand(-1, -1, -1, heads * parts, -1)  # [B, nW, K, heads r, 2]
    u, w = place.permute(4, 0, 3, 1, 2).unbind(0)  # [B, heads r, nW, K] twice
    seen = (u > -1) & (u < width) & (w > -1) & (w < height)  # [B, heads r, nW, K]
    u, w = torch.where(seen, u, 0.0), torch.where(seen, w, 0.0)  # [B, heads r, nW, K] twice
    left, top = u.detach().floor(), w.detach().floor()  # [B, heads r, nW, K] twice
    rows = x.to(acc).flatten(1, 2).repeat_interleave(heads // kv_heads, 2)  # [B, S, heads, C]
    rows = rows.unflatten(3, (parts, dim // parts)).flatten(2, 3).transpose(1, 2)  # [B, heads r, S, C / r]
    found = rows.new_zeros(())
    for row, share_y in ((top, 1 - (w - top)), (top + 1, w - top)):
        for column, share_x in ((left, 1 - (u - left)), (left + 1, u - left)):
            inside = seen & (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [B, heads r, nW, K]
            cell = torch.where(inside, row.long() * width + column.long(), 0)  # [B, heads r, nW, K]
            index = cell.flatten(2)[..., None].expand(-1, -1, -1, rows.shape[-1])  # [B, heads r, nW K, C / r]
            corner = rows.gather(2, index).unflatten(2, cell.shape[2:])  # [B, heads r, nW, K, C / r]
            corner = torch.where(inside[..., None], corner, 0.0)  # [B, heads r, nW, K, C / r]
            found = found + (share_y * share_x)[..., None] * corner  # [B, heads r, nW, K, C / r]
    found = found.unflatten(1, (heads, parts)).permute(0, 3, 1, 4, 2, 5).flatten(4)  # [B, nW, heads, K, C]
    on_map = seen.unflatten(1, (heads, parts)).any(2).transpose(1, 2)  # [B, nW, heads, K]
    return found.to(x.dtype).to(acc), on_map
