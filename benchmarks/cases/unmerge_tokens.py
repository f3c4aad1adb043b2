"""Unmerging as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors
from .merge_tokens import BASELINES, plan_of

__all__ = ["BASELINES", "CASES", "GPU_CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    tokens: int
    width: int
    r: int

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, r={self.r}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        return tensors(dtype, device, grad, y=(self.batch, self.tokens - self.r, self.width))

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        y = inputs["y"]
        return vitkern.unmerge_tokens(y, plan_of(self.batch, self.tokens, self.r, y.device.type), backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: y read, x written; backward reads dx and writes dy."""
        rows = self.batch * (2 * self.tokens - self.r) * (2 if backward else 1)
        return {"bytes": moved(rows, self.width, dtype, rows * 4), "flops": 0.0, "exps": 0.0}


CASES = [
    Case("SD 512² block 1", 2, 4096, 320, 2048),
    Case("SD 1024² grid", 1, 16384, 320, 8192),
    Case("ViT-B/16", 8, 197, 768, 16),
]
GPU_CASES = [Case("SD 512² block 1", 8, 4096, 320, 2048)]
