"""linear_attention on a GPU, backward: what each query leaves, the gradient of the states in parts added in order, the keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear_tiles import angles, factors, feature_grads, features, load_rows, part_of, partner, place, spot
from ._reduce import add_parts
from .linear_attention import Call, count, divisor, of_keys, shared, side_of, strides, turning, weighted


@triton.jit
def _query_grads(
    dout_ptr, q_ptr, state_ptr, dq_ptr, dden_ptr, cos_ptr, sin_ptr, dcos_ptr, dsin_ptr, cu_q_ptr, strides_do, strides_q, strides_dq,
    strides_den, strides_table, strides_turn, rows, columns, heads, group, tokens, side, parts, rate, scale, offset, eps,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr,
    DETACH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq, and the gradient of every <a, z>, float32. Grid: S H (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    q_at, first, count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_q)
    do_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_do)
    dq_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_dq)
    den_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_den)
    start, stop = part_of(count, part, parts, BLOCK)
    d = tl.arange(0, BD)
    state = state_ptr + (seq * (heads // group) + head // group).to(tl.int64) * ((D + 1) * (E + 1))
    z = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
    n = tl.load(state + D * (E + 1) + E)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        x = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), d, D, strides_q[6], valid).to(tl.float32)
        a = features(x, d, z, rate, D, MAP, False)
        of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, DETACH)
        along = tl.zeros([BLOCK], tl.float32)
        g = tl.zeros([BLOCK, BD], tl.float32)
        h = g                                                                          # g of each channel's partner
        turned = a
        if PAIRS > 0:
            other, sign = partner(d, PAIRS, HALF)
            y = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), other, D, strides_q[6], valid).to(tl.float32)
            y = features(y, d, z, rate, D, MAP, False) * sign[None, :]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, d, strides_table, valid, PAIRS, HALF)
            turned = a * cos + y * sin
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            s = tl.load(state + d[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
            do = load_rows(dout_ptr + do_at, spot(first + t, side, strides_do), e, E, strides_do[6], valid).to(tl.float32)
            values = tl.load(state + D * (E + 1) + e, mask=e < E, other=0.0)
            if DIVISOR == 5:
                along += tl.sum(do * values[None, :], 1)
            elif DIVISOR != 2:
                o = tl.dot(turned, s, input_precision=PRECISION) * of_num[:, None] + values[None, :] * of_values[:, None]
                along += tl.sum(do * o, 1)
            g = tl.dot(do * of_num[:, None], tl.trans(s), g, input_precision=PRECISION)
            if PAIRS > 0:
                s = tl.load(state + other[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
                h = tl.dot(do * of_num[:, None], tl.trans(s), h, input_precision=PRECISION)
        dden = along * of_den
        tl.store(dden_ptr + den_at + spot(first + t, side, strides_den), dden, mask=valid)
        if PAIRS > 0:
            if dcos_ptr is not None:
                turn_at, turn_first, turn_count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_turn)
                at_turn = turn_at + spot(first + t, side, strides_turn)[:, None] + d[None, :]
                tl.store(dcos_ptr + at_turn, g * a, mask=valid[:, None] & (d < 2 * PAIRS)[None, :])
                tl.store(dsin_ptr + at_turn, g * y, mask=valid[:, None] & (d < 2 * PAIRS)[None, :])
            g = g * cos - h * sin * sign[None, :]
        if dq_ptr is not None:
            g = feature_grads(x, a, g + dden[:, None] * z[None, :], d, z, rate, D, MAP, False)
            at_dq = spot(first + t, side, strides_dq)[:, None] + d[None, :]
            tl.store(dq_ptr + dq_at + at_dq, g.to(dq_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@triton.jit
def _state_grads(
    dout_ptr, q_ptr, state_ptr, dden_ptr, dstate_ptr, cos_ptr, sin_ptr, cu_q_ptr, strides_do, strides_q, strides_den,
    strides_table, rows, columns, heads, group, tokens, side, parts, rate, scale, offset, eps,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr,
    DETACH: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradients of the states of the parts, as they lie. Grid: S Hk (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // group
    seq, kv_head = unit // kv_heads, unit % kv_heads
    d, e = tl.arange(0, BD), tile * BE + tl.arange(0, BE)
    state = state_ptr + unit.to(tl.int64) * ((D + 1) * (E + 1))
    z = tl.load(state + d * (E + 1) + E, mask=d < D, other=0.0)
    n = tl.load(state + D * (E + 1) + E)
    ds = tl.zeros([BD, BE], tl.float32)
    dz = tl.zeros([BD], tl.float32)
    dvalues = tl.zeros([BE], tl.float32)
    for i in range(group):
        head = kv_head * group + i
        q_at, first, count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_q)
        do_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_do)
        den_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_den)
        start, stop = part_of(count, part, parts, BLOCK)
        for at in range(start, stop, BLOCK):
            t = at + tl.arange(0, BLOCK)
            valid = t < stop
            x = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), d, D, strides_q[6], valid).to(tl.float32)
            a = tl.where(valid[:, None], features(x, d, z, rate, D, MAP, False), 0.0)
            of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, DETACH)
            do = load_rows(dout_ptr + do_at, spot(first + t, side, strides_do), e, E, strides_do[6], valid).to(tl.float32)
            dden = tl.load(dden_ptr + den_at + spot(first + t, side, strides_den), mask=valid, other=0.0)
            turned = a
            if PAIRS > 0:
                other, sign = partner(d, PAIRS, HALF)
                y = load_rows(q_ptr + q_at, spot(first + t, side, strides_q), other, D, strides_q[6], valid).to(tl.float32)
                y = tl.where(valid[:, None], features(y, d, z, rate, D, MAP, False), 0.0)
                cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, d, strides_table, valid, PAIRS, HALF)
                turned = a * cos + y * sin * sign[None, :]
            ds = tl.dot(tl.trans(turned), do * of_num[:, None], ds, input_precision=PRECISION)
            dz += tl.sum(a * dden[:, None], 0)
            dvalues += tl.sum(do * of_values[:, None], 0)
    out = dstate_ptr + (part * tl.num_programs(0) + unit).to(tl.int64) * ((D + 1) * (E + 1))
    tl.store(out + d[:, None] * (E + 1) + e[None, :], ds, mask=(d < D)[:, None] & (e < E)[None, :])
    tl.store(out + D * (E + 1) + e, dvalues, mask=e < E)
    if tile == 0:
        tl.store(out + d * (E + 1) + E, dz, mask=d < D)
        tl.store(out + D * (E + 1) + E, 0.0)


@triton.jit
def _key_grads(
    k_ptr, v_ptr, mask_ptr, weight_ptr, lse_ptr, shift_ptr, dstate_ptr, dk_ptr, dv_ptr, dweight_ptr, cos_ptr, sin_ptr, dcos_ptr,
    dsin_ptr, cu_k_ptr, strides_k, strides_v, strides_mask, strides_weight, strides_dk, strides_dv, strides_dw, strides_table,
    strides_turn, rows, columns, heads, tokens, side, parts, rate,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Grid: S Hk (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    k_at, first, count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_k)
    v_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_v)
    mask_at, _, _ = place(seq, head * 0, cu_k_ptr, rows, columns, tokens, strides_mask)
    weight_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_weight)
    dk_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_dk)
    dv_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_dv)
    dw_at, _, _ = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_dw)
    start, stop = part_of(count, part, parts, BLOCK)
    d = tl.arange(0, BD)
    dstate = dstate_ptr + unit.to(tl.int64) * ((D + 1) * (E + 1))
    dz = tl.load(dstate + d * (E + 1) + E, mask=d < D, other=0.0)
    lse = tl.zeros([BD], tl.float32)
    shift = lse
    if MAP == 5:
        lse = tl.load(lse_ptr + unit.to(tl.int64) * D + d, mask=d < D, other=0.0)
        shift = tl.load(shift_ptr + unit.to(tl.int64) * D + d, mask=d < D, other=0.0)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        inside = t < stop
        valid = inside
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        x = load_rows(k_ptr + k_at, spot(first + t, side, strides_k), d, D, strides_k[6], valid).to(tl.float32)
        b = tl.where(valid[:, None], features(x, d, lse, rate, D, MAP, True), 0.0)
        w = tl.full([BLOCK], 1.0, tl.float32)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + weight_at + spot(first + t, side, strides_weight), mask=valid, other=0.0).to(tl.float32)
        turned = b * w[:, None]
        g = tl.zeros([BLOCK, BD], tl.float32)
        h = g
        if PAIRS > 0:
            other, sign = partner(d, PAIRS, HALF)
            y = load_rows(k_ptr + k_at, spot(first + t, side, strides_k), other, D, strides_k[6], valid).to(tl.float32)
            y = tl.where(valid[:, None], features(y, d, lse, rate, D, MAP, True), 0.0) * w[:, None] * sign[None, :]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, d, strides_table, inside, PAIRS, HALF)
            turned = turned * cos + y * sin
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            ds = tl.load(dstate + d[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
            if dv_ptr is not None:
                dvalues = tl.load(dstate + D * (E + 1) + e, mask=e < E, other=0.0)
                dv = tl.dot(turned, ds, input_precision=PRECISION) + dvalues[None, :]
                dv = tl.where(valid[:, None], dv, 0.0)
                at_dv = spot(first + t, side, strides_dv)[:, None] + e[None, :]
                tl.store(dv_ptr + dv_at + at_dv, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
            v = load_rows(v_ptr + v_at, spot(first + t, side, strides_v), e, E, strides_v[6], valid).to(tl.float32)
            g = tl.dot(v, tl.trans(ds), g, input_precision=PRECISION)
            if PAIRS > 0:
                ds = tl.load(dstate + other[:, None] * (E + 1) + e[None, :], mask=(d < D)[:, None] & (e < E)[None, :], other=0.0)
                h = tl.dot(v, tl.trans(ds), h, input_precision=PRECISION)
        if PAIRS > 0:
            if dcos_ptr is not None:
                turn_at, turn_first, turn_count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_turn)
                at_turn = turn_at + spot(first + t, side, strides_turn)[:, None] + d[None, :]
                tl.store(dcos_ptr + at_turn, g * b * w[:, None], mask=inside[:, None] & (d < 2 * PAIRS)[None, :])
                tl.store(dsin_ptr + at_turn, g * y, mask=inside[:, None] & (d < 2 * PAIRS)[None, :])
            g = g * cos - h * sin * sign[None, :]
        g += dz[None, :]
        if dweight_ptr is not None:
            dw = tl.where(valid, tl.sum(b * g, 1), 0.0)
            tl.store(dweight_ptr + dw_at + spot(first + t, side, strides_dw), dw.to(dweight_ptr.dtype.element_ty), mask=inside)
        if dk_ptr is not None:
            dx = feature_grads(x, b, g * w[:, None], d, shift, rate, D, MAP, True)
            dx = tl.where(valid[:, None], dx, 0.0)
            at_dk = spot(first + t, side, strides_dk)[:, None] + d[None, :]
            tl.store(dk_ptr + dk_at + at_dk, dx.to(dk_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


def gradients(dout, dstate, dkey_lse, state, key_lse, *rest) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, key_weight and the four tables; the maps known here have no parameters."""
    *args, need = rest
    call = Call(*args)
    sequences, heads, kv_heads = count(call), call.q.shape[5], call.k.shape[5]
    wanted = (call.q, call.k, call.v, call.key_weight)
    new = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need >> i & 1 and x is not None else None
           for i, x in enumerate(wanted)]
    dq, dk, dv, dweight = new
    tables = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need >> 4 + i & 1 and x is not None else None
              for i, x in enumerate(args[5:9])]
    if not sequences:
        return (*new, *tables, None, None, None)
    turn_q, turn_k = (_turn(x, call, any(t is not None for t in pair))
                      for x, pair in ((call.q, tables[:2]), (call.k, tables[2:])))
    options = shared(call, backward=True)
    tiles = triton.cdiv(call.v.shape[6], options["BE"])
    total = torch.zeros_like(state)
    of_state = any(x is not None for x in (dk, dv, dweight, turn_k[0]))
    if dout is not None:
        dden = torch.empty(call.q.shape[:6], dtype=torch.float32, device=call.q.device)
        queries = side_of(call, call.q, heads, options["BLOCK"])
        common = {
            "dout_ptr": dout, "q_ptr": call.q, "state_ptr": state, "dden_ptr": dden, "cu_q_ptr": call.cu_q,
            "strides_do": strides(dout), "strides_q": strides(call.q), "strides_den": strides(dden),
            "group": heads // kv_heads, "DETACH": call.detach, **queries, **options, **divisor(call),
            **turning(call.cos_q, call.sin_q),
        }  # fmt: skip
        _query_grads[(sequences * heads, queries["parts"])](
            dq_ptr=dq, strides_dq=strides(dq), dcos_ptr=turn_q[0], dsin_ptr=turn_q[1], strides_turn=strides(turn_q[0]), **common)
        if of_state:
            parts = state.new_empty((queries["parts"], *state.shape))
            _state_grads[(sequences * kv_heads, queries["parts"], tiles)](dstate_ptr=parts, **common)
            total = add_parts(parts, torch.float32) if queries["parts"] > 1 else parts[0]
    if not of_state:
        return (*new, *_summed(turn_q, tables[:2], call), *(None,) * 5)
    if dstate is not None:
        total = total + dstate
    shift = (total[..., :-1, :] * state[..., :-1, :]).sum(-1).contiguous() if call.feature_map == "softmax" else total
    keys = side_of(call, call.k, kv_heads, options["BLOCK"])
    _key_grads[(sequences * kv_heads, keys["parts"])](
        v_ptr=call.v, lse_ptr=key_lse, shift_ptr=shift, dstate_ptr=total, dk_ptr=dk, dv_ptr=dv, dweight_ptr=dweight,
        strides_v=strides(call.v), strides_dk=strides(dk), strides_dv=strides(dv), strides_dw=strides(dweight), **of_keys(call),
        dcos_ptr=turn_k[0], dsin_ptr=turn_k[1], strides_turn=strides(turn_k[0]), **turning(call.cos_k, call.sin_k),
        **weighted(call), **keys, **options)
    return (*new, *_summed(turn_q, tables[:2], call), *_summed(turn_k, tables[2:], call), None, None, None)


def _turn(x: Tensor, call: Call, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """What each channel of each token leaves for its angle: [B, Wy, wy, Wx, wx, H, 2 pairs], twice."""
    if not wanted:
        return None, None
    return tuple(x.new_zeros((*x.shape[:6], 2 * call.cos_q.shape[3]), dtype=torch.float32) for _ in "ab")


def _summed(parts: tuple[Tensor | None, ...], tables: list[Tensor | None], call: Call) -> list[Tensor | None]:
    """The gradients of two tables [S|1, N, H|1, pairs]."""
    found = []
    for part, table in zip(parts, tables, strict=True):
        if table is None or part is None:
            found.append(None)
            continue
        of_pairs = part.unflatten(-1, (2, -1)).sum(-2) if call.half else part.unflatten(-1, (-1, 2)).sum(-1)
        rows = of_pairs.transpose(2, 3).flatten(3, 4).flatten(0, 2)                     # [S, N, H, pairs]
        found.append(rows.sum_to_size(table.shape))
    return found
