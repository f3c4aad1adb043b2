"""What people run today instead of bipartite_match: the meaning of the published token merging, in plain PyTorch."""

import math
from typing import Any

import torch
from torch import Tensor

from ..cases.bipartite_match import Case


class Eager:
    """Normalise, all similarities, hide the class token, the largest of each row."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        metric = inputs["metric"]
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].mT
        if self.case.protect:
            scores[:, 0] = -math.inf
        return scores.max(-1)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)
