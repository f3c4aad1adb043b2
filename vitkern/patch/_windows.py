"""What the libraries' Swin blocks share: heads and pads of a projection, and one window attention call."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., C] as [..., heads, C / heads]."""
    return x.unflatten(-1, (heads, -1))


def pad_of(linear: nn.Linear, heads: int) -> Tensor | None:
    """What a zero-padded token becomes after this projection, [heads, head_dim]; None is zero."""
    return None if linear.bias is None else linear.bias.view(heads, -1)


def separate(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, heads: int, window: Any, shift: Any, **options: Any
) -> Tensor:
    """Window attention of a map x [B, *spatial, C] through three projections; pads are those of the projected zero."""
    out = window_attention(
        split_heads(q(x), heads),
        split_heads(k(x), heads),
        split_heads(v(x), heads),
        window,
        shift,
        pad_kv=(pad_of(k, heads), pad_of(v, heads)),
        **options,
    )
    return out.flatten(-2)


def packed(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, window: Any, shift: Any, **options: Any) -> Tensor:
    """Window attention of a map x [B, *spatial, C] through one projection to q, k and v, [3 C, C] and [3 C]."""
    qkv = nn.functional.linear(x, weight, bias).unflatten(-1, (3, heads, -1))
    pads = (None, None) if bias is None else tuple(bias.view(3, heads, -1)[1:])
    return window_attention_qkvpacked(qkv, window, shift, pad_kv=pads, **options).flatten(-2)


def indexed_table(table: Tensor, index: Tensor, tokens: int) -> RelativePosition:
    """A table [R, H] with the index buffer of a library, [N, N] or flattened, of any integer dtype."""
    return RelativePosition(table, index.view(tokens, tokens).to(torch.int32))


def zero_middle_third(bias: Tensor) -> Tensor:
    """The bias of a packed projection without that of k (Swin V2)."""
    third = bias.shape[0] // 3
    return torch.cat((bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]))
