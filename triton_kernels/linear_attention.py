"""linear_attention on a GPU: the sums of the keys in parts of each sequence, the parts added in order, then the queries.

The meaning of every argument is that of the reference, vitkern/reference/linear_attention.py. Features are made in registers;
products are float32, TF32 for 16-bit inputs. A state is [F + 1, E + 1]: S beside z, over V and the number of valid keys. No
atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power
from ._linear_tiles import DIVISORS, FEATURES, angles, factors, features, load_rows, part_of, partner, place, spot
from ._reduce import add_parts

MAX_WIDTH = 256
PROGRAMS = 1024                         # about four for each of the multiprocessors of a large GPU, and two waves


class Call(NamedTuple):
    """The arguments of the op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    key_weight: Tensor | None
    cos_q: Tensor | None
    sin_q: Tensor | None
    cos_k: Tensor | None
    sin_k: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    map0: Tensor | None
    map1: Tensor | None
    map2: Tensor | None
    feature_map: str
    rate: float
    normalizer: str
    eps: float
    scale: float
    offset: float
    half: bool
    detach: bool
    pairs: bool


@triton.jit
def _key_lse(
    k_ptr, mask_ptr, top_ptr, sum_ptr, cu_k_ptr, strides_k, strides_mask, rows, columns, heads, tokens, side, parts,
    D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Largest and sum of exp(x - largest) of every channel, [parts, S, Hk, D] contiguous. Grid: S Hk (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    k_at, first, count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_k)
    mask_at, _, _ = place(seq, head * 0, cu_k_ptr, rows, columns, tokens, strides_mask)
    start, stop = part_of(count, part, parts, BLOCK)
    d = tl.arange(0, BD)
    top = tl.full([BD], float("-inf"), tl.float32)
    total = tl.zeros([BD], tl.float32)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        x = load_rows(k_ptr + k_at, spot(first + t, side, strides_k), d, D, strides_k[6], valid).to(tl.float32)
        x = tl.where(valid[:, None], x, float("-inf"))
        now = tl.maximum(top, tl.max(x, 0))
        safe = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[None, :]), 0)
        top = now
    out = (part * tl.num_programs(0) + unit).to(tl.int64) * D + d
    tl.store(top_ptr + out, top, mask=d < D)
    tl.store(sum_ptr + out, total, mask=d < D)


@triton.jit
def _key_states(
    k_ptr, v_ptr, mask_ptr, weight_ptr, lse_ptr, state_ptr, cos_ptr, sin_ptr, cu_k_ptr, strides_k, strides_v, strides_mask,
    strides_weight, strides_table, rows, columns, heads, tokens, side, parts, rate,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The states of the parts, [parts, S, Hk, D + 1, E + 1] contiguous float32. Grid: S Hk (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, head = unit // heads, unit % heads
    k_at, first, count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_k)
    v_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_v)
    mask_at, _, _ = place(seq, head * 0, cu_k_ptr, rows, columns, tokens, strides_mask)
    weight_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_weight)
    start, stop = part_of(count, part, parts, BLOCK)
    d, e = tl.arange(0, BD), tile * BE + tl.arange(0, BE)
    lse = tl.zeros([BD], tl.float32)
    if MAP == 5:
        lse = tl.load(lse_ptr + unit.to(tl.int64) * D + d, mask=d < D, other=0.0)
    s = tl.zeros([BD, BE], tl.float32)
    z = tl.zeros([BD], tl.float32)
    values = tl.zeros([BE], tl.float32)
    n = 0.0
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        x = load_rows(k_ptr + k_at, spot(first + t, side, strides_k), d, D, strides_k[6], valid).to(tl.float32)
        b = tl.where(valid[:, None], features(x, d, lse, rate, D, MAP, True), 0.0)     # [BLOCK, BD]
        if weight_ptr is not None:
            w = tl.load(weight_ptr + weight_at + spot(first + t, side, strides_weight), mask=valid, other=0.0)
            w = w.to(tl.float32)
            b = b * w[:, None]
        turned = b
        if PAIRS > 0:
            other, sign = partner(d, PAIRS, HALF)
            y = load_rows(k_ptr + k_at, spot(first + t, side, strides_k), other, D, strides_k[6], valid).to(tl.float32)
            y = tl.where(valid[:, None], features(y, d, lse, rate, D, MAP, True), 0.0)
            if weight_ptr is not None:
                y = y * w[:, None]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, d, strides_table, valid, PAIRS, HALF)
            turned = b * cos + y * sin * sign[None, :]
        v = load_rows(v_ptr + v_at, spot(first + t, side, strides_v), e, E, strides_v[6], valid).to(tl.float32)
        s = tl.dot(tl.trans(turned), v, s, input_precision=PRECISION)
        z += tl.sum(b, 0)
        values += tl.sum(v, 0)
        n += tl.sum(valid.to(tl.float32))
    out = state_ptr + (part * tl.num_programs(0) + unit).to(tl.int64) * ((D + 1) * (E + 1))
    tl.store(out + d[:, None] * (E + 1) + e[None, :], s, mask=(d < D)[:, None] & (e < E)[None, :])
    tl.store(out + D * (E + 1) + e, values, mask=e < E)
    if tile == 0:
        tl.store(out + d * (E + 1) + E, z, mask=d < D)
        tl.store(out + D * (E + 1) + E, n)


