"""What people run today instead of merge_plan: the meaning of the published plan, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.merge_plan import Case


class Eager:
    """Sources sorted by score, the first r go, the others by position with order "split", and where the r go to."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        order = inputs["score"][:, ::2].argsort(1, descending=True)
        gone, stay = order[:, : self.case.r], order[:, self.case.r :]
        to = inputs["dst"][:, ::2].gather(1, gone)
        return gone, to, stay.sort(1).values if self.case.order == "split" else stay


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)
