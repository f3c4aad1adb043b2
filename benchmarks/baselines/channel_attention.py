"""What people run today instead of channel_attention: normalised copies, two products and a softmax in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.channel_attention import Case

F = torch.nn.functional


class Eager:
    """As timm and Restormer have it, with channels before the tokens."""

    def __init__(self, case: Case, fused: bool = False) -> None:
        self.case, self.fused = case, fused

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (t.permute(0, 2, 3, 1) for t in self.case.split(inputs))  # [B, H, D, N]
        if self.case.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            temperature = inputs["temperature"].to(q.dtype)
        else:
            temperature = self.case.d**-0.5
        if self.fused:
            out = F.scaled_dot_product_attention(q * temperature, k, v, scale=1.0)
        else:
            out = ((q @ k.transpose(-2, -1)) * temperature).softmax(-1) @ v
        return out if self.case.first else out.permute(0, 3, 1, 2).contiguous()


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    eager = Eager(case, fused=name == "sdpa")
    return torch.compile(eager.__call__, dynamic=False) if name == "compiled" else eager
