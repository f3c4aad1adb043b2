"""Window attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

import math
from dataclasses import dataclass
from typing import Any

import torch

import vitkern
from vitkern import CosineScore
from vitkern.bias import RelativePosition, table_rows

BASELINES = ("eager", "compiled", "sdpa", "flex")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so."""

    model: str
    batch: int
    lengths: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    heads: int
    d: int
    cosine: bool = False

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(self.batch, *self.lengths, 3, self.heads, self.d, generator=generator).to(dtype).to(device)
        table = torch.randn(table_rows(self.window, "query-key"), self.heads, generator=generator).to(device)
        made = {"qkv": qkv, "table": table}
        if self.cosine:
            made["logit_scale"] = torch.full((self.heads,), math.log(10.0), device=device)
        return {name: t.requires_grad_(grad) for name, t in made.items()}

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        cosine = CosineScore(inputs["logit_scale"]) if self.cosine else None
        return vitkern.window_attention_qkvpacked(
            inputs["qkv"],
            self.window,
            self.shift,
            bias=RelativePosition(inputs["table"]),
            cosine=cosine,
            backend=backend,
        )

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes, floating-point operations and exponentials of the op: each input read once, each output written once."""
        element = torch.finfo(dtype).bits // 8
        tokens = self.batch * math.prod(self.lengths)
        n = math.prod(self.window)
        size = tokens * self.heads * self.d
        product = 2.0 * size * n
        return {
            "bytes": float(size * element * (4 + (7 if backward else 0))),
            "flops": product * (2 + (5 if backward else 0)),
            "exps": float(tokens * self.heads * n * (2 if backward else 1)),
        }


def swin_t(batch: int, stage: int, shifted: bool = True) -> Case:
    side, heads = 112 >> stage, 3 << (stage - 1)
    shift = 3 if shifted and side > 7 else 0
    return Case(f"Swin-T stage {stage}", batch, (side, side), (7, 7), (shift, shift), heads, 32)


CASES = [
    *(swin_t(8, stage) for stage in (1, 2, 3, 4)),
    *(swin_t(1, stage) for stage in (1, 2, 3, 4)),
    Case("SwinV2-T 256² stage 1, window 8", 4, (64, 64), (8, 8), (4, 4), 3, 32, cosine=True),
    Case("SwinV2-T 256² stage 1, window 16", 2, (64, 64), (16, 16), (8, 8), 3, 32, cosine=True),
    Case("SwinUNETR 96³ stage 1, window 7³", 1, (28, 28, 28), (7, 7, 7), (3, 3, 3), 3, 16),
]
GPU_CASES = [
    *(swin_t(128, stage) for stage in (1, 2, 3, 4)),
    *(swin_t(128, stage, shifted=False) for stage in (1, 2, 3)),
    Case("SwinV2-T 256² stage 1, window 16", 128, (64, 64), (16, 16), (8, 8), 3, 32, cosine=True),
    Case("Video Swin-T stage 1, window 8x7x7", 4, (16, 56, 56), (8, 7, 7), (4, 3, 3), 3, 32),
    Case("SwinUNETR 96³ stage 1, window 7³", 4, (48, 48, 48), (7, 7, 7), (3, 3, 3), 3, 16),
]
