"""visualize: the groups of a plan drawn over the photograph whose patches were merged."""

from typing import Any

import torch
from torch import Tensor

from vitkern.tokens import MergePlan

NAME = "merging.visualize"


def visualize(
    plan: MergePlan,
    picture: Any,
    grid: tuple[int, int],
    *,
    prefix: int = 1,
    sample: int = 0,
    strength: float = 0.7,
    border: int = 1,
) -> Tensor:
    """Every group of merged patches in its mean colour over the picture, with light borders between groups.

    Args:
        plan: from the patches to the groups, as ``report.plan`` of :func:`vitkern.merging.apply` with ``trace=True``.
        picture: ``[H, W, 3]``, 0 to 255: a tensor, an array or a PIL picture; H and W at least those of the grid.
        grid: rows and columns of patches; the plan's tokens are ``prefix + rows * columns``.
        prefix: tokens in front of the patches (class token, registers).
        sample: which sample of the plan.
        strength: of the mean colour over the picture, 0 to 1.
        border: half the width in pixels of the lines between groups; 0 draws none.

    Returns:
        uint8 ``[H, W, 3]``. Patches without a slot (dropped) are black.

    Raises:
        ValueError: grid, picture, sample or strength do not fit; the sentence names it, what it got and what it wanted.
    """
    pixels = picture if isinstance(picture, Tensor) else _pixels(picture)
    if pixels.dim() != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{NAME}: picture must have shape [H, W, 3], got {list(pixels.shape)}")
    height, width, (rows, columns) = *pixels.shape[:2], grid
    batch, tokens = plan.token_map.shape
    if rows < 1 or columns < 1 or prefix < 0 or prefix + rows * columns != tokens:
        raise ValueError(f"{NAME}: grid must hold the plan's {tokens} tokens less prefix={prefix}, got {tuple(grid)}")
    if height < rows or width < columns:
        raise ValueError(f"{NAME}: picture must have a pixel for every patch of {tuple(grid)}, got {height}x{width}")
    if not -batch <= sample < batch:
        raise ValueError(f"{NAME}: sample must lie in the plan's batch of {batch}, got {sample}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"{NAME}: strength must lie in [0, 1], got {strength!r}")
    slots = plan.token_map[sample, prefix:].cpu().long().reshape(rows, columns)  # [rows, columns]
    y = torch.arange(height) * rows // height  # [H] the row of patches of every pixel
    x = torch.arange(width) * columns // width  # [W]
    slot = slots[y][:, x]  # [H, W]
    values = pixels.cpu().float()  # [H, W, 3]
    total = torch.zeros(plan.n_out + 1, 3).index_add(0, slot.flatten(), values.reshape(-1, 3))  # [n_out + 1, 3]
    mean = total / slot.flatten().bincount(minlength=plan.n_out + 1).clamp(min=1)[:, None]  # [n_out + 1, 3]
    shown = values + strength * (mean[slot] - values)  # [H, W, 3]
    shown[slot == plan.n_out] = 0.0
    shown[_borders(slot, border)] = 255.0
    return shown.round().clamp(0, 255).to(torch.uint8)


def _pixels(picture: Any) -> Tensor:
    import numpy

    return torch.from_numpy(numpy.array(picture))


def _borders(slot: Tensor, width: int) -> Tensor:
    """Pixels nearer than `width` to one of another group, bool [H, W]."""
    found = torch.zeros_like(slot, dtype=torch.bool)  # [H, W]
    for axis in (0, 1):
        length = slot.shape[axis]
        for step in range(1, min(width, length - 1) + 1):
            differs = slot.narrow(axis, step, length - step) != slot.narrow(axis, 0, length - step)
            found.narrow(axis, step, length - step).logical_or_(differs)
            found.narrow(axis, 0, length - step).logical_or_(differs)
    return found
