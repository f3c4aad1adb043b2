"""Token matching as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import tensors

BASELINES = ("eager", "compiled")
PASSES = ("fwd",)


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    tokens: int
    width: int
    protect: int = 1

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        return tensors(dtype, device, False, metric=(self.batch, self.tokens, self.width))

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        return vitkern.bipartite_match(inputs["metric"], protect=self.protect, backend=backend).score

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes and floating-point operations: the metric read once, nine bytes a token written, one product."""
        tokens, half = self.batch * self.tokens, self.tokens // 2
        return {
            "bytes": float(tokens * (self.width * torch.finfo(dtype).bits // 8 + 9)),
            "flops": 2.0 * self.batch * half * (self.tokens - half) * self.width,
            "exps": 0.0,
        }


CASES = [
    Case("ViT-B/16 224²", 8, 197, 64),
    Case("ViT-B/16 384²", 8, 577, 64),
    Case("DINOv2-S/14 448²", 4, 1025, 64),
    Case("SD 512² block 1", 2, 4096, 320, 0),
    Case("video, one head", 1, 4096, 64, 0),
    Case("SD 1024² grid, one head", 1, 16384, 64, 0),
]
GPU_CASES = [
    Case("ViT-B/16 224²", 64, 197, 64),
    Case("ViT-B/16 512²", 32, 1024, 64),
    Case("4096 tokens", 8, 4096, 64),
    Case("16384 tokens", 1, 16384, 64),
]
