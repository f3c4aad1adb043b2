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

from vitkern.reference import linear_features

from ._host import DTYPES, device_reasons, power
from ._linear_maps import facing, halves, line, phi, rests_on, swapped
from ._linear_tiles import DIVISORS, FEATURES, angles, factors, load_rows, part_of, partner, place, spot
from ._reduce import add_parts

MAX_WIDTH = 256
MAX_ROWS = 128                          # of the matrix of a feature map
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
    k_ptr, v_ptr, mask_ptr, weight_ptr, kept_ptr, maps, state_ptr, cos_ptr, sin_ptr, cu_k_ptr, strides_k, strides_v, strides_mask,
    strides_weight, strides_table, rows, columns, heads, tokens, side, parts, rate,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The states of the parts, [parts, S, Hk, F + 1, E + 1] contiguous float32. Grid: S Hk (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, head = unit // heads, unit % heads
    k_at, first, count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_k)
    v_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_v)
    mask_at, _, _ = place(seq, head * 0, cu_k_ptr, rows, columns, tokens, strides_mask)
    weight_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_weight)
    start, stop = part_of(count, part, parts, BLOCK)
    f, e = tl.arange(0, BF), tile * BE + tl.arange(0, BE)
    kept = rests_on(kept_ptr, unit, f, F, MAP, True)
    s = tl.zeros([BF, BE], tl.float32)
    z = tl.zeros([BF], tl.float32)
    values = tl.zeros([BE], tl.float32)
    n = 0.0
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        at_k = k_at + spot(first + t, side, strides_k)
        token = line(seq, first, cu_k_ptr, columns, tokens) + t
        b = phi(k_ptr, at_k, f, kept, valid, strides_k[6], maps, head, token, rate, True,
                D, F, M, MAP, OWN, EXACT, BD, BM)[1]
        b = tl.where(valid[:, None], b, 0.0)                                           # [BLOCK, BF]
        if weight_ptr is not None:
            w = tl.load(weight_ptr + weight_at + spot(first + t, side, strides_weight), mask=valid, other=0.0)
            w = w.to(tl.float32)
            b = b * w[:, None]
        turned = b
        if PAIRS > 0:
            other, sign = partner(f, PAIRS, HALF)
            y = phi(k_ptr, at_k, other, kept, valid, strides_k[6], maps, head, token, rate, True,
                    D, F, M, MAP, OWN, EXACT, BD, BM)[1]
            y = tl.where(valid[:, None], y, 0.0)
            if weight_ptr is not None:
                y = y * w[:, None]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, f, strides_table, valid, PAIRS, HALF)
            turned = b * cos + y * sin * sign[None, :]
        v = load_rows(v_ptr + v_at, spot(first + t, side, strides_v), e, E, strides_v[6], valid).to(tl.float32)
        s = tl.dot(tl.trans(turned), v, s, input_precision=PRECISION)
        z += tl.sum(b, 0)
        values += tl.sum(v, 0)
        n += tl.sum(valid.to(tl.float32))
    out = state_ptr + (part * tl.num_programs(0) + unit).to(tl.int64) * ((F + 1) * (E + 1))
    tl.store(out + f[:, None] * (E + 1) + e[None, :], s, mask=(f < F)[:, None] & (e < E)[None, :])
    tl.store(out + F * (E + 1) + e, values, mask=e < E)
    if tile == 0:
        tl.store(out + f * (E + 1) + E, z, mask=f < F)
        tl.store(out + F * (E + 1) + E, n)


