"""What people run today instead of linear_attention: two products with a column of ones, as timm and SANA have it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.linear_attention import Case


class Eager:
    """The published modules: map, append a column of ones, multiply twice, divide."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.case.qkv(inputs))
        if self.case.feature_map == "relu":
            q, k = q.relu(), k.relu()
        else:
            q, k = F.elu(q) + 1, F.elu(k) + 1
        out = q.float() @ (k.float().mT @ F.pad(v.float(), (0, 1), value=1.0))
        return (out[..., :-1] / (out[..., -1:] + 1e-6)).to(v.dtype).transpose(1, 2)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)


def supports(name: str, device: str, backward: bool) -> bool:
    return True
