"""window_rows, window_sum: the tokens of a map, window by window, and back; each is the other's transpose.

An axis of the map has `counts` windows of `cells` places; place e is cell e mod cells of window e div cells. `index` holds the
coordinate of every place of every axis, one axis behind the other, -1 where there is none (a pad), in one row for all images or
one for each. `owners` is its inverse: for every coordinate the `most` places it may stand at, -1 where there are fewer. Windows of an image
are numbered row-major, cells of a window too.
"""

import math

import torch
from torch import Tensor


def window_rows(
    x: Tensor,  # [B, *L, H, D]
    fill: Tensor | None,  # [H, D]: the row of a pad; None is 0
    index: Tensor,  # [1|B, sum of counts * cells] int32
    owners: Tensor,  # [1|B, sum of L * most] int32
    counts: list[int],
    cells: list[int],
    most: list[int],
    gpu: str = "",
) -> Tensor:
    """``[B * windows, N, H, D]``."""
    flat = x.flatten(1, x.dim() - 3)  # [B, T, H, D]
    token = tokens(index, list(x.shape[1:-2]), counts, cells).flatten(1)  # [1|B, W N]
    image = torch.arange(len(x), device=x.device)[:, None]  # [B, 1]
    rows = flat[image, token.clamp(min=0)]  # [B, W N, H, D]
    empty = x.new_zeros(()) if fill is None else fill.to(x.dtype)  # [] or [H, D]
    rows = torch.where(token[..., None, None] < 0, empty, rows)  # [B, W N, H, D]
    return rows.reshape(-1, math.prod(cells), *x.shape[-2:])  # [B W, N, H, D]


def window_sum(
    rows: Tensor,  # [B * windows, N, H, D]
    index: Tensor,
    owners: Tensor,
    counts: list[int],
    cells: list[int],
    most: list[int],
    lengths: list[int],
    pads: bool,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:
    """``[B, *L, H, D]``: every token the sum of its rows; and the sum of the rows of pads ``[H, D]`` in float32 (float64), 0 without `pads`."""
    acc = torch.promote_types(rows.dtype, torch.float32)
    heads, width = rows.shape[-2:]
    batch = rows.shape[0] // math.prod(counts)
    total = math.prod(lengths)
    token = tokens(index, lengths, counts, cells).flatten(1).expand(batch, -1)  # [B, W N]
    image = torch.arange(batch, device=rows.device)[:, None]  # [B, 1]
    place = torch.where(token < 0, batch * total, image * total + token).flatten()  # [B W N]
    found = torch.zeros(batch * total + 1, heads, width, dtype=acc, device=rows.device)
    found = found.index_add(0, place, rows.reshape(-1, heads, width).to(acc))  # [B T + 1, H, D]
    out = found[:-1].to(rows.dtype).reshape(batch, *lengths, heads, width)  # [B, *L, H, D]
    return out, found[-1] if pads else torch.zeros_like(found[-1])


def tokens(index: Tensor, lengths: list[int], counts: list[int], cells: list[int]) -> Tensor:
    """The token of every slot, int64 [1|B, windows, N]; -1 where it is a pad."""
    rank = len(lengths)
    token = torch.zeros((1,) * (1 + 2 * rank), dtype=torch.int64, device=index.device)  # [1|B, n..., c...]
    pad = token.bool()
    parts = index.split([n * c for n, c in zip(counts, cells, strict=True)], 1)
    for a, part in enumerate(parts):
        shape = [len(index)] + [1] * (2 * rank)
        shape[1 + a], shape[1 + rank + a] = counts[a], cells[a]
        at = part.reshape(shape).long()
        token = token * lengths[a] + at.clamp(min=0)
        pad = pad | (at < 0)
    return token.masked_fill(pad, -1).reshape(len(index), math.prod(counts), math.prod(cells))
