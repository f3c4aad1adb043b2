"""How many tokens merge in each layer, and the published choices of destinations as index tensors."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops.bipartite_match import random_places

NAME = "merging.parse_r"


def parse_r(layers: int, r: Any) -> list[int]:
    """r of every layer. An int: constant; ``(r, f)`` with a float f: linear from ``int(r (1 - f))`` to what keeps the
    total (Bolya et al. 2023); a list: as given, padded with 0."""
    if isinstance(r, bool):
        raise TypeError(f"{NAME}: r must be an int, a pair (r, f) or a list of ints, got {r!r}")
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        low = int(r[0] * (1.0 - r[1]))
        high = 2 * r[0] - low
        steps = [low + (high - low) * layer / max(layers - 1, 1) for layer in range(layers)]
        found = [int(step) for step in steps]
    elif isinstance(r, int):
        found = [r] * layers
    elif isinstance(r, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in r):
        if len(r) > layers:
            raise ValueError(f"{NAME}: r must have at most one entry per layer ({layers}), got {len(r)}")
        found = [*r, *[0] * (layers - len(r))]
    else:
        raise TypeError(f"{NAME}: r must be an int, a pair (r, f) or a list of ints, got {r!r}")
    if any(n < 0 for n in found):
        raise ValueError(f"{NAME}: r must be at least 0 in every layer, got {found}")
    return found


def kth_index(tokens: int, k: int, protect: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Every k-th token is a destination, from position ``protect + k - 1``; the rest, the tail included, are sources."""
    if k < 2:
        raise ValueError(f"merging.kth_index: k must be at least 2, got {k}")
    return torch.arange(protect + k - 1, tokens, k, device=device)


def random2d_index(
    grid: tuple[int, int], stride: tuple[int, int] = (2, 2), seed: int = 0, prefix: int = 0, device: Any = "cpu"
) -> Tensor:
    """One random destination in every cell of ``stride`` on ``grid``, whose tokens follow ``prefix`` others."""
    return random_places(grid, stride, seed, torch.device(device)) + prefix


def frame_index(frames: int, tokens: int, kept: list[int], device: torch.device | str = "cpu") -> Tensor:
    """The tokens of the frames ``kept`` of a video of ``frames`` with ``tokens`` each are destinations."""
    if any(not 0 <= f < frames for f in kept):
        raise ValueError(f"merging.frame_index: kept must hold frames in [0, {frames}), got {kept}")
    first = torch.tensor(kept, dtype=torch.int64, device=device)[:, None] * tokens
    return (first + torch.arange(tokens, device=device)).flatten()
