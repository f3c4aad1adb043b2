"""What people run today instead of deformable_attention where the CUDA op is not built: grid_sample, level by level."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.deformable_attention import Case


def grid_sample(inputs: dict[str, Any], case: Case) -> Tensor:
    """The function of transformers' Deformable DETR, RT-DETR and Mask2Former; its locations have the dtype of the value."""
    value = inputs["value"]
    batch, _, heads, dim = value.shape
    grids = 2 * inputs["locations"].to(value.dtype) - 1
    sampled = []
    for level, (part, (h, w)) in enumerate(
        zip(value.split([h * w for h, w in case.shapes], 1), case.shapes, strict=True)
    ):
        image = part.flatten(2).transpose(1, 2).reshape(batch * heads, dim, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = inputs["weights"].to(value.dtype).transpose(1, 2)
    weights = weights.reshape(batch * heads, 1, case.count, len(case.shapes) * case.points)
    out = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1).view(batch, heads, dim, case.count)
    return out.permute(0, 3, 1, 2).contiguous()


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    run = torch.compile(grid_sample, dynamic=False) if name == "compiled" else grid_sample
    return lambda inputs: run(inputs, case)
