"""What the modules refuse, in sentences."""

from typing import Any

from torch import Tensor, nn


def side(module: nn.Module, name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{type(module).__name__}: {name} must be an int of at least 1, got {value!r}")


def heads(module: nn.Module, dim: int, num_heads: int) -> int:
    """The channels of one head."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{type(module).__name__}: num_heads must divide dim ({dim}), got {num_heads}")
    return dim // num_heads


def one_of(module: nn.Module, name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{type(module).__name__}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def shape(module: nn.Module, name: str, x: Tensor, *want: int | str) -> None:
    """Refuses a tensor whose sides are others than `want`; a side with a name may be any."""
    sides = tuple(x.shape)
    fits = len(sides) == len(want) and all(isinstance(w, str) or s == w for s, w in zip(sides, want, strict=True))
    if not fits:
        raise ValueError(
            f"{type(module).__name__}: {name} must have shape [{', '.join(map(str, want))}], got {list(sides)}"
        )


def windows(module: nn.Module, window: tuple[int, ...], x: Tensor) -> None:
    """Refuses a map [B, H, W, C] that windows do not divide."""
    if any(length % w for w, length in zip(window, x.shape[1:3], strict=True)):
        raise ValueError(
            f"{type(module).__name__}: windows {list(window)} must divide the map, got {list(x.shape[1:3])}"
        )
