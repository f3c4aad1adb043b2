"""Multi-axis attention of MaxViT as one module: attention in windows, then on grids, each with its MLP."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.nn import _checks
from vitkern.nn.window_attention import _sides
from vitkern.ops.window_attention import window_attention_qkvpacked


class _Offsets(nn.Module):
    """A table of offsets: TensorFlow's ``[heads, 2 h - 1, 2 w - 1]``, key minus query, or Swin's ``[rows, heads]``."""

    def __init__(self, window: tuple[int, ...], heads: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        sides = [2 * w - 1 for w in window]
        table = torch.zeros(heads, *sides) if kind == "bias_tf" else torch.zeros(math.prod(sides), heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def bias(self) -> RelativePosition:
        table = self.relative_position_bias_table
        if self.kind == "bias_tf":
            return RelativePosition(table.flatten(1).t(), sign="key-query")
        return RelativePosition(table)


class _Attention(nn.Module):
    """Projection, attention in windows of neighbours or of tokens far apart, projection."""

    def __init__(
        self,
        dim: int,
        window: tuple[int, ...],
        partition: str,
        dim_head: int,
        rel_pos: str,
        head_first: bool,
        drop: float,
    ) -> None:
        super().__init__()
        self.window, self.partition, self.dim_head, self.head_first = window, partition, dim_head, head_first
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rel_pos = _Offsets(window, dim // dim_head, rel_pos)
        self.attn_drop = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.head_first:
            qkv = self.qkv(x).unflatten(-1, (-1, 3, self.dim_head)).transpose(-3, -2)
        else:
            qkv = self.qkv(x).unflatten(-1, (3, -1, self.dim_head))
        out = window_attention_qkvpacked(
            qkv,
            self.window,
            bias=self.rel_pos.bias(),
            partition=self.partition,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj(out.flatten(-2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Partition(nn.Module):
    """One attention and its MLP, each beside the identity."""

    def __init__(self, attention: _Attention, dim: int, mlp_ratio: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MultiAxisAttention(nn.Module):
    r"""Multi-axis attention (MaxViT, Tu et al. 2022, section 3.2) of a map ``[B, H, W, C]``; returns a map of the same shape.

    Attention in windows, then on grids: of n grids along an axis, grid i has the tokens i, i + n, i + 2 n. Each is
    ``x + proj(softmax(scale q k^T + table[index]) v)`` of the normalised x and is followed by an MLP. Parameters are those of
    ``MaxxVitBlock`` in timm, ``models/maxxvit.py`` (2022 to 2026), without its convolutions: ``attn_block.norm1``,
    ``attn_block.attn.qkv``, ``attn_block.attn.rel_pos.relative_position_bias_table``, ``attn_block.attn.proj``,
    ``attn_block.norm2``, ``attn_block.mlp.fc1``, ``attn_block.mlp.fc2`` and the same of ``attn_grid``.

    Args:
        dim: channels C.
        window_size: sides of a window, which divide those of the map; an int is a square.
        grid_size: tokens of a grid per axis, likewise; None means window_size.
        dim_head: channels of a head; divides dim.
        mlp_ratio: hidden channels of the MLPs over dim.
        rel_pos: ``"bias_tf"``, tables ``[heads, 2 h - 1, 2 w - 1]`` of key minus query (the paper's), or ``"bias"``, Swin's.
        head_first: whether a head's q, k and v lie side by side in ``qkv`` (timm's own weights; the paper's have all q first).
        attn_drop: dropout of the attention weights, in training.
        norm_eps: epsilon of the norms; timm's is 1e-6, that of the paper's weights 1e-5.

    Raises:
        ValueError: dim_head does not divide dim, windows or grids do not divide the map, or x is not ``[B, H, W, C]``.
    """

    attn_block: nn.Module
    attn_grid: nn.Module

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int] = 7,
        grid_size: int | tuple[int, int] | None = None,
        dim_head: int = 32,
        mlp_ratio: float = 4.0,
        rel_pos: str = "bias_tf",
        head_first: bool = False,
        attn_drop: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dim % dim_head:
            raise ValueError(f"MultiAxisAttention: dim_head must divide dim ({dim}), got {dim_head}")
        _checks.one_of(self, "rel_pos", rel_pos, ("bias_tf", "bias"))
        self.dim, self.window_size = dim, _sides(window_size)
        self.grid_size = self.window_size if grid_size is None else _sides(grid_size)
        for partition, window in (("block", self.window_size), ("grid", self.grid_size)):
            attention = _Attention(dim, window, partition, dim_head, rel_pos, head_first, attn_drop)
            self.add_module(f"attn_{partition}", _Partition(attention, dim, mlp_ratio, norm_eps))

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        for window in (self.window_size, self.grid_size):
            _checks.windows(self, window, x)
        return self.attn_grid(self.attn_block(x))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, grid_size={self.grid_size}"
