"""What people run today instead of select_tokens: the meaning of the published reorganisation, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.select_tokens import Case


class Eager:
    """topk, a gather, and the tokens left out times their scores, summed."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        x, score = inputs["x"], inputs["score"][:, 1:]
        patches = x[:, 1:]
        kept = score.topk(self.case.k, dim=1)[1]
        parts = [x[:, :1], patches.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))]
        if self.case.fuse:
            rest = score.scatter(1, kept, 0.0).to(x.dtype)
            parts.append((patches * rest[..., None]).sum(1, keepdim=True))
        return torch.cat(parts, 1)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)
