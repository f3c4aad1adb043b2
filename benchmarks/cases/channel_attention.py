"""Channel attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitkern

from ._random import tensors

BASELINES = ("eager", "compiled", "sdpa")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so; `first`: channels lie before the pixels, as convolutions have them, else q, k
    and v are slices of one projection; `cosine`: normalised, with a temperature a head."""

    model: str
    batch: int
    tokens: int
    heads: int
    d: int
    first: bool = False
    cosine: bool = True

    def __str__(self) -> str:
        return f"{self.model}, N={self.tokens}, H={self.heads}, D={self.d}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        packed = (
            (self.batch, 3, self.heads, self.d, self.tokens)
            if self.first
            else (self.batch, self.tokens, 3, self.heads, self.d)
        )
        made = tensors(dtype, device, grad, qkv=packed)
        if self.cosine:
            made["temperature"] = torch.ones(self.heads, 1, 1, device=device).requires_grad_(grad)
        return made

    def split(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, N, H, D], views of the projection."""
        return inputs["qkv"].permute(1, 0, 4, 2, 3).unbind(0) if self.first else inputs["qkv"].unbind(2)

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        options: dict[str, Any] = {"temperature": inputs["temperature"]} if self.cosine else {"normalize": False}
        if not self.cosine:
            options["scale"] = self.d**-0.5
        out = vitkern.channel_attention(*self.split(inputs), backend=backend, **options)
        return out.permute(0, 2, 3, 1) if self.first else out  # as the projection behind it reads them

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: q, k and v read, o written; backward reads dout and v, then q, k and dout, and writes three gradients. Two
        products forward, four more backward; D x D exponentials."""
        element = torch.finfo(dtype).bits // 8
        once = self.batch * self.tokens * self.heads * self.d
        return {
            "bytes": float(once * element * (12 if backward else 4)),
            "flops": 2.0 * once * self.d * (6 if backward else 2),
            "exps": float(self.batch * self.heads * self.d**2 * (2 if backward else 1)),
        }


CASES = [
    Case("XCiT-S12/16", 8, 196, 8, 48),
    Case("XCiT-S12/8 384²", 1, 2304, 8, 48),
    Case("EdgeNeXt-S stage 4", 8, 64, 8, 38),
    Case("DaViT-T stage 1", 2, 3136, 3, 32, cosine=False),
    Case("Restormer 128², level 1", 1, 16384, 1, 48, first=True),
    Case("Restormer 512², level 2", 1, 65536, 2, 48, first=True),
]
GPU_CASES = [
    Case("XCiT-S12/16", 128, 196, 8, 48),
    Case("XCiT-S12/8 384²", 16, 2304, 8, 48),
    Case("Restormer 512², level 2", 4, 65536, 2, 48, first=True),
]
