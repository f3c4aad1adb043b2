"""Attention whose heads are mixed before and after the softmax, as one module: CaiT."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitkern.modulation import TalkingHeads
from vitkern.nn import _checks
from vitkern.nn.attention import Attention


class TalkingHeadAttention(Attention):
    """Talking-heads attention of CaiT (Touvron et al. 2021; Shazeer et al. 2020) of tokens ``[B, N, C]``; returns tokens of the
    same shape.

    ``proj_l`` mixes the scores of the heads, with its bias, ``proj_w`` the weights. Parameters are those of
    ``Attention_talking_head`` in facebookresearch/deit, ``cait_models.py`` (2021), and timm's ``TalkingHeadAttn``: ``qkv``,
    ``proj``, ``proj_l``, ``proj_w``.

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: dropout of the mixed weights, in training.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, N, C]``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, False, attn_drop, proj_drop)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        _checks.shape(self, "x", x, "B", "N", self.dim)
        mixed = TalkingHeads(self.proj_l.weight, self.proj_l.bias, self.proj_w.weight, self.proj_w.bias)
        return self._attend(x, modulation=mixed)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]
