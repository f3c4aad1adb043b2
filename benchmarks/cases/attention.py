"""Masked and biased attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import tensors

BASELINES = ("eager", "compiled", "sdpa")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so; `bias`: a dense [H, Nq, Nk] shared by the batch; `hidden`: the part of the keys
    that a mask [B, 1, Nq, Nk] hides."""

    model: str
    batch: int
    queries: int
    keys: int
    heads: int
    d: int
    bias: bool = False
    hidden: float = 0.0

    def __str__(self) -> str:
        return f"{self.model}, Nq={self.queries}, Nk={self.keys}, H={self.heads}, D={self.d}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shapes = {
            "q": (self.batch, self.queries, self.heads, self.d),
            "k": (self.batch, self.keys, self.heads, self.d),
            "v": (self.batch, self.keys, self.heads, self.d),
        }
        if self.bias:
            shapes["bias"] = (self.heads, self.queries, self.keys)
        made = tensors(dtype, device, grad, **shapes)
        if self.hidden:
            generator = torch.Generator().manual_seed(1)
            seen = torch.rand(self.batch, 1, self.queries, self.keys, generator=generator) >= self.hidden
            made["mask"] = seen.to(device)
        return made

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        mask = inputs["mask"].bool() if self.hidden else None
        options = {"bias": inputs.get("bias"), "mask": mask, "backend": backend}
        return vitkern.attention(inputs["q"], inputs["k"], inputs["v"], **options)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: q, k, v, bias and mask read once, the output written; backward reads them and dout and writes gradients. Two
        products forward, five backward; one exponential a score and pass. Of hidden keys nothing need be done."""
        size = torch.finfo(dtype).bits // 8
        rows = self.batch * self.heads * self.d * (2 * self.queries + 2 * self.keys)
        scores = self.batch * self.heads * self.queries * self.keys * (1 - self.hidden)
        shared = self.heads * self.queries * self.keys * self.bias
        return {
            "bytes": float((rows + shared) * size * (3 if backward else 1)),
            "flops": 2.0 * scores * self.d * (7 if backward else 2),
            "exps": scores * (2 if backward else 1),
        }


CASES = [
    Case("BEiT-B/16 224²", 8, 197, 197, 12, 64, bias=True),
    Case("BEiT-B/16 384²", 2, 577, 577, 12, 64, bias=True),
    Case("BEiT-B/16 512²", 1, 1025, 1025, 12, 64, bias=True),
    Case("DeiT-S", 8, 197, 197, 6, 64),
    Case("Mask2Former 1/8", 1, 100, 4096, 8, 32, hidden=0.9),
]
GPU_CASES = CASES
