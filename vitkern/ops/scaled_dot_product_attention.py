"""scaled_dot_product_attention: attention behind the arguments and the layout of torch.nn.functional's."""

import torch
from torch import Tensor

from vitkern.mask import Causal
from vitkern.ops import _checks
from vitkern.ops.attention import attention

NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """:func:`vitkern.attention` with the arguments of ``torch.nn.functional.scaled_dot_product_attention``, heads before tokens:
    ``from vitkern import scaled_dot_product_attention`` is all that a model needs. No tensor is copied.

    Args:
        query: ``[..., H, L, E]``, or ``[N, L, E]`` without heads; key, value: ``[..., Hk, S, E | Ev]``.
        attn_mask: bool, True may attend, or a float tensor that is added; it broadcasts to ``[..., H, L, S]``. A float mask gets a
            gradient, summed over the axes that it lacks.
        dropout_p: of the weights; the seed is drawn from torch's generator.
        is_causal: query i sees the keys up to i, counted from the first of both; not together with attn_mask.
        scale: default ``E ** -0.5``.
        enable_gqa: whether Hk may divide H.

    Returns:
        ``[..., H, L, Ev]``. A query that sees no key gives 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it.
    """
    for name, t in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(NAME, name, t)
        if t.dim() < 3 or t.dim() != query.dim():
            raise ValueError(
                f"{NAME}: query, key and value must be [..., H, N, E] or [N, L, E], {name} is {list(t.shape)}"
            )
    if is_causal and attn_mask is not None:
        raise ValueError(f"{NAME}: is_causal must be False where attn_mask is given")
    if not enable_gqa and query.dim() > 3 and key.shape[-3] != query.shape[-3]:
        raise ValueError(
            f"{NAME}: key has {key.shape[-3]} heads and query {query.shape[-3]}; enable_gqa=True lets queries share them"
        )
    lead = query.shape[:-3]
    masks: Causal | Tensor | None = None
    bias: Tensor | None = None
    if is_causal:
        masks = Causal()
    elif attn_mask is not None:
        _checks.tensor(NAME, "attn_mask", attn_mask)
        attn_mask = _of_four(attn_mask, query, key)
        masks, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    q, k, v = ((t[:, None] if t.dim() == 3 else t.flatten(0, -4)).transpose(1, 2) for t in (query, key, value))
    out = attention(q, k, v, bias=bias, mask=masks, scale=scale, dropout_p=dropout_p).transpose(1, 2)
    return out[:, 0] if query.dim() == 3 else out.reshape(*lead, *out.shape[1:])


def _of_four(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as one of [batch, H, L, S]."""
    if query.dim() == 3:
        return mask[:, None] if mask.dim() == 3 else mask
    if mask.dim() <= 3 or query.dim() == 4:
        return mask
    return mask.expand(*query.shape[:-3], *mask.shape[-3:]).flatten(0, -4)
