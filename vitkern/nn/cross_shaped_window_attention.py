"""Cross-shaped window attention of CSWin as one module."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.window_attention import window_attention_qkvpacked
from vitkern.value import DepthwiseValue


class _Stripes(nn.Module):
    """The convolution that one branch adds to its values."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class CrossShapedWindowAttention(nn.Module):
    r"""Cross-shaped window attention (CSWin, Dong et al. 2022, eq. 4 to 7) of a map ``[B, H, W, C]``; returns such a map.

    One half of the heads attends in columns of ``split_size`` tokens over the whole height, the other in rows of the whole width:
    ``proj(softmax(scale q k^T) v + conv(v))``, a depthwise convolution with zeros around each stripe. Parameters are those of
    ``CSWinBlock`` in microsoft/CSWin-Transformer, ``models/cswin.py`` (2021 to 2023): ``qkv``, ``attns.0.get_v``,
    ``attns.1.get_v``, ``proj``. A map that stripes do not divide is padded with zeros after the projection, half of them in front,
    as in that repository's ``segmentation/backbone``; they take part.

    Args:
        dim: channels C.
        num_heads: heads; divides dim, and is even but in the last stage.
        split_size: width of a stripe.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of the scores; None means ``(dim / num_heads) ** -0.5``, 0.0 means zero. Weights of the first release need
            their own.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        last_stage: one branch, whose stripe is the whole map.

    Raises:
        ValueError: num_heads does not divide dim or the heads are not even, or x is not ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int = 7,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        last_stage: bool = False,
    ) -> None:
        super().__init__()
        _checks.side(self, "split_size", split_size)
        self.head_dim = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.split_size = dim, num_heads, split_size
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.windows = [(None, None)] if last_stage else [(None, split_size), (split_size, None)]
        branches = len(self.windows)
        if num_heads % branches:
            raise ValueError(f"CrossShapedWindowAttention: num_heads must be even, got {num_heads}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attns = nn.ModuleList(_Stripes(dim // branches) for _ in self.windows)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        found = []
        for branch, window, part in zip(self.attns, self.windows, qkv.chunk(len(self.windows), -2), strict=True):
            top, left = (0 if w is None else -length % w // 2 for w, length in zip(window, x.shape[1:3], strict=True))
            if top or left:  # the op itself pads behind
                part = nn.functional.pad(part, (0, 0, 0, 0, 0, 0, left, 0, top, 0))
            out = window_attention_qkvpacked(
                part,
                window,
                scale=self.scale,
                pad_kv="zero",
                lepe=DepthwiseValue(branch.get_v.weight, branch.get_v.bias, scope="window"),  # type: ignore[union-attr, arg-type]
                dropout_p=self.attn_drop.p if self.training else 0.0,
            )
            found.append(out[:, top:, left:])
        return self.proj_drop(self.proj(torch.cat(found, -2).flatten(-2)))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, split_size={self.split_size}, branches={len(self.windows)}"