@triton.jit
def _queries(
    q_ptr, state_ptr, out_ptr, cos_ptr, sin_ptr, cu_q_ptr, strides_q, strides_o, strides_table, rows, columns, heads, group, tokens,
    side, parts, rate, scale, offset, eps,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: S H (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, head = unit // heads, unit % heads
    q_at, first, count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_q)
    o_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_o)
    start, stop = part_of(count, part, parts, BLOCK)
    d, e = tl.arange(0, BD), tile * BE + tl.arange(0, BE)
    state = state_ptr + (seq * (heads // group) + head // group).to(tl.int64) * ((D + 1) * (E + 1))
    s = tl.load(state + d[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
    z = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
    values = tl.load(state + D * (E + 1) + e, mask=e < E, other=0.0)
    n = tl.load(state + D * (E + 1) + E)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        x = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), d, D, strides_q[6], valid).to(tl.float32)
        a = features(x, d, z, rate, D, MAP, False)
        turned = a
        if PAIRS > 0:
            other, sign = partner(d, PAIRS, HALF)
            y = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), other, D, strides_q[6], valid).to(tl.float32)
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, d, strides_table, valid, PAIRS, HALF)
            turned = a * cos + features(y, d, z, rate, D, MAP, False) * sin * sign[None, :]
        num = tl.dot(turned, s, input_precision=PRECISION)                             # [BLOCK, BE]
        of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, True)
        o = num * of_num[:, None] + values[None, :] * of_values[:, None]
        place_of = spot(first + t, side, strides_o)[:, None] + e[None, :]
        tl.store(out_ptr + o_at + place_of, o.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (e < E)[None, :])


def supported(*args) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    call = Call(*args)
    why = device_reasons("q", call.q, not isinstance(_queries, triton.JITFunction))
    for name in ("q", "k", "v", "key_weight"):
        x = getattr(call, name)
        if x is not None and x.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if call.feature_map not in FEATURES:
        why.append(f"the feature map must be one of {', '.join(FEATURES)}, got {call.feature_map}")
    for name, width in (("D", call.q.shape[-1]), ("Dv", call.v.shape[-1])):
        if width > MAX_WIDTH:
            why.append(f"{name} must lie in 1..{MAX_WIDTH}, got {width}")
    if call.q.dtype == torch.float32 and call.q.shape[6] > 128:
        why.append(f"heads of float32 may have 128 channels, q has {call.q.shape[6]}")
    return why


def strides(x: Tensor | None) -> tuple[int, ...]:
    """Seven strides of [B, Wy, wy, Wx, wx, H, D], 0 for what is not there."""
    found = () if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape[:6], x.stride()[:6], strict=True))
    if x is not None and x.dim() == 7:
        found += (x.stride(6),)
    return found + (0,) * (7 - len(found))


def tile_of(d: int, e: int, turns: bool, backward: bool) -> dict:
    """Tokens and values of a tile, and warps: what the compiler holds without spills on every architecture."""
    if d <= 32:
        block, most, warps = (32, 16, 8) if backward and turns else (64, 32 if backward else 64, 8 if turns else 4)
    elif d <= 64:
        block, most, warps = 32, 32, 8 if backward or turns else 4
    else:
        block, most, warps = (32, 32, 8) if d <= 128 else (16, 16, 8)
    return {"BLOCK": block, "BE": min(e, most), "num_warps": warps, "num_stages": 2 if d <= 64 else 1}


def shared(call: Call, backward: bool = False) -> dict:
    """What all kernels are told, but for the side."""
    q, v = call.q, call.v
    narrow = q.dtype != torch.float32 and v.dtype != torch.float32
    d, e, packed, turns = power(q.shape[6]), power(v.shape[6]), call.cu_q is not None, call.cos_q is not None
    return {
        "rows": q.shape[1], "columns": len(call.cu_q) - 1 if packed else q.shape[3], "rate": call.rate,
        "D": q.shape[6], "E": v.shape[6], "MAP": FEATURES.index(call.feature_map), "PRECISION": "tf32" if narrow else "ieee",
        "PAIRS": call.cos_q.shape[3] if turns else 0, "HALF": call.half, "BD": d, "enable_fp_fusion": True,
        **tile_of(d, e, turns, backward),
    }  # fmt: skip


