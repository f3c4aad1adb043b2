"""Integers on a device, copied there once: a copy from the host waits for it, and CUDA graphs cannot capture it."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def constant(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[n]``."""
    return (_kept if _lasts() else _made)(tuple(values), device)


def _lasts() -> bool:
    """Whether a tensor made now outlives the graph, the transform or the mode that sees it made."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None


def _made(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _kept(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        return _made(values, device)
