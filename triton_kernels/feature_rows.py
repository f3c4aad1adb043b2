"""feature_rows on a GPU: a program maps a tile of tokens of one head.

The meaning of every argument is that of the reference, vitkern/reference/feature_rows.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power
from ._linear_tiles import FEATURES, feature_grads, features

MAPS = FEATURES[:7]
MAX_WIDTH = 512


@triton.jit
def _tile(x_ptr, mask_ptr, weight_ptr, x_strides, mask_strides, weight_strides, tokens, heads, scale,
          D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """x [BLOCK, BD], which tokens count, scale times the weights of them, and where they are."""
    head = tl.program_id(0) % heads
    sample = (tl.program_id(0) // heads).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BD)
    used = t < tokens
    if mask_ptr is not None:
        at = mask_ptr + sample * mask_strides[0] + t.to(tl.int64) * mask_strides[1]
        used = used & (tl.load(at, mask=used, other=0) != 0)
    at = x_ptr + sample * x_strides[0] + head.to(tl.int64) * x_strides[2] \
        + t.to(tl.int64)[:, None] * x_strides[1] + d[None, :] * x_strides[3]
    x = tl.load(at, mask=used[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    factor = tl.where(used, scale, 0.0)
    if weight_ptr is not None:
        at = weight_ptr + sample * weight_strides[0] + t.to(tl.int64) * weight_strides[1] + head.to(tl.int64) * weight_strides[2]
        factor = factor * tl.load(at, mask=used, other=0.0).to(tl.float32)
    return x, used, factor, t, d, sample, head


@triton.jit
def _forward(x_ptr, mask_ptr, weight_ptr, out_ptr, x_strides, mask_strides, weight_strides, tokens, heads, rate, scale,
             D: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    x, used, factor, t, d, sample, head = _tile(
        x_ptr, mask_ptr, weight_ptr, x_strides, mask_strides, weight_strides, tokens, heads, scale, D, BLOCK, BD
    )
    y = tl.where(used[:, None], features(x, d, d, rate, D, MAP, False) * factor[:, None], 0.0)
    at = ((sample * tokens + t.to(tl.int64)) * heads + head) * D
    tl.store(out_ptr + at[:, None] + d[None, :], y, mask=(t < tokens)[:, None] & (d < D)[None, :])


@triton.jit
def _backward(dout_ptr, x_ptr, mask_ptr, weight_ptr, dx_ptr, dweight_ptr, dout_strides, x_strides, mask_strides, weight_strides,
              tokens, heads, rate, scale,
              D: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    x, used, factor, t, d, sample, head = _tile(
        x_ptr, mask_ptr, weight_ptr, x_strides, mask_strides, weight_strides, tokens, heads, scale, D, BLOCK, BD
    )
    there = (t < tokens)[:, None] & (d < D)[None, :]
    at = dout_ptr + sample * dout_strides[0] + head.to(tl.int64) * dout_strides[2] \
        + t.to(tl.int64)[:, None] * dout_strides[1] + d[None, :] * dout_strides[3]
    g = tl.load(at, mask=used[:, None] & there, other=0.0).to(tl.float32)
    y = features(x, d, d, rate, D, MAP, False)
    at = (sample * tokens + t.to(tl.int64)) * heads + head
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.where(used, tl.sum(g * y, 1) * scale, 0.0), mask=t < tokens)
    if dx_ptr is not None:
        dx = tl.where(used[:, None], feature_grads(x, y, g * factor[:, None], d, d, rate, D, MAP, False), 0.0)
        tl.store(dx_ptr + at[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=there)


def supported(x, mask, weight, feature_map, rate, scale) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("x", x, not isinstance(_forward, triton.JITFunction))
    for name, t in (("x", x), ("weight", weight)):
        if t is not None and t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if feature_map not in MAPS:
        why.append(f"the feature map must be one of {', '.join(MAPS)}, got {feature_map}")
    if x.shape[3] > MAX_WIDTH:
        why.append(f"x may have {MAX_WIDTH} channels, it has {x.shape[3]}")
    return why


def _shared(x, mask, weight, feature_map, rate, scale) -> tuple[tuple[int, int], dict]:
    """The grid, and what both kernels are told."""
    batch, tokens, heads, d = x.shape
    block = max(1, 4096 // power(d))
    given = {
        "x_ptr": x, "mask_ptr": None if mask is None else mask.view(torch.uint8), "weight_ptr": weight, "x_strides": x.stride(),
        "mask_strides": (0, 0) if mask is None else mask.stride(), "weight_strides": (0, 0, 0), "tokens": tokens, "heads": heads,
        "rate": rate, "scale": scale, "D": d, "MAP": MAPS.index(feature_map), "BLOCK": block, "BD": power(d), "num_warps": 4,
    }  # fmt: skip
    if weight is not None:
        given["weight_strides"] = (*weight.stride()[:2], weight.stride(2) if weight.shape[2] > 1 else 0)
    return (batch * heads, triton.cdiv(tokens, block)), given


def fwd(*args) -> Tensor:
    grid, given = _shared(*args)
    out = args[0].new_empty(args[0].shape, dtype=torch.float32)
    if out.numel():
        _forward[grid](out_ptr=out, **given)
    return out


def bwd(dout, x, mask, weight, feature_map, rate, scale, need) -> tuple[Tensor | None, Tensor | None]:
    """dx like x, and the gradient of the weight, summed over the heads that share it; None where `need` does not ask."""
    grid, given = _shared(x, mask, weight, feature_map, rate, scale)
    dx = x.new_empty(x.shape) if need & 1 else None
    dweight = x.new_empty(x.shape[:3], dtype=torch.float32) if need & 2 and weight is not None else None
    if x.numel() and (dx is not None or dweight is not None):
        _backward[grid](dout_ptr=dout, dx_ptr=dx, dweight_ptr=dweight, dout_strides=dout.stride(), **given)
    if dweight is not None:
        dweight = (dweight if weight.shape[2] > 1 else dweight.sum(2, keepdim=True)).to(weight.dtype)
    return dx, dweight
