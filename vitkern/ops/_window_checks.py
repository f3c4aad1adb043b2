"""The argument checks of window_attention: all that shapes, dtypes and devices decide, in sentences."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import SIGNS, RelativePosition, table_rows
from vitkern.cosine import CosineScore
from vitkern.ops import _checks

NAME = "window_attention"
PAD_ORDERS = ("pad_roll", "roll_pad")


def signature(value: Any) -> Any:
    """What `check` may look at: shape, dtype and device of tensors, the fields of modifiers, other values."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, RelativePosition):
        return (
            value.sign,
            value.grid,
            value.prefix_tokens,
            value.q_stride,
            signature(value.table),
            signature(value.index),
        )
    if isinstance(value, CosineScore):
        return signature(value.logit_scale), value.max, value.eps
    if isinstance(value, tuple):
        return tuple(signature(entry) for entry in value)
    return type(value), value


def check(
    q: Any,
    k: Any,
    v: Any,
    window_size: Any,
    shift_size: Any,
    bias: Any,
    cosine: Any,
    scale: Any,
    pad_order: Any,
    pad_kv: Any,
    mask_value: Any,
) -> tuple[list[int], list[int], bool, float, float]:
    """window, shift, roll_first, scale and mask value; raises a sentence where an argument does not fit."""
    autocast = isinstance(q, Tensor) and _checks.autocast(q.device.type)
    _checks.maps(NAME, q, k, v, same_dtype=not autocast)
    window, shift = check_sides(window_size, shift_size, q.shape[1:-2])
    check_pad_order(pad_order)
    check_bias(NAME, bias, q, window, math.prod(window))
    _check_cosine(cosine, scale, q)
    check_pads(pad_kv, k, v)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"{NAME}: scale must be a number or None, got {type(scale).__name__}")
    check_mask_value(mask_value)
    mask_value = -math.inf if mask_value is None else float(mask_value)
    return list(window), list(shift), pad_order == "roll_pad", float(scale), mask_value


def check_sides(window_size: Any, shift_size: Any, lengths: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift of every axis; None is the whole axis."""
    if isinstance(window_size, (list, tuple)) and None in window_size and len(window_size) == len(lengths):
        window_size = [length if w is None else w for w, length in zip(window_size, lengths, strict=True)]
    window = _checks.per_axis(NAME, "window_size", window_size, len(lengths))
    shift = _checks.per_axis(NAME, "shift_size", shift_size, len(lengths))
    for w, s in zip(window, shift, strict=True):
        if w < 1:
            raise ValueError(f"{NAME}: window_size must be at least 1 on every axis, got {window_size!r}")
        if not 0 <= s < w:
            raise ValueError(
                f"{NAME}: shift_size must be at least 0 and less than window_size {list(window)}, got {shift_size!r}"
            )
    return window, shift


def check_pad_order(pad_order: Any) -> None:
    if pad_order not in PAD_ORDERS:
        raise ValueError(f"{NAME}: pad_order must be 'pad_roll' or 'roll_pad', got {pad_order!r}")


def check_mask_value(mask_value: Any) -> None:
    if mask_value is not None and (not isinstance(mask_value, (int, float)) or not mask_value <= 0):
        raise ValueError(f"{NAME}: mask_value must be None or a number that is not positive, got {mask_value!r}")


def check_bias(op: str, bias: Any, q: Tensor, window: tuple[int, ...], keys: int) -> None:
    """A bias of the N queries of a window and `keys` keys, which without an index are N too."""
    n, heads = math.prod(window), q.shape[-2]
    text = "[N, N]" if op == NAME else "[N, K]"
    if bias is None:
        return
    if isinstance(bias, RelativePosition):
        _checks.parameter(op, "bias.table", bias.table, q.device)
        if bias.prefix_tokens:
            raise ValueError(f"{op}: windows have no prefix tokens, got bias.prefix_tokens={bias.prefix_tokens}")
        if bias.q_stride != 1:
            raise ValueError(f"{op}: the queries of a window are all its tokens, got bias.q_stride={bias.q_stride}")
        if bias.sign not in SIGNS:
            raise ValueError(f"{op}: bias.sign must be one of {', '.join(SIGNS)}, got {bias.sign!r}")
        if bias.table.dim() != 2 or bias.table.shape[1] != heads:
            raise ValueError(f"{op}: bias.table must have shape [rows, heads={heads}], got {list(bias.table.shape)}")
        if bias.index is not None:
            _checks.tensor(op, "bias.index", bias.index)
            if bias.index.dtype != torch.int32:
                raise TypeError(f"{op}: bias.index must be int32, got {bias.index.dtype}")
            _checks.shape(op, "bias.index", bias.index, (n, keys), text)
            if bias.index.device != q.device:
                raise ValueError(f"{op}: bias.index must be on the device of q ({q.device}), got {bias.index.device}")
            return
        if keys != n:
            raise ValueError(
                f"{op}: bias without an index needs as many samples as a window has queries ({n}), got {keys}"
            )
        sides = tuple(bias.grid or window)
        if math.prod(sides) != n:
            raise ValueError(f"{op}: bias.grid must have the tokens of the window ({n}), got {list(sides)}")
        rows = table_rows(sides, bias.sign)
        if bias.table.shape[0] != rows:
            raise ValueError(
                f"{op}: bias.table must have {rows} rows for a window {list(sides)} with sign={bias.sign!r}, "
                f"got {bias.table.shape[0]}"
            )
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor, RelativePosition or None, got {type(bias).__name__}")
    _checks.parameter(op, "bias", bias, q.device)
    want = (heads, n, keys)
    fits = bias.dim() <= 3 and all(
        _checks.fits(b, w) for b, w in zip(reversed(bias.shape), reversed(want), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: bias must broadcast to [heads, {text[1:]} = {list(want)}, got {list(bias.shape)}")


def _check_cosine(cosine: Any, scale: Any, q: Tensor) -> None:
    if cosine is None:
        return
    if not isinstance(cosine, CosineScore):
        raise TypeError(f"{NAME}: cosine must be a CosineScore or None, got {type(cosine).__name__}")
    if scale is not None:
        raise ValueError(f"{NAME}: scale must be None with cosine (the factor is exp(logit_scale)), got {scale!r}")
    _checks.parameter(NAME, "cosine.logit_scale", cosine.logit_scale, q.device)
    if cosine.logit_scale.numel() != q.shape[-2]:
        raise ValueError(
            f"{NAME}: cosine.logit_scale must have one element per head ({q.shape[-2]}), got {list(cosine.logit_scale.shape)}"
        )


def check_pads(pad_kv: Any, k: Tensor, v: Tensor) -> None:
    if pad_kv is None or (isinstance(pad_kv, str) and pad_kv == "zero"):
        return
    if not isinstance(pad_kv, tuple) or len(pad_kv) != 2:
        raise ValueError(f"{NAME}: pad_kv must be None, 'zero' or a pair (k_pad, v_pad), got {pad_kv!r}")
    for name, pad, like in (("k_pad", pad_kv[0], k), ("v_pad", pad_kv[1], v)):
        if pad is None:
            continue
        _checks.parameter(NAME, name, pad, like.device)
        _checks.shape(NAME, name, pad, tuple(like.shape[-2:]), "[kv_heads, head_dim]")
