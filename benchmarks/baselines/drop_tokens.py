"""What people run today instead of drop_tokens: shuffle and gather, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.drop_tokens import Case


class Eager:
    """The argsort of the noise, its own argsort (the order to restore by), and a gather."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        x = inputs["x"]
        shuffle = inputs["noise"].argsort(dim=1)
        self.restore = shuffle.argsort(dim=1)
        return x.gather(1, shuffle[:, : self.case.kept, None].expand(-1, -1, x.shape[2]))


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)
