"""transformers' DiNAT at its attention module, in the layout that transformers 4 had: later ones swap height and width where heads
were to move."""

from typing import Any

from torch import Tensor, nn

from vitkern.nn.neighborhood_attention import neighborhood


def _dinat(module: nn.Module) -> Any:
    def forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (linear(hidden_states).unflatten(-1, heads) for linear in (self.query, self.key, self.value))
        drop = self.dropout if self.training and self.dropout.p else None
        out, weights = neighborhood(q, k, v, self.rpb, self.kernel_size, self.dilation, drop, bool(output_attentions))
        return (out.flatten(-2), weights.movedim(-2, 1)) if output_attentions else (out.flatten(-2),)  # type: ignore[union-attr]

    return forward


TABLE = {"transformers.models.dinat.modeling_dinat.NeighborhoodAttention": (_dinat, "neighborhood_attention")}
