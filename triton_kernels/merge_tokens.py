"""merge_tokens on a GPU: one program per output row, tokens gathered through the plan and summed in its order.

The meaning of every argument is that of the reference, vitkern/reference/merge_tokens.py. Backward writes the rows of a
slot's tokens; one more program per sample clears those of the tokens without a slot. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power

REDUCTIONS = ("mean", "sum", "max", "first", "mlerp")
MAX_WIDTH = 8192                        # a row stays in registers
LEAST_NORM = tl.constexpr(1e-12)        # of a mean that mlerp divides by


@triton.jit
def _weight(weight_ptr, sample, token, strides):
    w = 1.0
    if weight_ptr is not None:
        w = tl.load(weight_ptr + sample * strides[0] + token * strides[1]).to(tl.float32)
    return w


@triton.jit
def _total(perm_ptr, weight_ptr, sample, start, stop, strides):
    """The sum of the weights of the tokens start..stop of the plan's order."""
    total = 0.0
    for t in range(start, stop):
        total += _weight(weight_ptr, sample, tl.load(perm_ptr + t).to(tl.int64), strides)
    return total


@triton.jit
def _reduced(x_ptr, perm_ptr, weight_ptr, sample, start, stop, total, strides, weight_strides, c,
             MEAN: tl.constexpr, LARGEST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Mean, sum or maximum of the rows start..stop, [BLOCK_C]."""
    y = tl.zeros([BLOCK_C], tl.float32)
    if LARGEST:
        y = tl.where(start < stop, tl.full([BLOCK_C], float("-inf"), tl.float32), y)
    for t in range(start, stop):
        token = tl.load(perm_ptr + t).to(tl.int64)
        x = tl.load(x_ptr + token * strides[1] + c * strides[2], mask=c < C, other=0.0).to(tl.float32)
        if LARGEST:
            y = tl.maximum(y, x, propagate_nan=tl.PropagateNan.ALL)
        else:
            w = _weight(weight_ptr, sample, token, weight_strides)
            if MEAN:
                w = tl.where(total == 0.0, 0.0, tl.div_rn(w, tl.where(total == 0.0, 1.0, total)))
            y += tl.where(w == 0.0, 0.0, w * x)
    return y


@triton.jit
def _longest(x_ptr, perm_ptr, start, stop, strides, c, C: tl.constexpr):
    """The largest norm of the rows start..stop, and the first row that has it."""
    largest, place = 0.0, start
    for t in range(start, stop):
        token = tl.load(perm_ptr + t).to(tl.int64)
        x = tl.load(x_ptr + token * strides[1] + c * strides[2], mask=c < C, other=0.0).to(tl.float32)
        norm = tl.sqrt_rn(tl.sum(x * x))
        if (norm > largest) | (norm != norm):
            largest = norm
            place = t
    return largest, place


@triton.jit
def _forward(
    x_ptr, perm_ptr, offsets_ptr, weight_ptr, y_ptr, size_ptr, strides, weight_strides, tokens, slots,
    REDUCE: tl.constexpr, INCLUDE_DST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y [B, n_out, C] and size [B, n_out], contiguous. Grid: slots (fastest) x samples, on axis 0."""
    sample, slot = (tl.program_id(0) // slots).to(tl.int64), tl.program_id(0) % slots
    perm_ptr += sample * tokens
    x_ptr += sample * strides[0]
    start = tl.load(offsets_ptr + sample * (slots + 1) + slot)
    stop = tl.load(offsets_ptr + sample * (slots + 1) + slot + 1)
    first = start
    if not INCLUDE_DST:
        first = tl.minimum(start + 1, stop)
    total = _total(perm_ptr, weight_ptr, sample, first, stop, weight_strides)
    last = stop
    if REDUCE == 3:
        last = tl.minimum(start + 1, stop)
    c = tl.arange(0, BLOCK_C)
    at = sample * slots + slot
    if size_ptr is not None:
        tl.store(size_ptr + at, total)
    y = _reduced(x_ptr, perm_ptr, weight_ptr if REDUCE < 2 or REDUCE == 4 else None, sample, first, last, total, strides,
                 weight_strides, c, REDUCE == 0 or REDUCE == 4, REDUCE == 2, C, BLOCK_C)
    if REDUCE == 4:
        longest, _ = _longest(x_ptr, perm_ptr, start, stop, strides, c, C)
        y *= tl.div_rn(longest, tl.maximum(tl.sqrt_rn(tl.sum(y * y)), LEAST_NORM))
    tl.store(y_ptr + at * C + c, y.to(y_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _backward(
    dy_ptr, dsize_ptr, x_ptr, perm_ptr, offsets_ptr, weight_ptr, dx_ptr, dweight_ptr, dy_strides, dsize_strides, strides,
    weight_strides, tokens, slots,
    REDUCE: tl.constexpr, INCLUDE_DST: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx [B, N, C] and dweight [B, N], contiguous. Grid: slots + 1 (fastest) x samples; the last clears the rest."""
    sample, slot = (tl.program_id(0) // (slots + 1)).to(tl.int64), tl.program_id(0) % (slots + 1)
    perm_ptr += sample * tokens
    x_ptr += sample * strides[0]
    start = tl.load(offsets_ptr + sample * (slots + 1) + slot)
    stop = tokens
    if slot < slots:
        stop = tl.load(offsets_ptr + sample * (slots + 1) + slot + 1)
    c = tl.arange(0, BLOCK_C)
    real = slot < slots
    inside = (c < C) & (slot + 0 * c < slots)                                          # [BLOCK_C]
    g = tl.zeros([BLOCK_C], tl.float32)
    if dy_ptr is not None:
        g = tl.load(dy_ptr + sample * dy_strides[0] + slot * dy_strides[1] + c * dy_strides[2],
                    mask=inside, other=0.0).to(tl.float32)
    dsize = 0.0
    if dsize_ptr is not None:
        dsize = tl.load(dsize_ptr + sample * dsize_strides[0] + slot * dsize_strides[1], mask=real, other=0.0)
    first = start
    if not INCLUDE_DST:
        first = tl.minimum(start + 1, stop)
    total, y, ties, longest, place = 0.0, g, g, 0.0, start
    if real:
        total = _total(perm_ptr, weight_ptr, sample, first, stop, weight_strides)
        if REDUCE == 0 or REDUCE == 2 or REDUCE == 4:
            y = _reduced(x_ptr, perm_ptr, weight_ptr if REDUCE != 2 else None, sample, first, stop, total, strides,
                         weight_strides, c, REDUCE != 2, REDUCE == 2, C, BLOCK_C)
        if REDUCE == 4:
            longest, place = _longest(x_ptr, perm_ptr, start, stop, strides, c, C)
    own = 0.0                                  # mlerp: how much of its own row the longest token's gradient holds
    if REDUCE == 4:
        norm = tl.sqrt_rn(tl.sum(y * y))
        safe_norm = tl.maximum(norm, LEAST_NORM)
        along = tl.div_rn(tl.sum(g * y), safe_norm)
        own = tl.where(longest == 0.0, 0.0, tl.div_rn(along, tl.where(longest == 0.0, 1.0, longest)))
        g = tl.div_rn(longest, safe_norm) * (g - y * tl.where(norm > LEAST_NORM, tl.div_rn(along, safe_norm), 0.0))
    if REDUCE == 2:
        ties = tl.zeros([BLOCK_C], tl.float32)
        for t in range(start, tl.where(real, stop, start)):
            token = tl.load(perm_ptr + t).to(tl.int64)
            x = tl.load(x_ptr + token * strides[1] + c * strides[2], mask=c < C, other=0.0).to(tl.float32)
            ties += tl.where(x == y, 1.0, 0.0)
        ties = tl.maximum(ties, 1.0)
    for t in range(start, stop):
        token = tl.load(perm_ptr + t).to(tl.int64)
        x = tl.load(x_ptr + token * strides[1] + c * strides[2], mask=inside, other=0.0).to(tl.float32)
        used = real & (t >= first)
        dw = tl.where(used, dsize, 0.0)
        if REDUCE == 0 or REDUCE == 4:
            safe = tl.where(total == 0.0, 1.0, total)
            w = _weight(weight_ptr, sample, token, weight_strides)
            dx = g * tl.where(used & (total != 0.0), tl.div_rn(w, safe), 0.0)
            dot = tl.sum(tl.where(c < C, g * (x - y), 0.0))
            dw += tl.where(used & (total != 0.0), tl.div_rn(dot, safe), 0.0)
            if REDUCE == 4:
                dx += tl.where(real & (t == place), own, 0.0) * x
        elif REDUCE == 1:
            dx = g * tl.where(used, _weight(weight_ptr, sample, token, weight_strides), 0.0)
            dw += tl.where(used, tl.sum(tl.where(c < C, g * x, 0.0)), 0.0)
        elif REDUCE == 2:
            dx = tl.where(real & (x == y), g / ties, 0.0)
        else:
            dx = tl.where(real & (t == start), g, 0.0)
        at = sample * tokens + token
        if dx_ptr is not None:
            tl.store(dx_ptr + at * C + c, dx.to(dx_ptr.dtype.element_ty), mask=c < C)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + at, dw.to(dweight_ptr.dtype.element_ty))


def supported(x, token_map, perm, offsets, weight, reduce, include_dst) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("x", x, not isinstance(_forward, triton.JITFunction))
    if x.dtype not in DTYPES:
        why.append(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if weight is not None and weight.dtype not in DTYPES:
        why.append(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if x.shape[2] > MAX_WIDTH:
        why.append(f"a token may have {MAX_WIDTH} channels, it has {x.shape[2]}")
    return why


def shared(x, offsets, weight, reduce, include_dst) -> dict:
    """The arguments that both kernels take."""
    block = power(x.shape[2])
    return {
        "strides": x.stride(), "weight_ptr": weight, "weight_strides": (0, 0) if weight is None else weight.stride(),
        "slots": offsets.shape[1] - 1, "REDUCE": REDUCTIONS.index(reduce), "INCLUDE_DST": include_dst,
        "C": x.shape[2], "BLOCK_C": block, "num_warps": 8 if block > 2048 else 4 if block > 1024 else 2 if block > 256 else 1,
    }  # fmt: skip


def fwd(
    x, token_map, perm, offsets, weight, reduce, include_dst, with_size=True, dtype=None
) -> tuple[Tensor, Tensor | None]:
    """y [B, n_out, C] in x's dtype, or `dtype`, and size [B, n_out] in float32, both contiguous."""
    slots = offsets.shape[1] - 1
    y = torch.empty((x.shape[0], slots, x.shape[2]), dtype=dtype or x.dtype, device=x.device)
    size = torch.empty((x.shape[0], slots), dtype=torch.float32, device=x.device) if with_size else None
    if x.shape[0] * slots:
        _forward[(x.shape[0] * slots,)](
            x_ptr=x, perm_ptr=perm, offsets_ptr=offsets, y_ptr=y, size_ptr=size, tokens=x.shape[1],
            **shared(x, offsets, weight, reduce, include_dst),
        )  # fmt: skip
    return y, size


def bwd(dy, dsize, size, x, token_map, perm, offsets, weight, reduce, include_dst, need):
    """dx [B, N, C] and dweight [B, N], contiguous; None where `need` does not ask."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need & 1 else None
    dweight = None
    if need & 2 and weight is not None:
        dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    if x.shape[0] * x.shape[1]:
        _backward[(x.shape[0] * offsets.shape[1],)](
            dy_ptr=dy, dsize_ptr=dsize, x_ptr=x, perm_ptr=perm, offsets_ptr=offsets, dx_ptr=dx, dweight_ptr=dweight,
            dy_strides=(0, 0, 0) if dy is None else dy.stride(),
            dsize_strides=(0, 0) if dsize is None else dsize.stride(), tokens=x.shape[1],
            **shared(x, offsets, weight, reduce, include_dst),
        )  # fmt: skip
    return dx, dweight
