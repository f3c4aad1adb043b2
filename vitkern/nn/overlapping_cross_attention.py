"""Overlapping cross-attention of HAT as one module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.nn import _checks
from vitkern.ops.window_attention import window_attention


class OverlappingCrossAttention(nn.Module):
    r"""Overlapping cross-attention (HAT, Chen et al. 2023, section 3.2) of a map ``[B, H, W, C]``; returns a map of the same shape.

    The queries of a window see the keys of a window ``1 + overlap_ratio`` times as wide around it:
    ``proj(softmax(scale q k^T + table[index]) v)``. Cells beyond the map are zero keys and values that take part, with their bias.
    Parameters are those of ``OCAB`` in XPixelGroup/HAT, ``hat/archs/hat_arch.py`` (2022 to 2023): ``qkv``,
    ``relative_position_bias_table [(w + W - 1) ** 2, heads]``, ``proj``. There the rows of many pairs are negative and
    count from the table's end; here too. The model pads its image, so that windows divide every map; others are padded with the
    same zeros here.

    Args:
        dim: channels C.
        window_size: side w of a window of queries.
        overlap_ratio: how much wider a window of keys is: its side W is ``w + int(w overlap_ratio)``.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of the scores; None means ``(dim / num_heads) ** -0.5``, 0.0 means zero.

    Raises:
        ValueError: num_heads does not divide dim, the two windows differ by an odd number, or x is not ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        overlap_ratio: float,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.window_size = dim, num_heads, window_size
        self.overlap_win_size = window_size + int(window_size * overlap_ratio)
        if (self.overlap_win_size - window_size) % 2:
            raise ValueError(
                f"OverlappingCrossAttention: int(window_size * overlap_ratio) must be even, "
                f"got {self.overlap_win_size - window_size}"
            )
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        rows = (window_size + self.overlap_win_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        index = _wrapped_index(window_size, self.overlap_win_size)
        self.register_buffer("relative_position_index", index, persistent=False)  # there, the model has it
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        out = window_attention(
            q,
            k,
            v,
            self.window_size,
            bias=RelativePosition(self.relative_position_bias_table, self.relative_position_index),  # type: ignore[arg-type]
            scale=self.scale,
            context_size=self.overlap_win_size,
            pad_kv="zero",
        )
        return self.proj(out.flatten(-2))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        sides = f"window_size={self.window_size}, overlap_win_size={self.overlap_win_size}"
        return f"dim={self.dim}, num_heads={self.num_heads}, {sides}"


def _wrapped_index(window: int, halo: int) -> Tensor:
    """HAT's row of every pair, int32 [w w, W W]: ``key - query + w - W + 1`` on each axis, negative rows counted from the end."""
    offset = torch.arange(halo)[None, :] - torch.arange(window)[:, None] + window - halo + 1  # [w, W]
    side = window + halo - 1
    rows = offset[:, None, :, None] * side + offset[None, :, None, :]  # [w, w, W, W]
    return (rows % side**2).reshape(window**2, halo**2).to(torch.int32)
