"""Cross attention to the part of an image where a predicted mask is on, as one module: Mask2Former."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.mask import FromLogits
from vitkern.nn import _checks
from vitkern.ops.attention import attention


class MaskedCrossAttention(nn.Module):
    """Masked attention of Mask2Former (Cheng et al. 2022, eq. 3) from queries ``[B, Q, C]`` to the cells of a map, ``memory
    [B, h w, C]``; returns ``[B, Q, C]``.

    A query sees the cells where its mask of the layer before, resized to the map, has a logit of at least 0, and all cells
    where it has none; no gradient goes to the mask. Positions are added to queries and keys, not to values. Parameters are
    those of ``torch.nn.MultiheadAttention``, which facebookresearch/Mask2Former and transformers use: ``in_proj_weight
    [3 C, C]``, ``in_proj_bias``, ``out_proj``.

    Args:
        embed_dim: channels C.
        num_heads: heads; divides embed_dim.
        dropout: dropout of the attention weights, in training.

    Raises:
        ValueError: num_heads does not divide embed_dim, a tensor has another shape, or there is a mask but no size.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        _checks.heads(self, embed_dim, num_heads)
        self.dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        query_pos: Tensor | None = None,
        memory_pos: Tensor | None = None,
        mask_logits: Tensor | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """``query_pos`` and ``memory_pos`` broadcast to the tokens they are added to; ``mask_logits [B, Q, H, W]`` of any
        resolution; ``size`` is the (h, w) of memory, which a mask needs."""
        _checks.shape(self, "query", query, "B", "Q", self.dim)
        _checks.shape(self, "memory", memory, query.shape[0], "h w", self.dim)
        mask = None
        if mask_logits is not None:
            if size is None:
                raise ValueError(f"{type(self).__name__}: size must be the (h, w) of memory with mask_logits, got None")
            mask = FromLogits(mask_logits, size)
        placed = query if query_pos is None else query + query_pos
        keys = memory if memory_pos is None else memory + memory_pos
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1))
            for x, weight, bias in zip((placed, keys, memory), weights, biases, strict=True)
        )
        out = attention(q, k, v, mask=mask, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.flatten(-2))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"embed_dim={self.dim}, num_heads={self.num_heads}"
