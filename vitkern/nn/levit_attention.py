"""Attention of LeViT as one module, and the one that halves the map."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition, offset_index
from vitkern.nn import _checks
from vitkern.ops.attention import attention


class _LinearNorm(nn.Module):
    """A projection without bias, normalised over the batch."""

    def __init__(self, inputs: int, outputs: int, weight: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)
        nn.init.constant_(self.bn.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).view_as(x)


class _Levit(nn.Module):
    """What both have: heads, the table of absolute offsets, the output projection."""

    def __init__(
        self,
        dim: int,
        out_dim: int,
        key_dim: int,
        num_heads: int,
        attn_ratio: float,
        resolution: tuple[int, int],
        stride: int,
        out_weight: float,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.key_dim, self.val_dim = dim, num_heads, key_dim, int(attn_ratio * key_dim)
        self.resolution, self.stride = (resolution[0], resolution[1]), stride
        self.proj = nn.Sequential()
        self.proj.add_module("act", nn.Hardswish())
        self.proj.add_module("ln", _LinearNorm(self.val_dim * num_heads, out_dim, out_weight))
        tokens = resolution[0] * resolution[1]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, tokens))
        index = offset_index(self.resolution, "abs", torch.device("cpu"), q_stride=stride).long()
        self.register_buffer("attention_bias_idxs", index, persistent=False)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = RelativePosition(self.attention_biases.t(), grid=self.resolution, sign="abs", q_stride=self.stride)
        return self.proj(attention(q, k, v, bias=bias, scale=self.key_dim**-0.5).flatten(-2))

    def _check(self, x: Tensor) -> None:
        _checks.shape(self, "x", x, "B", self.resolution[0] * self.resolution[1], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, key_dim={self.key_dim}, num_heads={self.num_heads}, resolution={self.resolution}"


class LevitAttention(_Levit):
    """Attention of LeViT (Graham et al. 2021) of the tokens of a grid, ``[B, H W, C]``; returns tokens of the same shape.

    The scores of a head get a bias for every pair of absolute offsets, values are wider than keys, and a hard swish stands
    before the output projection. Parameters are those of ``Attention`` in timm, ``models/levit.py`` (2021 to 2026):
    ``qkv.linear``, ``qkv.bn``, ``proj.ln.linear``, ``proj.ln.bn``, ``attention_biases [heads, H W]``.

    Args:
        dim: channels C.
        key_dim: channels of a head of queries and keys.
        num_heads: heads.
        attn_ratio: channels of a head of values over key_dim.
        resolution: the grid (H, W).

    Raises:
        ValueError: x is not ``[B, H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 2.0,
        resolution: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__(dim, dim, key_dim, num_heads, attn_ratio, resolution, 1, out_weight=0.0)
        self.qkv = _LinearNorm(dim, (2 * key_dim + self.val_dim) * num_heads)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        q, k, v = self._heads(self.qkv(x)).split([self.key_dim, self.key_dim, self.val_dim], -1)
        return self._attend(q, k, v)

    if TYPE_CHECKING:
        __call__ = forward


class LevitAttentionDownsample(_Levit):
    """Attention of LeViT whose queries are every stride-th token of both axes: ``[B, H W, C]`` to ``[B, h w, C']``, h and w
    being ceil(H / stride) and ceil(W / stride).

    Parameters are those of ``AttentionDownsample`` in timm, ``models/levit.py`` (2021 to 2026): ``kv.linear``, ``kv.bn``,
    ``q.ln.linear``, ``q.ln.bn``, ``proj.ln.linear``, ``proj.ln.bn``, ``attention_biases [heads, H W]``.

    Args:
        dim: channels C.
        out_dim: channels C' of the output.
        key_dim: channels of a head of queries and keys.
        num_heads: heads.
        attn_ratio: channels of a head of values over key_dim.
        stride: of the queries.
        resolution: the grid (H, W).

    Raises:
        ValueError: x is not ``[B, H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 2.0,
        stride: int = 2,
        resolution: tuple[int, int] = (14, 14),
    ) -> None:
        super().__init__(dim, out_dim, key_dim, num_heads, attn_ratio, resolution, stride, out_weight=1.0)
        self.kv = _LinearNorm(dim, (key_dim + self.val_dim) * num_heads)
        self.q: Any = nn.Module()
        self.q.ln = _LinearNorm(dim, key_dim * num_heads)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        k, v = self._heads(self.kv(x)).split([self.key_dim, self.val_dim], -1)
        chosen = x.unflatten(1, self.resolution)[:, :: self.stride, :: self.stride].flatten(1, 2)
        return self._attend(self._heads(self.q.ln(chosen)), k, v)

    if TYPE_CHECKING:
        __call__ = forward
