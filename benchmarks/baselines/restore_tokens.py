"""What people run today instead of restore_tokens: mask tokens appended, then unshuffled, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.restore_tokens import Case, shuffle_of


class Eager:
    """The mask token repeated, one concatenation, one gather by the inverse of the shuffle."""

    def __init__(self, case: Case, device: str) -> None:
        self.restore = shuffle_of(case.batch, case.tokens, device).argsort(dim=1)[..., None]
        self.missing = case.tokens - case.kept

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        y = inputs["y"]
        tokens = inputs["token"].repeat(y.shape[0], self.missing, 1)
        return torch.cat((y, tokens), 1).gather(1, self.restore.expand(-1, -1, y.shape[2]))


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case, device).__call__, dynamic=False) if name == "compiled" else Eager(case, device)
