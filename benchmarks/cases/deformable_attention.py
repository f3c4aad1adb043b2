"""Deformable attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitkern

from ._random import moved, tensors

BASELINES = ("grid_sample", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so. In an encoder (queries = 0) every cell is a query and looks around itself; in a
    decoder every query looks around a place of its own."""

    model: str
    batch: int
    shapes: tuple[tuple[int, int], ...]
    queries: int = 0
    points: int = 4
    heads: int = 8
    dim: int = 32

    def __str__(self) -> str:
        sizes = ", ".join(f"{h}x{w}" for h, w in self.shapes)
        return (
            f"{self.model}, {sizes}, N={self.count}, P={self.points}, H={self.heads}, D={self.dim}, batch {self.batch}"
        )

    @property
    def cells(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def count(self) -> int:
        return self.queries or self.cells

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        made = tensors(dtype, device, grad, value=(self.batch, self.cells, self.heads, self.dim))
        rows = (self.batch, self.count, self.heads, len(self.shapes), self.points)
        drawn = tensors(torch.float32, device, False, 1, offsets=(*rows, 2), logits=rows)
        if self.queries:
            centers = torch.rand(self.batch, self.count, 1, 1, 1, 2, generator=torch.Generator().manual_seed(2)).to(
                device
            )
        else:
            own = [
                torch.stack(torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij"), -1)
                for h, w in self.shapes
            ]
            centers = torch.cat([c.flatten(0, 1) for c in own]).flip(-1)[:, None, None, None].to(device)
        sides = torch.tensor(self.shapes, device=device).flip(-1)[:, None]
        weights = drawn["logits"].flatten(3).softmax(-1).view(rows)
        made["locations"] = (centers + 3.0 * drawn["offsets"] / sides).requires_grad_(grad)
        made["weights"] = weights.requires_grad_(grad)
        return made

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> Tensor:
        return vitkern.deformable_attention(
            inputs["value"], self.shapes, inputs["locations"], inputs["weights"], backend=backend
        )

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: value, locations and weights read, out written; backward reads these and dout and writes three gradients.
        Operations: a multiply-add for each channel of four corners; the backward has two more."""
        points = float(self.batch * self.count * self.heads * len(self.shapes) * self.points)
        rows = self.batch * self.heads * (self.cells + self.count)
        again = self.batch * self.heads * (2 * self.cells + self.count)
        return {
            "bytes": moved(rows + again if backward else rows, self.dim, dtype, points * (36 if backward else 12)),
            "flops": 8.0 * points * self.dim * (3 if backward else 1),
            "exps": 0.0,
        }


COCO = ((50, 67), (25, 34), (13, 17), (7, 9))  # an image of 400 x 536
CASES = [  # the oracle of an encoder at 800 x 1072 holds ten gigabytes
    Case("Deformable DETR encoder", 1, COCO),
    Case("Mask2Former pixel decoder", 1, ((64, 64), (32, 32), (16, 16))),
    Case("RT-DETR decoder", 4, ((80, 80), (40, 40), (20, 20)), 300),
]
GPU_CASES = [
    Case("Deformable DETR encoder", 2, ((100, 134), (50, 67), (25, 34), (13, 17))),
    Case("RT-DETR decoder", 16, ((80, 80), (40, 40), (20, 20)), 300),
]
