"""Attention of a map under decomposed relative positions, as one module: SAM, ViTDet."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.bias import DecomposedRelativePosition
from vitkern.nn import _checks
from vitkern.nn.attention import Attention


class DecomposedRelPosAttention(Attention):
    """Attention of SAM's encoder and ViTDet (Li et al. 2022; the positions are those of MViTv2, Li et al. 2022, eq. 4) of a map
    ``[B, H, W, C]``; returns a map of the same shape.

    The scores of a query get ``q . rel_pos_h[dy] + q . rel_pos_w[dx]``, q without its scale. Parameters are those of
    ``Attention`` in facebookresearch/segment-anything, ``modeling/image_encoder.py`` (2023), detectron2's ViT, timm and
    transformers: ``qkv``, ``proj``, ``rel_pos_h [2 H - 1, C / heads]``, ``rel_pos_w [2 W - 1, C / heads]``, both zero at
    first. On a map of another shape the tables are resized linearly.

    Args:
        dim: channels C.
        input_size: the (H, W) of the tables.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_norm: whether queries and keys are normalised; the positions then meet the normalised queries, as in timm.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, H, W, C]``.
    """

    def __init__(
        self,
        dim: int,
        input_size: tuple[int, int],
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_norm, attn_drop, proj_drop)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, dim // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, dim // num_heads))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        grid = (x.shape[1], x.shape[2])
        bias = DecomposedRelativePosition.resized(self.rel_pos_h, self.rel_pos_w, grid, grid)
        return self._attend(x.flatten(1, 2), bias=bias).unflatten(1, grid)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
