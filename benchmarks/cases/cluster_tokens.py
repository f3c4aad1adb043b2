"""Clustering as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")
PASSES = ("fwd",)


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so; `grid` and `cells` belong to "kmeans"."""

    model: str
    method: str
    batch: int
    tokens: int
    width: int
    k: int
    grid: tuple[int, int] = (0, 0)
    cells: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, N={self.tokens}, k={self.k}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shapes = {"x": (self.batch, self.tokens, self.width)}
        if self.method == "nearest":
            shapes["centers"] = (self.batch, self.k, self.width)
        return tensors(dtype, device, False, **shapes)

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        x, options = inputs["x"], {}
        k: Any = self.k
        if self.method == "nearest":
            k, options = None, {"centers": inputs["centers"]}
        if self.method == "kmeans":
            k, options = self.cells, {"grid": self.grid}
        centers, plan, _ = vitkern.cluster_tokens(x, k, method=self.method, backend=backend, **options)
        return plan.token_map.to(x.dtype) if self.method == "nearest" else centers

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes and floating-point operations: x read once; density N², delta N² / 2, assignment N k distances; k-means
        25 distances and 25 sums a token and turn, and an assignment."""
        tokens, k, width = self.tokens, self.k, self.width
        products = {
            "dpc_knn": 1.5 * tokens**2 + tokens * k,
            "nearest": tokens * k,
            "kmeans": 5 * 2 * 25 * tokens + tokens * k,
            "agglomerative": tokens**2,
            "kmedoids": (k + 5) * tokens + 5 * tokens**2 / k + tokens * k * 5,
        }[self.method]
        return {
            "bytes": moved(self.batch * (tokens + k), width, dtype, self.batch * tokens * 4),
            "flops": 2.0 * self.batch * products * width,
            "exps": 0.0 if self.method != "kmeans" else float(self.batch * 5 * 25 * tokens),
        }


CASES = [
    Case("TCFormer stage 1", "dpc_knn", 1, 3136, 64, 784),
    Case("ViT-S/16", "dpc_knn", 8, 196, 384, 49),
    Case("SD 512² grid", "dpc_knn", 1, 4096, 64, 1024),
    Case("SAM-H", "kmeans", 1, 4096, 1280, 256, (64, 64), (16, 16)),
    Case("DINOv2-B 448²", "nearest", 1, 1024, 768, 256),
    Case("ViT-B/16, ATC", "agglomerative", 8, 196, 64, 98),
]
GPU_CASES = [
    Case("SD 512² grid", "dpc_knn", 8, 4096, 64, 1024),
    Case("SAM-H", "kmeans", 4, 4096, 1280, 256, (64, 64), (16, 16)),
]
