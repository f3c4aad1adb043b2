"""window_rows and window_sum on a GPU: the gather of unmerge_tokens; the sum of merge_tokens where a token has several rows.

The meaning of every argument is that of the reference, vitkern/reference/window_rows.py.
"""

import math

import torch
from torch import Tensor

from . import merge_tokens
from .unmerge_tokens import gathered


def supported(x, fill, index, owners, counts, cells, most) -> list[str]:
    """Why fwd and sums cannot run these arguments, one sentence each; [] if they can."""
    row = x.new_empty((0, 1, x.shape[-2] * x.shape[-1]))
    return merge_tokens.supported(row, None, None, None, None, "sum", True)


def fwd(x, fill, index, owners, counts, cells, most) -> Tensor:
    """rows [B windows, N, H, D] in x's dtype, contiguous."""
    lengths, (heads, width) = x.shape[1:-2], x.shape[-2:]
    token = numbers(index.split([n * c for n, c in zip(counts, cells, strict=True)], 1), lengths, counts, cells)
    empty = None if fill is None else fill.to(x.dtype).reshape(1, 1, -1).expand(len(x), token.shape[1], -1)
    rows = gathered(x.reshape(len(x), math.prod(lengths), heads * width), _each(token, len(x)), rows=empty)
    return rows.view(len(x) * math.prod(counts), math.prod(cells), heads, width)


def sums(rows, index, owners, counts, cells, most, lengths, pads) -> tuple[Tensor, Tensor]:
    """out [B, *L, H, D] in the dtype of rows, and the sum of the rows of pads [H, D] in float32."""
    heads, width = rows.shape[-2:]
    total = torch.zeros(heads, width, device=rows.device)
    batch, tokens = rows.shape[0] // math.prod(counts), math.prod(lengths)
    flat = rows.reshape(batch, math.prod(counts) * math.prod(cells), heads * width)
    if not pads and math.prod(most) == 1:
        out = gathered(flat, _each(_slots(owners, lengths, counts, cells), batch))
        return out.view(batch, *lengths, heads, width), total
    parts = index.split([n * c for n, c in zip(counts, cells, strict=True)], 1)
    token = _each(numbers(parts, lengths, counts, cells), batch)
    named, perm = token.sort(dim=1, stable=True)
    ends = torch.arange(1, tokens + 2, dtype=torch.int32, device=rows.device).expand(batch, -1).contiguous()
    offsets = torch.nn.functional.pad(torch.searchsorted(named, ends), (1, 0)).to(torch.int32)
    perm = perm.to(torch.int32)
    out, _ = merge_tokens.fwd(flat, token, perm, offsets[:, :-1].contiguous(), None, "sum", True, with_size=False)
    if pads:
        last = offsets[:, -2:].contiguous()
        of_image, _ = merge_tokens.fwd(
            flat, token, perm, last, None, "sum", True, with_size=False, dtype=torch.float32
        )
        total = of_image.sum((0, 1)).view(heads, width)
    return out.view(batch, *lengths, heads, width), total


def numbers(parts, lengths, counts, cells) -> Tensor:
    """The token of every slot, int32 [1|B, windows N]; the number of tokens where it is a pad."""
    token, pad = 0, False
    for a, part in enumerate(parts):
        shape = [len(part)] + [1] * (2 * len(parts))
        shape[1 + a], shape[1 + len(parts) + a] = counts[a], cells[a]
        at = part.reshape(shape)
        token, pad = token * lengths[a] + at.clamp(min=0), pad | (at < 0)
    return token.masked_fill(pad, math.prod(lengths)).flatten(1)


def _slots(owners, lengths, counts, cells) -> Tensor:
    """The slot of every token, int32 [1|B, T], where each has one; the number of slots where it has none."""
    window, cell, none, rank = 0, 0, False, len(lengths)
    for a, part in enumerate(owners.split(list(lengths), 1)):
        shape = [len(part)] + [1] * rank
        shape[1 + a] = lengths[a]
        at = part.reshape(shape)
        window, cell = window * counts[a] + at // cells[a], cell * cells[a] + at % cells[a]
        none = none | (at < 0)
    size = math.prod(cells)
    return (window * size + cell).masked_fill(none, math.prod(counts) * size).flatten(1)


def _each(numbers, batch) -> Tensor:
    """One row for each image, contiguous."""
    return numbers.to(torch.int32).expand(batch, -1).contiguous()
