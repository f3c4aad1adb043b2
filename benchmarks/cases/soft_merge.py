"""Soft merging as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import tensors

BASELINES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    tokens: int
    slots: int
    width: int
    axis: str = "token"
    normalize: str = "softmax"
    renormalize: float | None = None
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, M={self.slots}, C={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shapes = {"x": (self.batch, self.tokens, self.width), "logits": (self.batch, self.tokens, self.slots)}
        return tensors(dtype, device, grad, **shapes)

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        options = {"axis": self.axis, "normalize": self.normalize, "renormalize": self.renormalize, "scale": self.scale}
        return vitkern.soft_merge(inputs["x"], inputs["logits"], backend=backend, **options)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: x and logits read, y written; backward reads them and dy again and writes two gradients. One product
        forward, two backward; one exponential a logit and pass, two rounds of them under Sinkhorn's."""
        element = torch.finfo(dtype).bits // 8
        once = (self.tokens * (self.width + self.slots) + self.slots * self.width) * self.batch * element
        pairs = self.batch * self.tokens * self.slots
        exps = {"softmax": 1, "sigmoid": 1, "sinkhorn": 7}.get(self.normalize, 0)
        return {
            "bytes": float(once * (3 if backward else 1)),
            "flops": 2.0 * pairs * self.width * (3 if backward else 1),
            "exps": float(pairs * exps * (2 if backward else 1)),
        }


CASES = [
    Case("PatchMerger ViT-B/16", 8, 197, 8, 768),
    Case("TokenLearner 32², v1", 8, 1024, 16, 384, normalize="sigmoid"),
    Case("Sinkhorn DeiT-S", 8, 196, 49, 384, normalize="sinkhorn"),
    Case("ToMA SDXL 64²", 2, 4096, 1024, 640, "slot", "softmax", 1e-6, 10.0),
    Case("MobileViTv2 score", 8, 1024, 1, 256),
]
GPU_CASES = CASES
