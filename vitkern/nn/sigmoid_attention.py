"""Attention with a sigmoid in place of the softmax, as one module."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitkern.bias import RowBias
from vitkern.nn import _checks
from vitkern.nn.attention import Attention


class SigmoidAttention(Attention):
    """Sigmoid attention (Ramapuram et al. 2024, eq. 3) of tokens ``[B, N, C]``; returns tokens of the same shape.

    ``sigmoid(scale q k^T + b) v``, ``b = -log n`` where a query sees n keys. Parameters are those of ``Attention`` in
    apple/ml-sigmoid-attention, ``attention_simulator/layers/attention.py`` (2024): ``qkv``, ``proj``, with qk_norm ``q_norm`` and
    ``k_norm``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_norm: whether queries and keys are normalised, head by head.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        compat: ``"paper"``: b as above, n counted row by row under a mask. ``"code"``: ``sigmoid(exp(attn_temp) scale q k^T +
            attn_bias) v`` with the two buffers of that file, ``[1]``, zero at first: whoever trains sets ``attn_bias``.

    Raises:
        ValueError: num_heads does not divide dim, compat is unknown, or x is not ``[B, N, C]``; TypeError: mask is not bool.
    """

    attn_bias: Tensor
    attn_temp: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str = "paper",
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, qk_norm, attn_drop, proj_drop)
        self.compat = _checks.one_of(self, "compat", compat, ("paper", "code"))
        if compat == "code":
            self.register_buffer("attn_bias", torch.zeros(1))
            self.register_buffer("attn_temp", torch.zeros(1))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``mask``: bool, broadcasts to ``[B, heads, N, N]``, True may attend."""
        _checks.shape(self, "x", x, "B", "N", self.dim)
        if self.compat == "code":
            scale = self.scale * self.attn_temp.exp().squeeze(0)
            return self._attend(x, normalizer="sigmoid", mask=mask, scale=scale, bias=self.attn_bias.view(1, 1, 1, 1))
        n = x.shape[1]
        if mask is None:
            bias = RowBias(x.new_full((1, 1, n), -math.log(max(n, 1)), dtype=torch.float32))
        else:
            seen = mask.expand(*mask.shape[:-2], n, n).sum(-1).clamp(min=1)  # [..., N]
            bias = RowBias(-seen[(None,) * (3 - seen.dim())].float().log())
        return self._attend(x, normalizer="sigmoid", mask=mask, bias=bias)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
