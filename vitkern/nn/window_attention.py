"""Window attention of a map, as one module: projection, (shifted) windows, projection. Swin and Swin V2."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition, offset_index
from vitkern.cosine import CosineScore
from vitkern.nn import _checks
from vitkern.ops.window_attention import window_attention_qkvpacked


def _sides(value: int | tuple[int, ...], axes: int = 2) -> tuple[int, ...]:
    """One int per axis of the map; an int alone means a square window."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


class _Windows(nn.Module):
    """What both generations have: sides, heads, dropouts, the output projection and the index buffer."""

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, ...],
        num_heads: int,
        attn_drop: float,
        proj_drop: float,
        shift_size: int | tuple[int, ...],
        pad_order: str,
    ) -> None:
        super().__init__()
        _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.pad_order = dim, num_heads, pad_order
        self.window_size = _sides(window_size)
        self.shift_size = _sides(shift_size, len(self.window_size))
        if len(self.shift_size) != len(self.window_size) or not all(
            0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)
        ):
            raise ValueError(
                f"{type(self).__name__}: shift_size must be at least 0 and less than window_size "
                f"{list(self.window_size)}, got {shift_size!r}"
            )
        index = offset_index(self.window_size, "query-key", torch.device("cpu")).long()
        self.register_buffer("relative_position_index", index)  # of the checkpoint: the op computes the same
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _heads(self, x: Tensor) -> Tensor:
        """[..., n C] as [..., n, heads, head_dim], or [heads, head_dim] for n = 1."""
        return x.unflatten(-1, (-1, self.num_heads, self.dim // self.num_heads))

    def extra_repr(self) -> str:
        shift = f", shift_size={self.shift_size}" if any(self.shift_size) else ""
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}{shift}"


class WindowAttention(_Windows):
    r"""Attention of Swin (Liu et al. 2021, eq. 4) on a map ``[B, *spatial, C]``; returns a map of the same shape.

    ``proj(softmax(scale q k^T + table[index] + (-100 where a shift joined far regions)) v)`` in every window.
    Parameters and buffers are those of ``WindowAttention`` in microsoft/Swin-Transformer,
    ``models/swin_transformer.py`` (2021 to 2024): ``relative_position_bias_table [prod(2 w - 1), heads]``,
    ``relative_position_index [N, N]`` int64, ``qkv``, ``proj``. There the block pads nothing, and shrinks a window
    that exceeds the map; here a map of any size is padded with zeros before ``qkv``, as in timm and torchvision, and
    the window stays.

    Args:
        dim: channels C.
        window_size: tokens per axis; an int is a square window on a 2-D map.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of the scores; None means ``(dim / num_heads) ** -0.5``, 0.0 means zero.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        shift_size: cyclic shift per axis, less than the window.
        pad_order: ``"pad_roll"`` (torchvision, transformers) or ``"roll_pad"`` (timm).
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, ...],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shift_size: int | tuple[int, ...] = 0,
        pad_order: str = "pad_roll",
    ) -> None:
        super().__init__(dim, window_size, num_heads, attn_drop, proj_drop, shift_size, pad_order)
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        rows = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        pads = (None, None) if self.qkv.bias is None else tuple(self._heads(self.qkv.bias)[1:])
        x = window_attention_qkvpacked(
            self._heads(self.qkv(x)),
            self.window_size,
            self.shift_size,
            bias=RelativePosition(self.relative_position_bias_table),
            scale=self.scale,
            pad_order=self.pad_order,
            pad_kv=pads,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(x.flatten(-2)))

    if TYPE_CHECKING:
        __call__ = forward


class WindowAttentionV2(_Windows):
    r"""Attention of Swin V2 (Liu et al. 2022, eq. 2 and 3) on a map ``[B, *spatial, C]``; returns a map of that shape.

    ``proj(softmax(exp(min(tau, log 100)) cos(q, k) + bias + (-100 where a shift joined far regions)) v)`` with
    ``bias = 16 sigmoid(MLP(c))[index]`` and ``c = sign(d) log2(1 + 8 |d| / (w - 1)) / 3`` for the offsets d of an axis,
    w its window or, where given, its pretrained one. Parameters and buffers are those of ``WindowAttention`` in
    microsoft/Swin-Transformer, ``models/swin_transformer_v2.py`` (2022 to 2024): ``logit_scale [heads, 1, 1]`` (tau),
    ``cpb_mlp.0`` and ``cpb_mlp.2``, ``relative_coords_table [1, *(2 w - 1), axes]``, ``relative_position_index [N, N]``
    int64, ``qkv`` without bias, ``q_bias``, ``v_bias``, ``proj``. A side of one token, 0/0 in that file, has c = 0.
    Maps are padded as in :class:`WindowAttention`.

    Args:
        dim: channels C.
        window_size: tokens per axis; an int is a square window on a 2-D map.
        num_heads: heads; divides dim.
        qkv_bias: whether there are ``q_bias`` and ``v_bias``.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        pretrained_window_size: the window of pre-training, for c; 0 means window_size.
        shift_size: cyclic shift per axis, less than the window.
        pad_order: ``"pad_roll"`` (torchvision, transformers) or ``"roll_pad"`` (timm).
    """

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, ...],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | tuple[int, ...] = (0, 0),
        shift_size: int | tuple[int, ...] = 0,
        pad_order: str = "pad_roll",
    ) -> None:
        super().__init__(dim, window_size, num_heads, attn_drop, proj_drop, shift_size, pad_order)
        axes = len(self.window_size)
        self.pretrained_window_size = _sides(pretrained_window_size, axes)
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(axes, 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.register_buffer("relative_coords_table", _log_offsets(self.window_size, self.pretrained_window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = v_pad = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
            v_pad = self._heads(self.v_bias)[0]
        x = window_attention_qkvpacked(
            self._heads(nn.functional.linear(x, self.qkv.weight, bias)),
            self.window_size,
            self.shift_size,
            bias=RelativePosition(16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).flatten(0, -2))),
            cosine=CosineScore(self.logit_scale, max=math.log(100.0)),
            pad_order=self.pad_order,
            pad_kv=(None, v_pad),
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(x.flatten(-2)))

    if TYPE_CHECKING:
        __call__ = forward


def _log_offsets(window: tuple[int, ...], pretrained: tuple[int, ...]) -> Tensor:
    """The log-spaced offsets of Swin V2, [1, *(2 w - 1), axes]; the farthest offset of a window is log2(9) / 3."""
    of_axis = []
    for w, before in zip(window, pretrained, strict=True):
        d = torch.arange(1.0 - w, w) / max((before or w) - 1, 1) * 8.0  # [2 w - 1]
        of_axis.append(d.sign() * (d.abs() + 1.0).log2() / 3.0)
    return torch.stack(torch.meshgrid(*of_axis, indexing="ij"), -1)[None]
