"""Multi-scale linear attention of EfficientViT."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.linear_attention import linear_attention


class _Projection(nn.Module):
    """A 1x1 convolution, normalised over the batch where `norm`."""

    def __init__(self, inputs: int, outputs: int, bias: bool, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.norm = nn.BatchNorm2d(outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class LiteMLA(nn.Module):
    """Linear attention of EfficientViT (Cai et al. 2023) on a map ``[B, C, H, W]``, to ``[B, out_channels, H, W]``.

    Queries, keys and values, and depthwise aggregates of them at every scale, are heads of one linear attention with ReLU
    features. Parameters are those of ``LiteMLA`` in mit-han-lab/efficientvit and in timm, ``models/efficientvit_mit.py`` (2023 to
    2026): ``qkv.conv``, ``aggreg.i.0``, ``aggreg.i.1``, ``proj.conv``, ``proj.norm``.

    Args:
        in_channels, out_channels: channels.
        heads: heads of one scale; None: ``in_channels // dim``.
        dim: channels of a head.
        scales: sides of the depthwise kernels.
        eps: 1e-15 in the original repository, 1e-5 in timm.
        use_bias: of the projection to q, k, v and the aggregates, and of the output projection.

    Raises:
        ValueError: x is not ``[B, C, H, W]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        dim: int = 8,
        scales: tuple[int, ...] = (5,),
        eps: float = 1e-15,
        use_bias: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        self.in_channels, self.dim, self.eps = in_channels, dim, eps
        self.heads = heads or in_channels // dim
        width = 3 * self.heads * dim
        self.qkv = _Projection(in_channels, width, use_bias[0], norm=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, scale, padding=scale // 2, groups=width, bias=use_bias[0]),
                nn.Conv2d(width, width, 1, groups=3 * self.heads, bias=use_bias[0]),
            )
            for scale in scales
        )
        self.proj = _Projection(self.heads * dim * (1 + len(scales)), out_channels, use_bias[1], norm=True)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", self.in_channels, "H", "W")
        qkv = self.qkv(x)
        return self.proj(multi_scale([qkv, *(op(qkv) for op in self.aggreg)], self.dim, self.eps))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, heads={self.heads}, dim={self.dim}, eps={self.eps}"


def multi_scale(scales: list[Tensor], dim: int, eps: float) -> Tensor:
    """Linear attention of maps ``[B, heads 3 dim, H, W]``, q, k and v of a head side by side; their heads one after the other,
    ``[B, heads dim, H, W]``."""
    heads = torch.cat(scales, 1).unflatten(1, (-1, 3 * dim))  # [B, heads, 3 dim, H, W]
    # Not N = H W tokens: where sides are symbols, H is not N / W to every compiler.
    q, k, v = heads.permute(0, 3, 4, 1, 2).chunk(3, -1)  # [B, H, W, heads, dim]
    return linear_attention(q, k, v, preset="efficientvit", eps=eps).flatten(3).permute(0, 3, 1, 2)
