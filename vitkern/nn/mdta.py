"""Channel attention of Restormer between its convolutions, as one module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.channel_attention import channel_attention


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention (Restormer, Zamir et al. 2022) of a map ``[B, C, H, W]``; returns a map of the
    same shape.

    A pointwise and a depthwise 3 x 3 convolution make q, k and v, whose channels attend to each other. Parameters are those of
    ``Attention`` in swz30/Restormer, ``restormer_arch.py`` (2022): ``qkv``, ``qkv_dwconv``, ``temperature [heads, 1, 1]``,
    ``project_out``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        bias: whether the convolutions have biases.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, C, H, W]``.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", self.dim, "H", "W")
        heads = self.qkv_dwconv(self.qkv(x)).unflatten(1, (3, self.num_heads, -1))
        q, k, v = heads.permute(1, 0, 4, 5, 2, 3).unbind(0)  # [B, H, W, heads, head_dim], pixels side by side
        out = channel_attention(q, k, v, temperature=self.temperature)
        return self.project_out(out.permute(0, 3, 4, 1, 2).flatten(1, 2))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"
