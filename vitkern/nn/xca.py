"""Cross-covariance attention of XCiT and EdgeNeXt, and the channel attention of DaViT, as modules."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.channel_attention import channel_attention


class _Channels(nn.Module):
    """What both have: one projection to q, k and v, heads, the output projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads = dim, num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, N, heads, head_dim]."""
        _checks.shape(self, "x", x, "B", "N", self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return q, k, v

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"


class XCA(_Channels):
    """Cross-covariance attention (XCiT, El-Nouby et al. 2021) of tokens ``[B, N, C]``; returns tokens of the same shape.

    The channels of a head attend to each other: ``softmax(temperature q̂ᵀ k̂) v`` with q and k of unit length over the tokens.
    Parameters are those of ``XCA`` in facebookresearch/xcit and timm and of timm's ``CrossCovarianceAttn`` (EdgeNeXt): ``qkv``,
    ``temperature [heads, 1, 1]``, ``proj``. There is no dropout of the weights.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, N, C]``.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, proj_drop: float = 0.0) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        self.temperature = nn.Parameter(self.qkv.weight.new_ones(num_heads, 1, 1))
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_attention(*self._split(x), temperature=self.temperature)
        return self.proj_drop(self.proj(out.flatten(2)))

    if TYPE_CHECKING:
        __call__ = forward


class ChannelAttention(_Channels):
    """Channel attention of DaViT (Ding et al. 2022) of tokens ``[B, N, C]``; returns tokens of the same shape.

    ``version=1``: ``softmax(kᵀ v / √head_dim) qᵀ``, as in the first release; ``version=2``: ``softmax(qᵀ k s) vᵀ`` with
    ``s = 1 / √N``, or ``1 / √head_dim`` without `dynamic_scale` (Florence-2). Parameters are those of ``ChannelAttention`` and
    ``ChannelAttentionV2`` in timm, ``models/davit.py``: ``qkv``, ``proj``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        version: 1 or 2.
        dynamic_scale: of version 2.

    Raises:
        ValueError: num_heads does not divide dim, version is neither 1 nor 2, or x is not ``[B, N, C]``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, version: int = 1, dynamic_scale: bool = True
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias)
        if version not in (1, 2):
            raise ValueError(f"ChannelAttention: version must be 1 or 2, got {version!r}")
        self.version, self.dynamic_scale = version, dynamic_scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(x)
        width = x.shape[1] if self.version == 2 and self.dynamic_scale else self.dim // self.num_heads
        if self.version == 1:
            q, k, v = k, v, q
        return self.proj(channel_attention(q, k, v, normalize=False, scale=width**-0.5).flatten(2))

    if TYPE_CHECKING:
        __call__ = forward
