"""What the libraries' attention modules share: heads, tables of absolute offsets, torch's multi-head attention."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition, offset_index
from vitkern.ops.attention import attention
from vitkern.patch._windows import split_heads

__all__ = ["index_refusal", "merged", "multihead", "relative_on_grid", "split_heads"]


def merged(x: Tensor) -> Tensor:
    """[B, N, heads, head_dim] as [B, N, C]."""
    return x.flatten(-2)


def relative_on_grid(module: Any, grid: tuple[int, int], stride: int = 1) -> RelativePosition:
    """LeViT's attention_biases [H, rows]: absolute offsets, queries at every `stride`-th position."""
    return RelativePosition(module.attention_biases.t(), grid=grid, sign="abs", q_stride=stride)


def index_refusal(module: Any, grid: tuple[int, int], stride: int = 1) -> str | None:
    """Refuses an index buffer other than that of absolute offsets on this grid: the op computes those."""
    index = module.attention_bias_idxs
    levit = offset_index(tuple(grid), "abs", torch.device("cpu"), q_stride=stride)
    if index.is_meta or torch.equal(index.cpu().int(), levit):
        return None
    return "attention_bias_idxs is not that of LeViT"


def multihead(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, seen: Any = None, **_: Any
) -> tuple[Tensor, None]:
    """What torch's multi-head attention gives without weights: q [Q, B, C], k and v [N, B, C], under the mask `seen`."""
    heads = module.num_heads
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    q, k, v = (
        split_heads(nn.functional.linear(x.transpose(0, 1), weight, bias), heads)
        for x, weight, bias in zip((query, key, value), module.in_proj_weight.chunk(3), biases, strict=True)
    )
    out = attention(q, k, v, mask=seen, dropout_p=module.dropout if module.training else 0.0)
    return module.out_proj(merged(out)).transpose(0, 1), None