@triton.jit
def _queries(
    q_ptr, kept_ptr, maps, state_ptr, out_ptr, cos_ptr, sin_ptr, cu_q_ptr, strides_q, strides_o, strides_table, rows, columns,
    heads, group, tokens, side, parts, rate, scale, offset, eps,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: S H (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, head = unit // heads, unit % heads
    q_at, first, count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_q)
    o_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_o)
    start, stop = part_of(count, part, parts, BLOCK)
    f, e = tl.arange(0, BF), tile * BE + tl.arange(0, BE)
    state = state_ptr + (seq * (heads // group) + head // group).to(tl.int64) * ((F + 1) * (E + 1))
    kept = rests_on(kept_ptr, seq * (heads // group) + head // group, f, F, MAP, False)
    s = tl.load(state + facing(f, e, F, E, MAP) * (E + 1) + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
    z = tl.load(state + f * (E + 1) + E, mask=f < F, other=0.0)
    values = tl.load(state + F * (E + 1) + e, mask=e < E, other=0.0)
    n = tl.load(state + F * (E + 1) + E)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        at_q = q_at + spot(first + t, side, strides_q)
        token = line(seq, first, cu_q_ptr, columns, tokens) + t
        a = phi(q_ptr, at_q, f, kept, valid, strides_q[6], maps, head, token, rate, False,
                D, F, M, MAP, OWN, EXACT, BD, BM)[1]
        turned = a
        if PAIRS > 0:
            other, sign = partner(f, PAIRS, HALF)
            y = phi(q_ptr, at_q, other, kept, valid, strides_q[6], maps, head, token, rate, False,
                    D, F, M, MAP, OWN, EXACT, BD, BM)[1]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, f, strides_table, valid, PAIRS, HALF)
            turned = a * cos + y * sin * sign[None, :]
        num = tl.dot(turned, s, input_precision=PRECISION)                             # [BLOCK, BE]
        of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, True)
        if MAP == 10:
            dot = tl.sum(a * swapped(state, f, F, E)[None, :], 1)
            num_b, values_b, of_den = factors(dot, n, scale, offset, eps, DIVISOR, True)
            o = num * halves(e, E, of_num, num_b) + values[None, :] * halves(e, E, of_values, values_b)
        else:
            o = num * of_num[:, None] + values[None, :] * of_values[:, None]
        place_of = spot(first + t, side, strides_o)[:, None] + e[None, :]
        tl.store(out_ptr + o_at + place_of, o.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (e < E)[None, :])


def supported(*args) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    call = Call(*args)
    return device_reasons("q", call.q, not isinstance(_queries, triton.JITFunction)) + refusals(call)


def refusals(call: Call) -> list[str]:
    """Why the kernels do not take these arguments, whatever the device."""
    why = []
    for name in ("q", "k", "v", "key_weight"):
        x = getattr(call, name)
        if x is not None and x.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    if call.feature_map not in FEATURES:
        why.append(f"the feature map must be one of {', '.join(FEATURES)}, got {call.feature_map}")
    for name, width in (("D", call.q.shape[-1]), ("Dv", call.v.shape[-1])):
        if width > MAX_WIDTH:
            why.append(f"{name} must lie in 1..{MAX_WIDTH}, got {width}")
    if call.map0 is not None:
        features, rows = widths(call)
        width = max(call.q.shape[6], features)
        if call.feature_map == "hash" and (rows > 64 or width > (64 if rows > 32 else 128)):
            why.append(f"64 anchors of a hash may have 64 channels and bits, 32 may have 128; {rows} have {width}")
        elif features > MAX_WIDTH or rows > MAX_ROWS:
            why.append(f"a map may make {MAX_WIDTH} features by a matrix of {MAX_ROWS} rows, it makes {features} by {rows}")
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


def map_tile(name: str, d: int, e: int, narrow: bool, turns: bool) -> dict:
    """As `tile_of`, of maps with parameters; `d`: the widest of channels, features and rows of the map's matrix."""
    block = 32 if d <= (32 if name == "hash" else 128 if narrow else 64) else 16
    most = 32 if d <= (64 if narrow and name != "hash" else 32) else 16
    warps = 4 if d == 128 and not narrow and not turns else 8
    return {"BLOCK": block, "BE": min(e, most), "num_warps": warps, "num_stages": 1}


def widths(call: Call) -> tuple[int, int]:
    """The number of features; the rows of the matrix that a map multiplies by, 1 of others."""
    d, name = call.q.shape[6], call.feature_map
    if name.startswith("favor"):
        return (call.map0.shape[0],) * 2
    if name.startswith("hedgehog"):
        return 2 * call.map0.shape[1], call.map0.shape[1]
    if name == "hash":
        return call.map1.shape[2], call.map0.shape[1]
    return (2 if name == "polar" else 1) * d, 1


def heads_of(call: Call) -> int:
    """How many heads the map's parameters have: 1 for all."""
    return 1 if call.map0 is None or call.feature_map.startswith("favor") else call.map0.shape[0]


def shared(call: Call, backward: bool = False) -> dict:
    """What all kernels are told, but for the side."""
    q, v = call.q, call.v
    narrow = q.dtype != torch.float32 and v.dtype != torch.float32
    name, packed, turns, (f, m) = call.feature_map, call.cu_q is not None, call.cos_q is not None, widths(call)
    d, bf, bm, e = (power(n) for n in (q.shape[6], f, m, v.shape[6]))
    return {
        "rows": q.shape[1], "columns": len(call.cu_q) - 1 if packed else q.shape[3], "rate": call.rate,
        "D": q.shape[6], "F": f, "M": m, "E": v.shape[6], "MAP": FEATURES.index(name),
        "OWN": int(heads_of(call) > 1), "EXACT": "tf32x3" if narrow and name != "hash" else "ieee",
        "PRECISION": "tf32" if narrow else "ieee", "PAIRS": call.cos_q.shape[3] if turns else 0, "HALF": call.half,
        "BD": d, "BF": bf, "BM": bm, "enable_fp_fusion": True,
        **(tile_of(d, e, turns, backward) if call.map0 is None else map_tile(name, max(d, bf, bm), e, narrow, turns)),
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
    from .linear_maps import kept_of, parameters

    call = Call(*args)
    q, k, v = call.q, call.k, call.v
    sequences, heads, kv_heads, channels = count(call), q.shape[5], k.shape[5], v.shape[6]
    options = shared(call)
    tiles = triton.cdiv(channels, options["BE"])
    out = torch.empty((*q.shape[:6], channels), dtype=v.dtype, device=v.device)
    state = q.new_zeros((sequences, kv_heads, options["F"] + 1, channels + 1), dtype=torch.float32)
    if not sequences:
        return out, state, q.new_empty((0, kv_heads, linear_features.kept_width(call.feature_map, q.shape[6])), dtype=torch.float32)
    keys = side_of(call, k, kv_heads, options["BLOCK"])
    maps_q, maps_k = parameters(call, options)
    kept = _of_softmax(call, keys, options) if call.feature_map == "softmax" else kept_of(call, maps_k, options)
    parts = q.new_empty((keys["parts"], *state.shape), dtype=torch.float32)
    _key_states[(sequences * kv_heads, keys["parts"], tiles)](
        v_ptr=v, kept_ptr=kept, maps=maps_k, state_ptr=parts, strides_v=strides(v), **of_keys(call), **weighted(call),
        **turning(call.cos_k, call.sin_k), **keys, **options)
    state = add_parts(parts, torch.float32) if keys["parts"] > 1 else parts[0]
    queries = side_of(call, q, heads, options["BLOCK"])
    _queries[(sequences * heads, queries["parts"], tiles)](
        q_ptr=q, kept_ptr=kept, maps=maps_q, state_ptr=state, out_ptr=out, cu_q_ptr=call.cu_q, strides_q=strides(q),
        strides_o=strides(out), group=heads // kv_heads, **turning(call.cos_q, call.sin_q), **queries, **options, **divisor(call))
    return out, state, kept


def _of_softmax(call: Call, keys: dict, options: dict) -> Tensor:
    """The log of the sum of the exponentials of every channel, [S, Hk, D]."""
    sequences, heads, width = count(call), call.k.shape[5], call.k.shape[6]
    top, total = (call.k.new_empty((keys["parts"], sequences, heads, width), dtype=torch.float32) for _ in "ab")
    names = ("rows", "columns", "D", "BLOCK", "BD", "num_warps", "num_stages", "enable_fp_fusion")
    own = {name: options[name] for name in names}
    _key_lse[(sequences * heads, keys["parts"])](top_ptr=top, sum_ptr=total, **of_keys(call), **keys, **own)
    return (top + total.log()).logsumexp(0)


def divisor(call: Call) -> dict:
    return {"scale": call.scale, "offset": call.offset, "eps": call.eps, "DIVISOR": DIVISORS.index(call.normalizer)}


def bwd(*args) -> tuple[Tensor | None, ...]:
    from .linear_attention_bwd import gradients

    return gradients(*args)
