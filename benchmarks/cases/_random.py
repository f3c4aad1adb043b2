"""The random tensors of a case."""

import torch


def tensors(
    dtype: torch.dtype, device: str, grad: bool, seed: int = 0, **shapes: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    """One normal tensor per shape, drawn in float32 in the order given."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: t.to(dtype).to(device).requires_grad_(grad) for name, t in made.items()}


def moved(rows: float, width: int, dtype: torch.dtype, more: float = 0.0) -> float:
    """Bytes of `rows` rows of `width` elements, and `more`."""
    return float(rows * width * (torch.finfo(dtype).bits // 8) + more)
