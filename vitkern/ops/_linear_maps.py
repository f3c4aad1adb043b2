"""linear_attention: feature maps with parameters, as arguments of the op or as operations in front of it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vitkern import feature_map as maps
from vitkern.ops._linear_lowering import NAME, Lowered
from vitkern.reference import linear_features
from vitkern.reference.linear_attention import sequences


def fused(lowered: Lowered, custom: Any) -> bool:
    """Puts the parameters of `custom` among the arguments of the op; False if the op does not make its features."""
    found = _lowered(custom, lowered.q.shape[5], lowered.q.shape[6])
    if found is None:
        return False
    lowered.feature_map, lowered.rate, parameters = found
    wide = torch.promote_types(lowered.q.dtype, torch.float32)
    given: list[Any] = [None if t is None else t.to(wide) for t in parameters]
    if isinstance(custom, (maps.Focused, maps.Polar)):
        given[0] = softplus(given[0])
    width = linear_features.width(lowered.feature_map, lowered.q.shape[6], *(*given, None, None)[:2])
    cos = lowered.tables[0]
    if cos is not None and 2 * cos.shape[3] > width:
        raise ValueError(f"{NAME}: rope turns at most the {width} features of the map, got {2 * cos.shape[3]}")
    lowered.parameters = (*given, *(None,) * (3 - len(given)))  # type: ignore[assignment]
    return True


def _lowered(custom: Any, heads: int, d: int) -> tuple[str, float, tuple[Tensor | None, ...]] | None:
    """The op's name of a map, its number, and its tensors."""
    if type(custom) is maps.Focused and not isinstance(custom.power, Tensor):
        return f"focused_{custom.norm}", float(custom.power), (custom.scale.reshape(heads, d),)
    if type(custom) is maps.Polar:
        return "polar", 0.0, (custom.scale.reshape(heads, d), custom.power.reshape(heads, d))
    if type(custom) is maps.Hedgehog:
        return f"hedgehog_{custom.form}", custom.eps, (custom.weight, custom.bias)
    if type(custom) is maps.Favor:
        return "favor_relu" if custom.generalised else "favor", custom.eps, (custom.omega,)
    if type(custom) is maps.Sign:
        return "sign", 0.0, ()
    if type(custom) is maps.Hash:
        return "hash", 0.0, (custom.anchors, custom.A, custom.mean)
    return None


def apply_map(lowered: Lowered, custom: Any) -> None:
    """Puts the features of `custom` in place of q and k."""
    q, k, mask = lowered.q, lowered.k, lowered.key_mask
    if mask is not None:
        k = k.masked_fill(~mask[..., None, None], 0.0)
    lowered.q = _dense(custom, q, "q", None, lowered.cu_q)
    lowered.k = _dense(custom, k, "k", mask, lowered.cu_k)


def features_in_front(lowered: Lowered, custom: Any) -> None:
    """As `apply_map`, without the values: what an explanation is about."""
    for name in "qk":
        x = getattr(lowered, name)
        one = _dense(custom, x[:1, :1, :1, :1, :1], name, None, None)
        setattr(lowered, name, one.new_empty((*x.shape[:6], one.shape[6])))


def _dense(custom: Any, x: Tensor, side: str, mask: Tensor | None, cu: Tensor | None) -> Tensor:
    batch, rows, wy, columns, wx = x.shape[:5]
    flat, valid = sequences(x), None if mask is None else sequences(mask)
    if cu is None or custom.per_token:
        found = custom.dense(flat, side, valid)  # [S, N, H, F]
    else:
        bounds = zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)
        found = torch.cat(
            [custom.dense(flat[:, i:j], side, valid if valid is None else valid[:, i:j]) for i, j in bounds], 1
        )
    return found.unflatten(0, (batch, rows, columns)).unflatten(3, (wy, wx)).transpose(2, 3)
