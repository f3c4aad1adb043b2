"""Reconstruction as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so; `depth` is the width of the tokens that the distances are of."""

    model: str
    batch: int
    tokens: int
    clusters: int
    width: int
    depth: int

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, M={self.clusters}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shapes = {
            "y": (self.batch, self.clusters, self.width),
            "x": (self.batch, self.tokens, self.depth),
            "centers": (self.batch, self.clusters, self.depth),
        }
        return tensors(dtype, device, grad, **shapes)

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        return vitkern.reconstruct_tokens(inputs["y"], inputs["x"], inputs["centers"], norm="l2", backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes and floating-point operations: one product for the distances, 20 rows of y a token; the backward the
        product again, and 20 rows in and out of y, x and centers."""
        rows = self.batch * (self.tokens + self.clusters) * (3 if backward else 1)
        few = 20 * self.tokens
        once = 2.0 * self.tokens * self.clusters * self.depth + 2.0 * few * self.width
        again = 2.0 * self.tokens * self.clusters * self.depth + 2.0 * few * (2 * self.width + 2 * self.depth)
        return {
            "bytes": moved(rows, self.width + self.depth, dtype),
            "flops": self.batch * (once + (again if backward else 0.0)),
            "exps": float(self.batch * few * (2 if backward else 1)),
        }


CASES = [
    Case("SAM-H", 1, 4096, 256, 1280, 1280),
    Case("DINOv2-S 448²", 2, 1024, 64, 384, 384),
]
GPU_CASES = [Case("SAM-H", 4, 4096, 256, 1280, 1280)]
