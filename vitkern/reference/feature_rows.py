"""feature_rows: the features of linear attention alone, for sums that are made elsewhere (decays, causality).

    y_n = scale w_n m_n phi(x_n)

All of it is float32 (float64 for float64).
"""

import torch
from torch import Tensor


def feature_rows(
    x: Tensor,  # [B, N, H, D]
    mask: Tensor | None,  # [B, N] bool: the rows that are not 0; what the others hold is not read
    weight: Tensor | None,  # [B, N, H|1]
    feature_map: str,
    rate: float,  # of the map "exp"
    scale: float,
    gpu: str = "",
) -> Tensor:
    """``y [B, N, H, D]``, contiguous."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    hidden = None if mask is None else ~mask[..., None, None]  # [B, N, 1, 1]
    y = features(x if hidden is None else x.masked_fill(hidden, 0.0), feature_map, rate) * scale  # [B, N, H, D]
    if weight is not None:
        w = weight.to(x.dtype)[..., None]  # [B, N, H|1, 1]
        y = y * (w if hidden is None else w.masked_fill(hidden, 0.0))  # [B, N, H, D]
    return (y if hidden is None else y.masked_fill(hidden, 0.0)).contiguous()


def features(x: Tensor, name: str, rate: float) -> Tensor:
    """phi(x) of x [S, N, H, D], for the softmax that of the queries."""
    if name == "relu":
        return x.relu()
    if name == "elu1":
        return x.relu() + x.clamp(max=0).exp()
    if name == "leaky_relu":
        return torch.nn.functional.leaky_relu(x)
    if name == "exp":
        return (rate * x).exp()
    if name == "softmax":
        return x.softmax(-1)
    if name == "silu_norm":
        y = torch.nn.functional.silu(x) + 0.5
        return y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return x
