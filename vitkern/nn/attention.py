"""Attention of a vision transformer as one module: projection, normalised queries and keys, attention, projection."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitkern.nn import _checks
from vitkern.ops.attention import attention
from vitkern.rope import Rope


class Attention(nn.Module):
    """Self attention of ViT (Dosovitskiy et al. 2021, eq. 6) of tokens ``[B, N, C]``; returns tokens of the same shape.

    Parameters are those of ``Attention`` in timm, ``layers/attention.py`` (2019 to 2026), and of DeiT and DINO: ``qkv``,
    ``proj``, with ``qk_norm`` also ``q_norm`` and ``k_norm``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_norm: whether queries and keys are normalised, head by head, by norm_layer (Dehghani et al. 2023).
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        norm_layer: makes a normalisation of so many channels.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, N, C]``; the arguments of forward as in
            :func:`vitkern.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        head_dim = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.scale = dim, num_heads, head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, *, bias: Any = None, mask: Any = None, rope: Rope | None = None) -> Tensor:
        """``bias``, ``mask`` and ``rope`` are those of :func:`vitkern.attention`, on ``[B, num_heads, N, N]``."""
        _checks.shape(self, "x", x, "B", "N", self.dim)
        return self._attend(x, bias=bias, mask=mask, rope=rope)

    if TYPE_CHECKING:
        __call__ = forward

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def _attend(self, x: Tensor, **options: Any) -> Tensor:
        """Tokens [B, N, C] to tokens [B, N, C]."""
        q, k, v = self._project(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        dropout_p = self.attn_drop.p if self.training else 0.0
        options = {"scale": self.scale, "dropout_p": dropout_p} | options
        out = attention(self.q_norm(q), self.k_norm(k), v, **options)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}"
