"""What people run today instead of attention: the meaning of BEiT's, SAM's, CaiT's and Mask2Former's blocks, in plain
PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.attention import Case


class Eager:
    """Scores, bias, mask, softmax, product."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        s = (q * self.case.d**-0.5) @ k.transpose(-2, -1)
        if self.case.mixed:
            s = mixed(s, inputs["pre_weight"], inputs["pre_bias"])
        added = self.added(inputs, q)
        if added is not None:
            s = s + added
        if self.case.masks:
            s = s.masked_fill(~self.seen(inputs), -torch.inf)
        p = s.softmax(-1)
        if self.case.mixed:
            p = mixed(p, inputs["post_weight"], inputs["post_bias"])
        return (p @ v).transpose(1, 2)

    def added(self, inputs: dict[str, Any], q: Tensor) -> Tensor | None:
        if not self.case.grid:
            return inputs.get("bias")
        n = self.case.grid
        place = torch.arange(n)[:, None] - torch.arange(n) + n - 1
        grid = q.unflatten(2, (n, n))
        rows = torch.einsum("bhyxd,yud->bhyxu", grid, inputs["rel_h"][place])
        columns = torch.einsum("bhyxd,xwd->bhyxw", grid, inputs["rel_w"][place])
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    def seen(self, inputs: dict[str, Any]) -> Tensor:
        """True where a resized probability is at least a half; all of a row without such a cell."""
        side = (self.case.side, self.case.side)
        resized = F.interpolate(inputs["logits"], size=side, mode="bilinear", align_corners=False)
        hidden = resized.sigmoid().flatten(2)[:, None] < 0.5
        return ~hidden | hidden.all(-1, keepdim=True)


def mixed(s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(s.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class Sdpa(Eager):
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        mask = self.seen(inputs) if self.case.masks else self.added(inputs, q)
        if mask is not None and mask.dim() == 3:
            mask = mask[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs; talking heads have no fused form, so that sdpa stands for eager there."""
    if name == "compiled":
        return torch.compile(Eager(case).__call__, dynamic=False)
    return Eager(case) if name == "eager" or case.mixed else Sdpa(case)


def supports(name: str, device: str, backward: bool) -> bool:
    return True
