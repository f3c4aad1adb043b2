"""Neighbourhood attention of NAT and DiNAT as modules."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.neighborhood_attention import neighborhood_attention, neighborhood_av, neighborhood_qk


class NeighborhoodAttention(nn.Module):
    """Neighbourhood attention (NAT, Hassani et al. 2023) of a map ``[B, H, W, C]``; returns a map of the same shape.

    Parameters are those of ``NeighborhoodAttention2D`` of SHI-Labs/Neighborhood-Attention-Transformer (2023): ``qkv``, ``rpb``
    ``[heads, 2 K - 1, 2 K - 1]``, ``proj``. A map smaller than K times dilation is padded with zeros at its right and bottom before
    the projection, as there.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        kernel_size: K, keys per axis.
        dilation: steps between the keys.
        qkv_bias: whether ``qkv`` has a bias.
        rel_pos_bias: whether there is ``rpb``.
        attn_drop: dropout of the weights, in training; where it acts the weights are stored.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int = 1,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        _checks.side(self, "kernel_size", kernel_size)
        self.head_dim = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.kernel_size, self.dilation = dim, num_heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        height, width = x.shape[1:3]
        least = self.kernel_size * self.dilation
        if min(height, width) < least:
            x = nn.functional.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        drop = self.attn_drop if self.training and self.attn_drop.p else None
        out, _ = neighborhood(q, k, v, self.rpb, self.kernel_size, self.dilation, drop)
        return self.proj_drop(self.proj(out[:, :height, :width].flatten(-2)))

    if TYPE_CHECKING:
        __call__ = forward


class DilatedNeighborhoodAttention(NeighborhoodAttention):
    """:class:`NeighborhoodAttention` with a dilation that must be given (DiNAT, Hassani and Shi 2022)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, **options: object) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation, **options)  # type: ignore[arg-type]


def neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    kernel_size: int,
    dilation: int,
    drop: nn.Module | None = None,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Neighbourhood attention of maps ``[B, H, W, heads, head_dim]``, and its weights ``[B, H, W, heads, n]`` where they are
    asked for or must be stored, since `drop` acts on them."""
    if drop is None and not weights:
        return neighborhood_attention(q, k, v, kernel_size, dilation=dilation, rpb=rpb), None  # type: ignore[return-value]
    found = neighborhood_qk(q, k, kernel_size, dilation=dilation, rpb=rpb).softmax(-1)
    found = found if drop is None else drop(found)
    return neighborhood_av(found.to(v.dtype), v, kernel_size, dilation=dilation), found
