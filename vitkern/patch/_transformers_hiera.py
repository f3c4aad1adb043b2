"""transformers' Hiera at its attention module, which owns the units: their tokens lie evenly over the list of all."""

from typing import Any

from torch import Tensor, nn

from vitkern.ops.attention import attention
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked


def _hiera(module: nn.Module) -> Any:
    def forward(self: Any, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if output_attentions:
            return type(self).forward(self, hidden_states, output_attentions)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.unbind(-3)
        if self.query_stride > 1:  # of equal maxima the first gets the gradient
            q = q.unflatten(1, (self.query_stride, -1)).max(1).values
        if not self.use_mask_unit_attn:
            out = attention(q, k, v, scale=self.scale)
        elif self.query_stride > 1:
            out = window_attention(q, k, v, self.window_size, scale=self.scale, partition="unit")
        else:
            out = window_attention_qkvpacked(qkv, self.window_size, scale=self.scale, partition="unit")
        return self.proj(out.flatten(-2)), None

    return forward


TABLE = {"transformers.models.hiera.modeling_hiera.HieraMaskUnitAttention": (_hiera, "window_attention, attention")}
