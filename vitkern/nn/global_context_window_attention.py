"""Window attention of GC ViT as one module."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.nn import _checks
from vitkern.nn.window_attention import _sides
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked


class _Table(nn.Module):
    """Swin's table of offsets."""

    def __init__(self, window: tuple[int, ...], heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(math.prod(2 * w - 1 for w in window), heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class GlobalContextWindowAttention(nn.Module):
    r"""Local or global attention (GC ViT, Hatamizadeh et al. 2023, eq. 3 to 5) of a map ``[B, H, W, C]``; returns such a map.

    ``proj(softmax(scale q k^T + table[index]) v)`` in every window. With ``use_global`` the queries ``[B, *window_size, C]`` are
    given, the same in all windows of an image. Parameters are those of ``WindowAttentionGlobal`` in timm, ``models/gcvit.py`` (2022
    to 2026): ``qkv`` (with ``use_global`` of keys and values alone), ``rel_pos.relative_position_bias_table``, ``proj``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        window_size: sides of a window, which divide those of the map; an int is a square.
        use_global: whether the queries are given.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, windows do not divide the map, or x and q_global are not of the shapes above.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | tuple[int, int],
        use_global: bool = True,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.use_global = dim, num_heads, use_global
        self.window_size = _sides(window_size)
        self.rel_pos = _Table(self.window_size, num_heads)
        self.qkv = nn.Linear(dim, (2 if use_global else 3) * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        _checks.windows(self, self.window_size, x)
        bias = RelativePosition(self.rel_pos.relative_position_bias_table)
        options: dict[str, Any] = {"bias": bias, "dropout_p": self.attn_drop.p if self.training else 0.0}
        projected = self.qkv(x).unflatten(-1, (-1, self.num_heads, self.head_dim))
        if self.use_global:
            if q_global is None:
                raise ValueError("GlobalContextWindowAttention: q_global must be given with use_global, got None")
            _checks.shape(self, "q_global", q_global, len(x), *self.window_size, self.dim)
            q = q_global.unflatten(-1, (self.num_heads, self.head_dim))
            k, v = projected.unbind(-3)
            out = window_attention(q, k, v, self.window_size, shared_q=True, **options)
        else:
            out = window_attention_qkvpacked(projected, self.window_size, **options)
        return self.proj_drop(self.proj(out.flatten(-2)))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, use_global={self.use_global}"
        )
