"""Neighbourhood attention as NAT and DiNAT call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

BASELINES = ("eager", "compiled", "sdpa", "flex", "natten")


@dataclass(frozen=True)
class Case:
    """One shape on a square map. `model` says who calls it so."""

    model: str
    batch: int
    side: int
    heads: int
    d: int
    dilation: int = 1
    kernel: int = 7
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.side, self.side, 3, self.heads, self.d)
        qkv = torch.randn(shape, generator=generator).to(dtype).to(device)
        offsets = 2 * self.kernel - 1
        inputs = {"qkv": qkv}
        if self.bias:
            inputs["rpb"] = torch.randn(self.heads, offsets, offsets, generator=generator).to(device)
        return {name: t.requires_grad_(grad) for name, t in inputs.items()}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        q, k, v = inputs["qkv"].unbind(-3)
        return vitkern.neighborhood_attention(
            q, k, v, self.kernel, dilation=self.dilation, rpb=inputs.get("rpb"), backend=backend
        )

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes, floating-point operations and exponentials of the op: each input read once, each output written once."""
        element = torch.finfo(dtype).bits // 8
        tokens = self.batch * self.side**2
        size, n = tokens * self.heads * self.d, self.kernel**2
        return {
            "bytes": float(size * element * (4 + (7 if backward else 0))),
            "flops": 2.0 * size * n * (2 + (5 if backward else 0)),
            "exps": float(tokens * self.heads * n * (2 if backward else 1)),
        }


CASES = [
    Case("NAT-T stage 1", 1, 56, 2, 32),
    Case("NAT-T stage 1", 8, 56, 2, 32),
    Case("NAT-T stage 2", 8, 28, 4, 32),
    Case("NAT-T stage 3", 8, 14, 8, 32),
    Case("DiNAT-T stage 1, dilation 8", 1, 56, 2, 32, dilation=8),
    Case("DiNAT-T stage 1, dilation 8", 8, 56, 2, 32, dilation=8),
]
GPU_CASES = [
    *(Case(f"NAT-T stage {stage}", 128, 112 >> stage, 1 << stage, 32) for stage in (1, 2, 3)),
    Case("DiNAT-T stage 1, dilation 8", 128, 56, 2, 32, dilation=8),
    Case(
        "NAT-T stage 1 without positions", 128, 56, 2, 32, bias=False
    ),  # the only kind that NATTEN's kernels still take
    Case("DiNAT-T stage 1, dilation 8, without positions", 128, 56, 2, 32, dilation=8, bias=False),
]
