"""restore_tokens on a GPU: the gather of unmerge_tokens forward and backward, the sum of merge_tokens for a mask token.

The meaning of every argument is that of the reference, vitkern/reference/restore_tokens.py.
"""

import torch
from torch import Tensor

from . import merge_tokens
from ._host import DTYPES
from .unmerge_tokens import gathered


def supported(y, index, fill, mask_token, n, value) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = [r.replace("x ", "y ", 1) for r in merge_tokens.supported(y, None, None, None, None, "sum", True)]
    for name, t in (("fill", fill), ("mask_token", mask_token)):
        if t is not None and t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    return why


def places(index, n) -> Tensor:
    """Where each position stands in index [B, K], K for one that does not: int32 [B, n], contiguous."""
    batch, rows = index.shape
    at = torch.arange(rows, dtype=torch.int32, device=index.device).expand(batch, rows)
    place = torch.full((batch, n + 1), rows, dtype=torch.int32, device=index.device)
    return place.scatter_(1, index.clamp(0, n).long(), at)[:, :n].contiguous()


def fwd(y, index, fill, mask_token, n, value) -> Tensor:
    """out [B, n, C] in y's dtype, contiguous."""
    rows = mask_token.expand(y.shape[0], n, -1) if mask_token is not None else fill
    return gathered(y, places(index, n), value, rows)


def bwd(dout, y, index, fill, mask_token, n, value, need) -> tuple[Tensor | None, ...]:
    """dy [B, K, C], dfill [B, n, C], dmask_token [C]; None where `need` does not ask."""
    dy = dfill = dmask_token = None
    if dout is None:
        return dy, dfill, dmask_token
    if need & 1:
        dy = gathered(dout, index.clamp(0, n), dtype=y.dtype)
    if need & 6 == 0:
        return dy, dfill, dmask_token
    place, rows = places(index, n), index.shape[1]
    if need & 2 and fill is not None:
        own = torch.arange(n, dtype=torch.int32, device=y.device)
        dfill = gathered(dout, torch.where(place == rows, own, n).to(torch.int32), dtype=fill.dtype)
    if need & 4 and mask_token is not None:
        perm = place.argsort(dim=1, stable=True).to(torch.int32)       # the missing positions last
        found = (place < rows).sum(1, dtype=torch.int32)
        offsets = torch.stack((found, torch.full_like(found, n)), 1)
        total, _ = merge_tokens.fwd(
            dout, place, perm, offsets, None, "sum", True, with_size=False, dtype=torch.float32
        )
        dmask_token = total.sum((0, 1)).to(mask_token.dtype)
    return dy, dfill, dmask_token
