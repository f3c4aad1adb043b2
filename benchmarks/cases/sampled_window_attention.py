"""Sampled window attention as VSA and RVSA call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.bias import RelativePosition

from ._random import moved, tensors

BASELINES = ("grid_sample", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so. Every head has places of its own, `groups` of them."""

    model: str
    batch: int
    size: tuple[int, int]
    heads: int
    dim: int
    window: int = 7
    groups: int = 1

    def __str__(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        height, width = self.size
        return f"{self.model}, {height}x{width}, window {self.window}, H={self.heads}, D={self.dim}{groups}, batch {self.batch}"

    @property
    def counts(self) -> tuple[int, int]:
        height, width = self.size
        return -(-height // self.window), -(-width // self.window)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shape, (rows, columns), w = (self.batch, *self.size, self.heads, self.dim), self.counts, self.window
        made = tensors(dtype, device, grad, q=shape, k=shape, v=shape)
        groups = self.heads * self.groups
        predicted = (self.batch, rows, columns, 1, groups, 2)
        table = ((2 * w - 1) ** 2, self.heads)
        drawn = tensors(torch.float32, device, False, 1, offset=predicted, scale=predicted, table=table)
        y, x = torch.arange(rows) * w + (w - 1) / 2, torch.arange(columns) * w + (w - 1) / 2
        centre = torch.stack((x.expand(rows, -1), y[:, None].expand(-1, columns)), -1)[:, :, None, None].to(device)
        along = torch.arange(w) - (w - 1) / 2
        local = torch.stack((along.repeat(w), along.repeat_interleave(w)), -1)[:, None].to(device)
        coords = centre + local * (1 + 0.3 * drawn["scale"]) + 3.0 * drawn["offset"]  # windows that move by some cells
        made["coords"] = coords.requires_grad_(grad)
        made["table"] = (0.02 * drawn["table"]).requires_grad_(grad)
        return made

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> Tensor:
        given = (inputs[name] for name in "qkv")
        return vitkern.sampled_window_attention(
            *given, self.window, inputs["coords"], bias=RelativePosition(inputs["table"]), backend=backend
        )  # fmt: skip

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: q, k, v and places read, out written; backward reads these and dout and writes four gradients. Operations: two
        products of queries and samples and four corners of keys and values; the backward computes them again, and twice as many."""
        samples = float(self.batch * self.counts[0] * self.counts[1] * self.window**2 * self.heads)
        rows = 4 * self.batch * self.size[0] * self.size[1] * self.heads
        flops = samples * self.dim * (4.0 * self.window**2 + 16.0)
        return {
            "bytes": moved(
                rows * 11 / 4 if backward else rows, self.dim, dtype, samples * self.groups * (24 if backward else 8)
            ),
            "flops": flops * (4.5 if backward else 1),
            "exps": samples * self.window**2 * (2 if backward else 1),
        }


CASES = [
    Case("VSA-Swin-T stage 1", 8, (56, 56), 3, 32),
    Case("VSA-Swin-T stage 3", 8, (14, 14), 12, 32),
    Case("RVSA ViT-B, 512x512", 2, (32, 32), 12, 64),
]
GPU_CASES = [Case("VSA-Swin-T stage 1", 64, (56, 56), 3, 32), Case("RVSA ViT-B, 896x896", 8, (56, 56), 12, 64)]
