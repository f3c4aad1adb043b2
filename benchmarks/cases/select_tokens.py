"""Token selection as published models call it: shapes, inputs, and the work that cannot be avoided."""

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
    k: int
    fuse: bool = True

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, k={self.k}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        score = torch.rand(self.batch, self.tokens, generator=torch.Generator().manual_seed(1)).to(device)
        return tensors(dtype, device, grad, x=(self.batch, self.tokens, self.width)) | {"score": score}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        options = {"fuse_rest": self.fuse, "order": "score", "backend": backend}
        return vitkern.select_tokens(inputs["x"], inputs["score"], self.k, **options)[0]

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: rows read (all of them where the rest is fused), rows written; backward reads dy and writes dx."""
        kept = self.k + 1 + self.fuse
        forward = (self.tokens if self.fuse else kept) + kept
        rows = forward + (kept + self.tokens if backward else 0)
        fused = self.batch * (self.tokens - 1 - self.k) * self.width if self.fuse else 0
        return {
            "bytes": moved(self.batch * rows, self.width, dtype, self.batch * self.tokens * 4),
            "flops": 2.0 * fused * (2 if backward else 1),
            "exps": 0.0,
        }


CASES = [
    Case("EViT DeiT-S, keep 0.7", 8, 197, 384, 138),
    Case("EViT DeiT-S, keep 0.7", 64, 197, 384, 138),
    Case("VisionZip CLIP-L/14 336²", 8, 577, 1024, 54, False),
]
GPU_CASES = [Case("EViT DeiT-S, keep 0.7", 256, 197, 384, 138)]
