"""Packed sequences as served models call them: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern

from ._random import tensors

BASELINES = ("loop of sdpa", "padded sdpa")


@dataclass(frozen=True)
class Case:
    """`lengths`: the tokens of each sequence."""

    model: str
    lengths: tuple[int, ...]
    heads: int
    d: int

    def __str__(self) -> str:
        return f"{self.model}, {len(self.lengths)} sequences, T={sum(self.lengths)}, H={self.heads}, D={self.d}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        return tensors(dtype, device, grad, **{name: (sum(self.lengths), self.heads, self.d) for name in "qkv"})

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        cu = torch.tensor((0, *self.lengths), device=inputs["q"].device).cumsum(0).to(torch.int32)
        longest = max(self.lengths)
        return vitkern.attention_varlen(
            inputs["q"], inputs["k"], inputs["v"], cu, cu, longest, longest, backend=backend
        )

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """As of attention, of the scores inside the sequences."""
        size = torch.finfo(dtype).bits // 8
        scores = float(self.heads * sum(n * n for n in self.lengths))
        return {
            "bytes": 4.0 * sum(self.lengths) * self.heads * self.d * size * (3 if backward else 1),
            "flops": 2.0 * scores * self.d * (7 if backward else 2),
            "exps": scores * (2 if backward else 1),
        }


CASES = [
    Case("Qwen2.5-VL windows 448²", (64,) * 16, 16, 80),
    Case("Qwen2.5-VL windows 700x900", (64,) * 42 + (32,) * 12 + (16,) * 6, 16, 80),
    Case("NaViT, mixed sizes", (196, 64, 256, 100, 400, 36, 144), 12, 64),
]
GPU_CASES = CASES
