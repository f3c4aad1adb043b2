"""Dropping tokens at random as published models do: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    tokens: int
    width: int
    ratio: float

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, ratio={self.ratio}, C={self.width}, batch {self.batch}"

    @property
    def kept(self) -> int:
        return int(self.tokens * (1 - self.ratio))

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        noise = torch.rand(self.batch, self.tokens, generator=torch.Generator().manual_seed(1)).to(device)
        return tensors(dtype, device, grad, x=(self.batch, self.tokens, self.width)) | {"noise": noise}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        return vitkern.drop_tokens(inputs["x"], self.ratio, noise=inputs["noise"], backend=backend)[0]

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: the kept rows read and written; backward reads dy and writes dx."""
        rows = 2 * self.kept + (self.kept + self.tokens if backward else 0)
        return {
            "bytes": moved(self.batch * rows, self.width, dtype, self.batch * self.tokens * 4),
            "flops": 0.0,
            "exps": 0.0,
        }


CASES = [
    Case("MAE ViT-B/16", 8, 196, 768, 0.75),
    Case("MAE ViT-B/16", 64, 196, 768, 0.75),
    Case("VideoMAE ViT-B", 8, 1568, 768, 0.9),
]
GPU_CASES = [Case("MAE ViT-B/16", 256, 196, 768, 0.75)]