def side_of(call: Call, x: Tensor, heads: int, block: int) -> dict:
    """What kernels over the tokens of q, or of k, are told."""
    tokens, packed = x.shape[2] * x.shape[4], call.cu_q is not None
    units = max(count(call) * heads, 1)
    most = triton.cdiv(tokens, block)
    return {"heads": heads, "tokens": tokens, "side": 2**30 if packed else x.shape[4],
            "parts": max(1, min(most, triton.cdiv(PROGRAMS, units), 64))}  # fmt: skip


def count(call: Call) -> int:
    """The number of sequences."""
    q = call.q
    return q.shape[0] * (len(call.cu_q) - 1 if call.cu_q is not None else q.shape[1] * q.shape[3])


def of_keys(call: Call) -> dict:
    """The tensors of the keys, by name."""
    mask = None if call.key_mask is None else call.key_mask.view(torch.uint8)
    return {
        "k_ptr": call.k, "mask_ptr": mask, "cu_k_ptr": call.cu_k, "strides_k": strides(call.k),
        "strides_mask": strides(None if mask is None else mask[..., None]),
    }  # fmt: skip


def turning(cos: Tensor | None, sin: Tensor | None) -> dict:
    """The tables of queries or of keys, of equal strides; those of length 1 count as stride 0."""
    if cos is None:
        return {"cos_ptr": None, "sin_ptr": None, "strides_table": (0,) * 4}
    cos, sin = cos.contiguous(), sin.contiguous()
    found = tuple(0 if n == 1 and i in (0, 2) else s for i, (n, s) in enumerate(zip(cos.shape, cos.stride(), strict=True)))
    return {"cos_ptr": cos, "sin_ptr": sin, "strides_table": found}


def weighted(call: Call) -> dict:
    return {"weight_ptr": call.key_weight, "strides_weight": strides(call.key_weight)}


def fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args)
    q, k, v = call.q, call.k, call.v
    sequences, heads, kv_heads, width, channels = count(call), q.shape[5], k.shape[5], q.shape[6], v.shape[6]
    options = shared(call)
    tiles = triton.cdiv(channels, options["BE"])
    out = torch.empty((*q.shape[:6], channels), dtype=v.dtype, device=v.device)
    lse = q.new_empty((sequences, kv_heads, width if call.feature_map == "softmax" else 0), dtype=torch.float32)
    state = q.new_zeros((sequences, kv_heads, width + 1, channels + 1), dtype=torch.float32)
    if not sequences:
        return out, state, lse
    keys = side_of(call, k, kv_heads, options["BLOCK"])
    if lse.numel():
        top, total = (q.new_empty((keys["parts"], *lse.shape), dtype=torch.float32) for _ in "ab")
        names = ("rows", "columns", "D", "BLOCK", "BD", "num_warps", "num_stages", "enable_fp_fusion")
        own = {name: options[name] for name in names}
        _key_lse[(sequences * kv_heads, keys["parts"])](top_ptr=top, sum_ptr=total, **of_keys(call), **keys, **own)
        lse = (top + total.log()).logsumexp(0)
    parts = q.new_empty((keys["parts"], *state.shape), dtype=torch.float32)
    _key_states[(sequences * kv_heads, keys["parts"], tiles)](
        v_ptr=v, lse_ptr=lse, state_ptr=parts, strides_v=strides(v), **of_keys(call), **weighted(call),
        **turning(call.cos_k, call.sin_k), **keys, **options)
    state = add_parts(parts, torch.float32) if keys["parts"] > 1 else parts[0]
    queries = side_of(call, q, heads, options["BLOCK"])
    _queries[(sequences * heads, queries["parts"], tiles)](
        q_ptr=q, state_ptr=state, out_ptr=out, cu_q_ptr=call.cu_q, strides_q=strides(q), strides_o=strides(out),
        group=heads // kv_heads, **turning(call.cos_q, call.sin_q), **queries, **options, **divisor(call))
    return out, state, lse


def divisor(call: Call) -> dict:
    return {"scale": call.scale, "offset": call.offset, "eps": call.eps, "DIVISOR": DIVISORS.index(call.normalizer)}


def bwd(*args) -> tuple[Tensor | None, ...]:
    from .linear_attention_bwd import gradients

    return gradients(*args)
