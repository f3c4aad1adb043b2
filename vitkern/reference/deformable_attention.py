"""deformable_attention: every query reads a few places of maps of several sizes (Zhu et al. 2021).

    u = loc_x W - 1/2,  w = loc_y H - 1/2          sample = sum_ab (1 - |w - row_a|) (1 - |u - column_b|) value(row_a, column_b)
    nearest: column = floor(loc_x W + 1/2), row = floor(loc_y H + 1/2), both held inside the level; no gradient to loc
    out[b, i, h] = sum_j A[b, i, h, j] sample[b, i, h, j]

The corners around (u, w) that lie outside the level count 0. A location that is not finite, or with "bilinear" outside
(-1, size), counts 0 whatever its weight and has gradient 0. Coordinates and sums are float32 (float64 for a float64 value).
"""

import torch
from torch import Tensor


def deformable_attention(
    value: Tensor,  # [B, S, H, D], level behind level, row-major inside
    locations: Tensor,  # [B, N, H, G, Q, 2]: x, y in [0, 1]; G Q = J points, level behind level
    weights: Tensor,  # [B, N, H, G, Q]
    shapes: list[int],  # [2 L]: height and width of each level
    points: list[int],  # [L]: points of each level, J together
    nearest: bool,
    normalize: bool,
    gpu: str = "",
) -> Tensor:  # [B, N, H, D]
    acc = torch.promote_types(value.dtype, torch.float32)  # float32; float64 stays float64
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    sizes, start = list(zip(shapes[::2], shapes[1::2], strict=True)), 0
    starts = []
    for height, width in sizes:
        starts.append(start)
        start = start + height * width
    per_point = [
        torch.cat([torch.full((n,), k, device=value.device) for k, n in zip(kind, points, strict=True)])
        for kind in (*zip(*sizes, strict=True), starts)
    ]
    height, width, first = per_point  # [J] each, int64
    x, y = locations.to(acc).flatten(3, 4).unbind(-1)  # [B, N, H, J] twice
    a = weights.to(acc).flatten(3)  # [B, N, H, J]
    if normalize:
        a = a.softmax(-1)  # [B, N, H, J]
    rows = value.to(acc).permute(0, 2, 1, 3)  # [B, H, S, D]
    if nearest:
        seen = x.isfinite() & y.isfinite()  # [B, N, H, J]
        row, column = (
            torch.where(seen, (t * n + 0.5).floor(), 0.0).clamp(min=0).minimum(n - 1)
            for t, n in ((y, height), (x, width))
        )  # [B, N, H, J] twice
        corners = [(row, column, (row + column) * 0 + 1)]  # 1, with a gradient of 0 to the places
    else:
        u, w = x * width - 0.5, y * height - 0.5  # [B, N, H, J] twice
        seen = (u > -1) & (u < width) & (w > -1) & (w < height)  # [B, N, H, J]
        u, w = torch.where(seen, u, 0.0), torch.where(seen, w, 0.0)  # [B, N, H, J] twice
        left, top = u.detach().floor(), w.detach().floor()  # [B, N, H, J] twice
        sides = [(top, 1 - (w - top)), (top + 1, w - top)], [(left, 1 - (u - left)), (left + 1, u - left)]
        corners = [(row, column, f * g) for row, f in sides[0] for column, g in sides[1]]
    a = torch.where(seen, a, 0.0)  # [B, N, H, J]
    out = value.new_zeros(batch, queries, heads, dim, dtype=acc)  # [B, N, H, D]
    for row, column, share in corners:
        inside = seen & (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [B, N, H, J]
        cell = torch.where(inside, first + row.long() * width + column.long(), 0)  # [B, N, H, J]
        index = cell.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, dim)  # [B, H, N J, D]
        found = rows.gather(2, index).view(batch, heads, *cell.shape[1::2], dim).transpose(1, 2)  # [B, N, H, J, D]
        found = torch.where(inside[..., None], found, 0.0)  # [B, N, H, J, D]
        out = out + ((a * share)[..., None] * found).sum(3)  # [B, N, H, D]
    return out.to(value.dtype)  # [B, N, H, D]
