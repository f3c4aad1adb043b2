"""Merging by size as published models call it: shapes, inputs, and the work that cannot be avoided."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")


@functools.cache
def plan_of(batch: int, tokens: int, r: int, device: str) -> vitkern.MergePlan:
    """The plan of a random metric, made once: matching has a benchmark of its own."""
    metric = torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(2)).to(device)
    return vitkern.merge_plan(vitkern.bipartite_match(metric, protect=0), r=r)


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
        size = torch.randint(1, 5, (self.batch, self.tokens), generator=torch.Generator().manual_seed(1))
        wide = torch.promote_types(dtype, torch.float32)
        made = tensors(dtype, device, grad, x=(self.batch, self.tokens, self.width))
        return made | {"size": size.to(wide).to(device)}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        x = inputs["x"]
        plan = plan_of(self.batch, self.tokens, self.r, x.device.type)
        return vitkern.merge_tokens(x, plan, weight=inputs["size"], backend=backend)[0]

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes and floating-point operations: x read, y written; backward reads dy and writes dx."""
        rows = self.batch * (2 * self.tokens - self.r) * (2 if backward else 1)
        return {
            "bytes": moved(rows, self.width, dtype, rows * 8),
            "flops": 2.0 * self.batch * self.tokens * self.width,
            "exps": 0.0,
        }


CASES = [
    Case("ViT-B/16", 8, 197, 768, 16),
    Case("ViT-B/16", 64, 197, 768, 16),
    Case("DINOv2-S/14 448²", 8, 1025, 384, 100),
    Case("SD 512² block 1", 2, 4096, 320, 2048),
]
GPU_CASES = [
    Case("ViT-B/16", 64, 197, 768, 16),
    Case("ViT-B/16", 256, 197, 768, 16),
    Case("4096 tokens", 8, 4096, 768, 2048),
]
