"""linear_attention of few tokens on a GPU by all pairs of queries and keys: no state, one launch forward and one backward.

The meaning of every argument is that of the reference, vitkern/reference/linear_attention.py. Features are made in registers,
scores live in tiles; products are float32, TF32 for 16-bit inputs. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import power
from ._linear_tiles import factors, features, load_rows, place, spot
from .linear_attention import Call, count, divisor, of_keys, shared, strides, weighted
from .linear_attention import supported as state_supported

MAX_WIDTH = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}     # more spills registers
MAX_TOKENS = 256


@triton.jit
def key_tile(
    k_ptr, v_ptr, mask_ptr, weight_ptr, k_at, v_at, mask_at, weight_at, strides_k, strides_v, strides_mask, strides_weight, t, d, e,
    keys, side, rate, D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    """Of keys t: x, their features and weights, the values, float32 and 0 where hidden; which are valid."""
    valid = t < keys
    if mask_ptr is not None:
        valid = valid & (tl.load(mask_ptr + mask_at + spot(t, side, strides_mask), mask=valid, other=0) != 0)
    x = load_rows(k_ptr + k_at, spot(t, side, strides_k), d, D, strides_k[6], valid).to(tl.float32)
    b = tl.where(valid[:, None], features(x, d, 0.0, rate, D, MAP, True), 0.0)
    w = tl.where(valid, 1.0, 0.0)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + weight_at + spot(t, side, strides_weight), mask=valid, other=0.0).to(tl.float32)
    v = load_rows(v_ptr + v_at, spot(t, side, strides_v), e, E, strides_v[6], valid).to(tl.float32)
    return x, b, w, v, valid


@triton.jit
def _pairs(
    q_ptr, k_ptr, v_ptr, mask_ptr, weight_ptr, out_ptr, strides_q, strides_k, strides_v, strides_mask, strides_weight, strides_o,
    rows, columns, heads, group, tokens, keys, side, key_side, rate, scale, offset, eps,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, DIVISOR: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: S H (fastest), tiles of queries."""
    unit, tile = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    q_at = place(seq, head, None, rows, columns, tokens, strides_q)[0]
    o_at = place(seq, head, None, rows, columns, tokens, strides_o)[0]
    k_at = place(seq, head // group, None, rows, columns, keys, strides_k)[0]
    v_at = place(seq, head // group, None, rows, columns, keys, strides_v)[0]
    mask_at = place(seq, head * 0, None, rows, columns, keys, strides_mask)[0]
    weight_at = place(seq, head // group, None, rows, columns, keys, strides_weight)[0]
    d, e, i = tl.arange(0, BD), tl.arange(0, BE), tile * BLOCK + tl.arange(0, BLOCK)
    inside = i < tokens
    x = load_rows(q_ptr + q_at, spot(i, side, strides_q), d, D, strides_q[6], inside).to(tl.float32)
    a = features(x, d, 0.0, rate, D, MAP, False)
    num = tl.zeros([BLOCK, BE], tl.float32)
    dot = tl.zeros([BLOCK], tl.float32)
    values = tl.zeros([BE], tl.float32)
    n = 0.0
    for at in range(0, keys, BLOCK):
        y, b, w, v, valid = key_tile(
            k_ptr, v_ptr, mask_ptr, weight_ptr, k_at, v_at, mask_at, weight_at, strides_k, strides_v, strides_mask, strides_weight,
            at + tl.arange(0, BLOCK), d, e, keys, key_side, rate, D, E, MAP)
        scores = tl.dot(a, tl.trans(b * w[:, None]), input_precision=PRECISION)
        num = tl.dot(scores, v, num, input_precision=PRECISION)
        dot += tl.sum(scores, 1)
        values += tl.sum(v, 0)
        n += tl.sum(valid.to(tl.float32))
    of_num, of_values, of_den = factors(dot, n, scale, offset, eps, DIVISOR, True)
    o = num * of_num[:, None] + values[None, :] * of_values[:, None]
    at_o = spot(i, side, strides_o)[:, None] + e[None, :]
    tl.store(out_ptr + o_at + at_o, o.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])


def supported(*args) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    call = Call(*args)
    why = state_supported(*args)
    if call.cos_q is not None or call.cu_q is not None or call.map0 is not None or call.feature_map == "softmax":
        why.append("all pairs are taken of maps without parameters, neither packed nor rotated")
    for name, x in (("q", call.q), ("v", call.v)):
        most = MAX_WIDTH.get(x.dtype, 0)
        if x.shape[6] > most:
            why.append(f"heads of {x.dtype} may have {most} channels where all pairs are taken, {name} has {x.shape[6]}")
    for name, x in (("q", call.q), ("k", call.k)):
        if x.shape[2] * x.shape[4] > MAX_TOKENS:
            why.append(f"sequences of all pairs may have {MAX_TOKENS} tokens, {name} has {x.shape[2] * x.shape[4]}")
    return why


def told(call: Call, backward: bool) -> dict:
    """What both kernels are told."""
    q, k, v = call.q, call.k, call.v
    queries, keys, widest = q.shape[2] * q.shape[4], k.shape[2] * k.shape[4], max(q.shape[6], v.shape[6])
    names = ("rows", "columns", "rate", "D", "E", "MAP", "PRECISION", "BD", "enable_fp_fusion")
    most = 16 if widest > 64 and backward else 32
    return {
        "q_ptr": q, "v_ptr": v, "strides_q": strides(q), "strides_v": strides(v), "heads": q.shape[5], "tokens": queries,
        "keys": keys,
        "side": max(q.shape[4], 1), "key_side": max(k.shape[4], 1), "group": q.shape[5] // k.shape[5], "BE": power(v.shape[6]),
        "BLOCK": min(power(max(queries, keys, 1)), most), "num_stages": 1,
        "num_warps": 8 if widest > (32 if q.dtype == torch.float32 else 64) else 4,
        **{name: value for name, value in shared(call).items() if name in names}, **divisor(call), **weighted(call),
        **{name: value for name, value in of_keys(call).items() if name != "cu_k_ptr"},
    }  # fmt: skip


def fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(*args)
    q, v, sequences, kv_heads = call.q, call.v, count(call), call.k.shape[5]
    out = torch.empty((*q.shape[:6], v.shape[6]), dtype=v.dtype, device=v.device)
    state, kept = (q.new_empty((sequences, kv_heads, *rest), dtype=torch.float32) for rest in ((0, 0), (0,)))
    if out.numel():
        options = told(call, False)
        grid = (sequences * q.shape[5], triton.cdiv(options["tokens"], options["BLOCK"]))
        _pairs[grid](out_ptr=out, strides_o=strides(out), **options)
    return out, state, kept


def bwd(*args) -> tuple[Tensor | None, ...]:
    from .linear_pairs_bwd import gradients

    return gradients(*args)
