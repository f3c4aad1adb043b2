"""What people run today instead of sampled_window_attention: the samples of all heads by grid_sample, stored, then a softmax."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.bias import RelativePosition

from ..cases.sampled_window_attention import Case


def grid_sample(inputs: dict[str, Any], case: Case) -> Tensor:
    """The steps of ViTAE-VSA behind its projections; the places have the dtype of k."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    batch, height, width, heads, dim = q.shape
    (rows, columns), w, parts = case.counts, case.window, case.groups
    padded = (rows * w, columns * w)
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, padded[1] - width, 0, padded[0] - height)) for t in (q, k, v))
    sides = inputs["coords"].new_tensor([padded[1] - 1, padded[0] - 1])
    grid = (2 * inputs["coords"] / sides - 1).to(k.dtype)  # [B, rows, columns, w w, heads parts, 2]
    grid = grid.permute(0, 4, 1, 2, 3, 5).reshape(batch * heads * parts, rows * columns, w * w, 2)
    k, v = (
        F.grid_sample(
            t.permute(0, 3, 4, 1, 2).reshape(batch * heads * parts, dim // parts, *padded),
            grid,
            padding_mode="zeros",
            align_corners=True,
        )
        for t in (k, v)
    )  # [B heads parts, dim / parts, windows, w w]
    k, v = (t.reshape(batch, heads, dim, rows * columns, w * w).permute(0, 3, 1, 4, 2) for t in (k, v))
    q = (
        q.reshape(batch, rows, w, columns, w, heads, dim)
        .permute(0, 1, 3, 5, 2, 4, 6)
        .reshape(batch, -1, heads, w * w, dim)
    )
    index = RelativePosition(inputs["table"]).rows((w, w), q.device)
    scores = q @ k.mT * dim**-0.5 + inputs["table"][index.long()].permute(2, 0, 1).to(q.dtype)
    out = (scores.softmax(-1) @ v).reshape(batch, rows, columns, heads, w, w, dim)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, *padded, heads, dim)[:, :height, :width]


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    run = torch.compile(grid_sample, dynamic=False) if name == "compiled" else grid_sample
    return lambda inputs: run(inputs, case)
