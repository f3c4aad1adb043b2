"""What people run today instead of unmerge_tokens: rows put back part by part, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.unmerge_tokens import Case
from . import merge_tokens


class Eager(merge_tokens.Eager):
    """Zeros, then three writes: the destinations, the tokens that were left, the tokens that had gone."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        self.tokens = case.tokens

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        y = inputs["y"]
        n, _, c = y.shape
        count = self.left.shape[1]
        left, b = y[:, :count], y[:, count:]
        gone = b.gather(1, self.to.expand(n, -1, c))
        x = y.new_zeros(n, self.tokens, c)
        x[:, 1::2] = b
        x = x.scatter(1, 2 * self.left.expand(n, -1, c), left)
        return x.scatter(1, 2 * self.gone.expand(n, -1, c), gone)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case, device).__call__, dynamic=False) if name == "compiled" else Eager(case, device)
