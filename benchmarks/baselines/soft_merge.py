"""What people run today instead of soft_merge: the weights as a tensor, then a product, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.soft_merge import Case


class Eager:
    """As the published modules have it: normalise the logits, multiply."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        x, s = inputs["x"], inputs["logits"] * self.case.scale
        dim = 1 if self.case.axis == "token" else 2
        if self.case.normalize == "softmax":
            w = s.softmax(dim)
        elif self.case.normalize == "sigmoid":
            w = s.sigmoid()
        else:
            v = torch.zeros_like(s[..., :1])
            for _ in range(3):
                u = -torch.logsumexp(s + v, 1, keepdim=True)
                v = -torch.logsumexp(s + u, 2, keepdim=True)
            w = (s + u + v).exp()
        if self.case.renormalize:
            w = w / w.sum(1, keepdim=True).clamp(min=self.case.renormalize)
        return w.mT @ x


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)
