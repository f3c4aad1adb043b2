"""Planning a merge as published models do: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import tensors

BASELINES = ("eager", "compiled")
PASSES = ("fwd",)


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so. The scores are float32 in every dtype."""

    model: str
    batch: int
    tokens: int
    r: int
    order: str = "split"

    def __str__(self) -> str:
        return f"{self.model}, {self.order}, N={self.tokens}, r={self.r}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        metric = tensors(torch.float32, device, False, metric=(self.batch, self.tokens, 16))["metric"]
        match = vitkern.bipartite_match(metric, protect=0)
        return {"score": match.score, "dst": match.dst, "role": match.role}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        role = inputs["role"].to(torch.int8)
        match = vitkern.Match(inputs["score"].float(), inputs["dst"].int(), role, self.tokens // 2, False)
        plan = vitkern.merge_plan(match, r=self.r, order=self.order, backend=backend)
        return plan.token_map

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: score, partner and role read; map, lists and offsets written."""
        tokens = self.tokens * (9 + 8) + (self.tokens - self.r + 1) * 4
        return {"bytes": float(self.batch * tokens), "flops": 0.0, "exps": 0.0}


CASES = [
    Case("ViT-B/16", 8, 197, 16),
    Case("ViT-B/16", 64, 197, 16),
    Case("ViT-B/16", 64, 197, 16, "score"),
    Case("SD 512² block 1", 2, 4096, 2048),
]
GPU_CASES = [Case("ViT-B/16", 256, 197, 16), Case("4096 tokens", 8, 4096, 2048)]
