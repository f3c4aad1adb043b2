"""What people run today instead of attention: the meaning of BEiT's and Mask2Former's blocks, in plain PyTorch."""

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
        if self.case.bias:
            s = s + inputs["bias"]
        if self.case.hidden:
            s = s.masked_fill(~inputs["mask"].bool(), -torch.inf)
        return (s.softmax(-1) @ v).transpose(1, 2)


class Sdpa(Eager):
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        mask = inputs["mask"].bool() if self.case.hidden else inputs["bias"][None] if self.case.bias else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    if name == "compiled":
        return torch.compile(Eager(case).__call__, dynamic=False)
    return {"eager": Eager, "sdpa": Sdpa}[name](case)


def supports(name: str, device: str, backward: bool) -> bool:
    return True
