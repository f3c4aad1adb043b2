"""Linear attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled", "sdpa", "fla", "flash_bla")
EXPONENTIALS = {"relu": 0, "elu1": 1}


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so. `channels`: q, k, v lie channel by channel, as convolutions leave them."""

    model: str
    batch: int
    tokens: int
    heads: int
    width: int
    feature_map: str = "relu"
    channels: bool = False
    causal: bool = False

    def __str__(self) -> str:
        form = f"{self.feature_map}, causal" if self.causal else self.feature_map
        return f"{self.model}, {form}, N={self.tokens}, H={self.heads}, D={self.width}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shape = (self.batch, self.heads, self.width, self.tokens)
        if not self.channels:
            shape = (self.batch, self.tokens, self.heads, self.width)
        return tensors(dtype, device, grad, q=shape, k=shape, v=shape)

    def qkv(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """q, k, v as [B, N, H, D]."""
        parts = [inputs[name] for name in "qkv"]
        return [t.permute(0, 3, 1, 2) for t in parts] if self.channels else parts

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        options = {"feature_map": self.feature_map, "eps": 1e-6, "causal": self.causal}
        return vitkern.linear_attention(*self.qkv(inputs), **options, backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: q, k, v, o once; backward q, dO, dq, then k, v, dk, dv. Products of D^2 a token: two forward, five backward
        (the numerator again, dS, and the three gradients)."""
        rows = float(self.batch * self.tokens * self.heads)
        exps = 2 * EXPONENTIALS[self.feature_map] * rows * self.width
        return {
            "bytes": moved(rows * (4 + (7 if backward else 0)), self.width, dtype),
            "flops": 2.0 * rows * self.width**2 * (7 if backward else 2),
            "exps": exps * (2 if backward else 1),
        }


CASES = [
    Case("EfficientViT-B1 stage 3, 512²", 8, 1024, 16, 16, channels=True),
    Case("SANA 1024²", 2, 1024, 36, 32),
    Case("LoFTR 480x640", 2, 4800, 8, 32, "elu1"),
    Case("MLLA-T stage 1, 512²", 1, 16384, 2, 32, "elu1"),
    Case("SANA 4K", 1, 16384, 36, 32),
    Case("plain", 1, 4096, 8, 32),
    Case("plain", 1, 4096, 16, 64),
    Case("plain", 1, 65536, 8, 32, "elu1"),
    Case("plain", 1, 4096, 8, 32, "elu1", causal=True),
]
GPU_CASES = [
    Case("plain", 1, 4096, 8, 32),
    Case("flash_bla's table", 2, 32768, 16, 64),
    Case("SANA 4K", 16, 4096, 36, 32),
    Case("plain", 1, 65536, 16, 64, "elu1"),
    Case("FLA's table", 2, 16384, 16, 64, "elu1", causal=True),
]
