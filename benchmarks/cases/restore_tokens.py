"""Restoring dropped tokens as published decoders do: shapes, inputs, and the work that cannot be avoided."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")


@functools.cache
def shuffle_of(batch: int, tokens: int, device: str) -> torch.Tensor:
    """The order in which tokens were shuffled before the first of them were kept, int64 [batch, tokens]."""
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)).argsort(dim=1).to(device)


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    tokens: int
    width: int
    kept: int

    def __str__(self) -> str:
        return f"{self.model}, n={self.tokens}, K={self.kept}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        return tensors(dtype, device, grad, y=(self.batch, self.kept, self.width), token=(self.width,))

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        y = inputs["y"]
        index = shuffle_of(self.batch, self.tokens, y.device.type)[:, : self.kept].int()
        return vitkern.restore_tokens(y, index, self.tokens, inputs["token"], backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: y read, all rows written; backward reads all rows and writes dy."""
        rows = self.batch * (self.kept + self.tokens) * (2 if backward else 1)
        missing = self.batch * (self.tokens - self.kept) * self.width
        return {"bytes": moved(rows, self.width, dtype), "flops": float(missing * backward), "exps": 0.0}


CASES = [
    Case("MAE decoder", 8, 196, 512, 49),
    Case("MAE decoder", 64, 196, 512, 49),
    Case("VideoMAE decoder", 8, 1568, 384, 156),
]
GPU_CASES = [Case("MAE decoder", 256, 196, 512, 49)]
