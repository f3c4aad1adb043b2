"""linear_attention on a GPU, backward: what each query leaves, the gradient of the states in parts added in order, the keys."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import power
from ._linear_maps import facing, halves, line, phi, rests_on, swapped
from ._linear_tiles import angles, factors, feature_grads, load_rows, part_of, partner, place, spot
from ._reduce import add_parts
from .linear_attention import Call, count, divisor, of_keys, shared, side_of, strides, turning, weighted


@triton.jit
def _query_grads(
    dout_ptr, q_ptr, kept_ptr, maps, state_ptr, dq_ptr, dden_ptr, cos_ptr, sin_ptr, dcos_ptr, dsin_ptr, cu_q_ptr, strides_do,
    strides_q, strides_dq, strides_den, strides_table, strides_turn, rows, columns, heads, group, tokens, side, parts, rate,
    scale, offset, eps,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr, DETACH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq, of a map with parameters the gradient of the features; that of every <a, z>, float32. Grid: S H (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    q_at, first, count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_q)
    do_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_do)
    dq_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_dq)
    den_at, _, _ = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_den)
    start, stop = part_of(count, part, parts, BLOCK)
    f = tl.arange(0, BF)
    state = state_ptr + (seq * (heads // group) + head // group).to(tl.int64) * ((F + 1) * (E + 1))
    z = tl.load(state + f * (E + 1) + E, mask=f < F, other=0.0)
    n = tl.load(state + F * (E + 1) + E)
    kept = rests_on(kept_ptr, seq * (heads // group) + head // group, f, F, MAP, False)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        at_q = q_at + spot(first + t, side, strides_q)
        token = line(seq, first, cu_q_ptr, columns, tokens) + t
        x, a = phi(q_ptr, at_q, f, kept, valid, strides_q[6], maps, head, token, rate, False,
                   D, F, M, MAP, OWN, EXACT, BD, BM)
        of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, DETACH)
        turned = a
        if PAIRS > 0:
            other, sign = partner(f, PAIRS, HALF)
            y = phi(q_ptr, at_q, other, kept, valid, strides_q[6], maps, head, token, rate, False,
                    D, F, M, MAP, OWN, EXACT, BD, BM)[1]
            y = y * sign[None, :]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, f, strides_table, valid, PAIRS, HALF)
            turned = a * cos + y * sin
        held = tl.zeros([BLOCK], tl.float32)                                           # <dout, V>
        g = tl.zeros([BLOCK, BF], tl.float32)
        h = g                                                                          # g of each channel's partner
        if MAP == 10:                                                                  # that of the second half of the values
            z_b = swapped(state, f, F, E)
            num_b, values_b, den_b = factors(tl.sum(a * z_b[None, :], 1), n, scale, offset, eps, DIVISOR, DETACH)
            held_b = held
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            s = tl.load(state + facing(f, e, F, E, MAP) * (E + 1) + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
            do = load_rows(dout_ptr + do_at, spot(first + t, side, strides_do), e, E, strides_do[6], valid).to(tl.float32)
            values = tl.load(state + F * (E + 1) + e, mask=e < E, other=0.0)
            if MAP == 10:
                do_b = tl.where((e < E // 2)[None, :], 0.0, do)
                do = tl.where((e < E // 2)[None, :], do, 0.0)
                held_b += tl.sum(do_b * values[None, :], 1)
                h = tl.dot(do_b * num_b[:, None], tl.trans(s), h, input_precision=PRECISION)
            held += tl.sum(do * values[None, :], 1)
            g = tl.dot(do * of_num[:, None], tl.trans(s), g, input_precision=PRECISION)
            if PAIRS > 0 and BF <= 128:
                s = tl.load(state + other[:, None] * (E + 1) + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
                h = tl.dot(do * of_num[:, None], tl.trans(s), h, input_precision=PRECISION)
        dden = _along(held, g, turned, of_values, DIVISOR) * of_den
        tl.store(dden_ptr + den_at + spot(first + t, side, strides_den), dden, mask=valid)
        if MAP == 10:
            dden_b = _along(held_b, h, turned, values_b, DIVISOR) * den_b
            tl.store(dden_ptr + den_at + spot(first + t, side, strides_den) + 1, dden_b, mask=valid)
            g += h
        if PAIRS > 0:
            if dcos_ptr is not None:
                turn_at, turn_first, turn_count = place(seq, head, cu_q_ptr, rows, columns, tokens, strides_turn)
                at_turn = turn_at + spot(first + t, side, strides_turn)[:, None] + f[None, :]
                tl.store(dcos_ptr + at_turn, g * a, mask=valid[:, None] & (f < 2 * PAIRS)[None, :])
                tl.store(dsin_ptr + at_turn, g * y, mask=valid[:, None] & (f < 2 * PAIRS)[None, :])
            if BF > 128:
                h = tl.gather(g, other[None, :] + tl.zeros([BLOCK, BF], tl.int32), 1)
            g = g * cos - h * sin * sign[None, :]
        if dq_ptr is not None:
            g += dden[:, None] * z[None, :]
            if MAP == 10:
                g += dden_b[:, None] * z_b[None, :]
            elif MAP < 8:
                g = feature_grads(x, a, g, f, z, rate, D, MAP, False)
            at_dq = spot(first + t, side, strides_dq)[:, None] + f[None, :]
            tl.store(dq_ptr + dq_at + at_dq, g.to(dq_ptr.dtype.element_ty), mask=valid[:, None] & (f < F)[None, :])


@triton.jit
def _along(held, g, turned, of_values, DIVISOR: tl.constexpr):
    """<dout, o>, or what `factors` wants in its place; g is S times dout and the factor of the numerator."""
    if DIVISOR == 5:
        along = held
    elif DIVISOR == 2:
        along = held * 0.0
    else:
        along = tl.sum(turned * g, 1) + held * of_values
    return along


@triton.jit
def _state_grads(
    dout_ptr, q_ptr, kept_ptr, maps, state_ptr, dden_ptr, dstate_ptr, cos_ptr, sin_ptr, cu_q_ptr, strides_do, strides_q,
    strides_den, strides_table, rows, columns, heads, group, tokens, side, parts, rate, scale, offset, eps,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, DIVISOR: tl.constexpr, DETACH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradients of the states of the parts, as they lie. Grid: S Hk (fastest), parts, tiles of E."""
    unit, part, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_heads = heads // group
    seq, kv_head = unit // kv_heads, unit % kv_heads
    f, e = tl.arange(0, BF), tile * BE + tl.arange(0, BE)
    state = state_ptr + unit.to(tl.int64) * ((F + 1) * (E + 1))
    z = tl.load(state + f * (E + 1) + E, mask=f < F, other=0.0)
    n = tl.load(state + F * (E + 1) + E)
    kept = rests_on(kept_ptr, unit, f, F, MAP, False)
    ds = tl.zeros([BF, BE], tl.float32)
    dz = tl.zeros([BF], tl.float32)
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
            at_q = q_at + spot(first + t, side, strides_q)
            token = line(seq, first, cu_q_ptr, columns, tokens) + t
            a = phi(q_ptr, at_q, f, kept, valid, strides_q[6], maps, head, token, rate, False,
                    D, F, M, MAP, OWN, EXACT, BD, BM)[1]
            a = tl.where(valid[:, None], a, 0.0)
            of_num, of_values, of_den = factors(tl.sum(a * z[None, :], 1), n, scale, offset, eps, DIVISOR, DETACH)
            do = load_rows(dout_ptr + do_at, spot(first + t, side, strides_do), e, E, strides_do[6], valid).to(tl.float32)
            dden = tl.load(dden_ptr + den_at + spot(first + t, side, strides_den), mask=valid, other=0.0)
            turned = a
            if PAIRS > 0:
                other, sign = partner(f, PAIRS, HALF)
                y = phi(q_ptr, at_q, other, kept, valid, strides_q[6], maps, head, token, rate, False,
                        D, F, M, MAP, OWN, EXACT, BD, BM)[1]
                y = tl.where(valid[:, None], y, 0.0)
                cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, f, strides_table, valid, PAIRS, HALF)
                turned = a * cos + y * sin * sign[None, :]
            num_of, values_of = of_num[:, None], of_values[:, None]
            if MAP == 10:
                dot = tl.sum(a * swapped(state, f, F, E)[None, :], 1)
                num_b, values_b, of_den = factors(dot, n, scale, offset, eps, DIVISOR, DETACH)
                num_of, values_of = halves(e, E, of_num, num_b), halves(e, E, of_values, values_b)
                dden_b = tl.load(dden_ptr + den_at + spot(first + t, side, strides_den) + 1, mask=valid, other=0.0)
                f_b = tl.where(f < F, (f + F // 2) % F, f)
                y = phi(q_ptr, at_q, f_b, kept, valid, strides_q[6], maps, head, token, rate, False,
                        D, F, M, MAP, OWN, EXACT, BD, BM)[1]
                dz += tl.sum(tl.where(valid[:, None], y, 0.0) * dden_b[:, None], 0)
            ds = tl.dot(tl.trans(turned), do * num_of, ds, input_precision=PRECISION)
            dz += tl.sum(a * dden[:, None], 0)
            dvalues += tl.sum(do * values_of, 0)
    out = dstate_ptr + (part * tl.num_programs(0) + unit).to(tl.int64) * ((F + 1) * (E + 1))
    tl.store(out + facing(f, e, F, E, MAP) * (E + 1) + e[None, :], ds, mask=(f < F)[:, None] & (e < E)[None, :])
    tl.store(out + F * (E + 1) + e, dvalues, mask=e < E)
    if tile == 0:
        tl.store(out + f * (E + 1) + E, dz, mask=f < F)
        tl.store(out + F * (E + 1) + E, 0.0)


@triton.jit
def _key_grads(
    k_ptr, v_ptr, mask_ptr, weight_ptr, kept_ptr, maps, shift_ptr, dstate_ptr, dk_ptr, dv_ptr, dweight_ptr, cos_ptr, sin_ptr,
    dcos_ptr, dsin_ptr, cu_k_ptr, strides_k, strides_v, strides_mask, strides_weight, strides_dk, strides_dv, strides_dw,
    strides_table, strides_turn, rows, columns, heads, tokens, side, parts, rate,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dk as dq of the queries, dv, dweight. Grid: S Hk (fastest), parts."""
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
    f = tl.arange(0, BF)
    dstate = dstate_ptr + unit.to(tl.int64) * ((F + 1) * (E + 1))
    dz = tl.load(dstate + f * (E + 1) + E, mask=f < F, other=0.0)
    kept = rests_on(kept_ptr, unit, f, F, MAP, True)
    shift = dz
    if MAP == 5:
        shift = tl.load(shift_ptr + unit.to(tl.int64) * D + f, mask=f < F, other=0.0)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        inside = t < stop
        valid = inside
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        at_k = k_at + spot(first + t, side, strides_k)
        token = line(seq, first, cu_k_ptr, columns, tokens) + t
        x, b = phi(k_ptr, at_k, f, kept, valid, strides_k[6], maps, head, token, rate, True,
                   D, F, M, MAP, OWN, EXACT, BD, BM)
        b = tl.where(valid[:, None], b, 0.0)
        w = tl.full([BLOCK], 1.0, tl.float32)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + weight_at + spot(first + t, side, strides_weight), mask=valid, other=0.0).to(tl.float32)
        turned = b * w[:, None]
        g = tl.zeros([BLOCK, BF], tl.float32)
        h = g
        if PAIRS > 0:
            other, sign = partner(f, PAIRS, HALF)
            y = phi(k_ptr, at_k, other, kept, valid, strides_k[6], maps, head, token, rate, True,
                    D, F, M, MAP, OWN, EXACT, BD, BM)[1]
            y = tl.where(valid[:, None], y, 0.0) * w[:, None] * sign[None, :]
            cos, sin = angles(cos_ptr, sin_ptr, seq, head, first + t, f, strides_table, inside, PAIRS, HALF)
            turned = turned * cos + y * sin
        for e0 in range(0, E, BE):
            e = e0 + tl.arange(0, BE)
            ds = tl.load(dstate + f[:, None] * (E + 1) + e[None, :], mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
            if dv_ptr is not None:
                dvalues = tl.load(dstate + F * (E + 1) + e, mask=e < E, other=0.0)
                dv = tl.dot(turned, ds, input_precision=PRECISION) + dvalues[None, :]
                dv = tl.where(valid[:, None], dv, 0.0)
                at_dv = spot(first + t, side, strides_dv)[:, None] + e[None, :]
                tl.store(dv_ptr + dv_at + at_dv, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
            if dk_ptr is not None or dweight_ptr is not None or dcos_ptr is not None:
                v = load_rows(v_ptr + v_at, spot(first + t, side, strides_v), e, E, strides_v[6], valid).to(tl.float32)
                g = tl.dot(v, tl.trans(ds), g, input_precision=PRECISION)
                if PAIRS > 0 and BF <= 128:
                    at_ds = other[:, None] * (E + 1) + e[None, :]
                    ds = tl.load(dstate + at_ds, mask=(f < F)[:, None] & (e < E)[None, :], other=0.0)
                    h = tl.dot(v, tl.trans(ds), h, input_precision=PRECISION)
        if PAIRS > 0:
            if dcos_ptr is not None:
                turn_at, turn_first, turn_count = place(seq, head, cu_k_ptr, rows, columns, tokens, strides_turn)
                at_turn = turn_at + spot(first + t, side, strides_turn)[:, None] + f[None, :]
                tl.store(dcos_ptr + at_turn, g * b * w[:, None], mask=inside[:, None] & (f < 2 * PAIRS)[None, :])
                tl.store(dsin_ptr + at_turn, g * y, mask=inside[:, None] & (f < 2 * PAIRS)[None, :])
            if BF > 128:
                h = tl.gather(g, other[None, :] + tl.zeros([BLOCK, BF], tl.int32), 1)
            g = g * cos - h * sin * sign[None, :]
        g += dz[None, :]
        if dweight_ptr is not None:
            dw = tl.where(valid, tl.sum(b * g, 1), 0.0)
            tl.store(dweight_ptr + dw_at + spot(first + t, side, strides_dw), dw.to(dweight_ptr.dtype.element_ty), mask=inside)
        if dk_ptr is not None:
            dx = g * w[:, None]
            if MAP < 8:
                dx = feature_grads(x, b, dx, f, shift, rate, D, MAP, True)
            dx = tl.where(valid[:, None], dx, 0.0)
            at_dk = spot(first + t, side, strides_dk)[:, None] + f[None, :]
            tl.store(dk_ptr + dk_at + at_dk, dx.to(dk_ptr.dtype.element_ty), mask=inside[:, None] & (f < F)[None, :])


def gradients(dout, dstate, dkept, state, kept, *rest) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v, key_weight, the four tables and the three parameters of the feature map."""
    from .linear_maps import parameters
    from .linear_maps_bwd import map_gradients

    *args, need = rest
    call = Call(*args)
    sequences, heads, kv_heads = count(call), call.q.shape[5], call.k.shape[5]
    made = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need >> i & 1 and x is not None else None
            for i, x in enumerate((*args[:3], *args[4:9], *args[11:14]))]
    new, tables, of_map = made[:4], made[4:8], made[8:]
    dq, dk, dv, dweight = new
    if not sequences:
        return tuple(made)
    turn_q, turn_k = (_turn(x, call, any(t is not None for t in pair))
                      for x, pair in ((call.q, tables[:2]), (call.k, tables[2:])))
    options = shared(call, backward=True)
    maps = parameters(call, options)
    learned = options["MAP"] >= 8
    if learned:                                              # what the kernels below leave are the gradients of the features
        want = [t is not None for t in of_map]
        dq, dk = (x.new_zeros((*x.shape[:6], options["F"]), dtype=torch.float32) if dx is not None or any(want) else None
                  for x, dx in ((call.q, dq), (call.k, dk)))
    tiles = triton.cdiv(call.v.shape[6], options["BE"])
    total = torch.zeros_like(state)
    of_state = any(x is not None for x in (dk, dv, dweight, turn_k[0]))
    if dout is not None:
        dden = call.q.new_empty((*call.q.shape[:6], 2 if call.feature_map == "polar" else 1), dtype=torch.float32)
        queries = side_of(call, call.q, heads, options["BLOCK"])
        common = {
            "dout_ptr": dout, "q_ptr": call.q, "kept_ptr": kept, "maps": maps[0], "state_ptr": state, "dden_ptr": dden,
            "cu_q_ptr": call.cu_q, "strides_do": strides(dout), "strides_q": strides(call.q), "strides_den": strides(dden),
            "group": heads // kv_heads, "DETACH": call.detach, **queries, **options, **divisor(call),
            **turning(call.cos_q, call.sin_q),
        }  # fmt: skip
        own = common | ({"BE": min(power(call.v.shape[6]), 32)} if options["BF"] > 128 and options["PRECISION"] == "tf32" else {})
        _query_grads[(sequences * heads, queries["parts"])](
            dq_ptr=dq, strides_dq=strides(dq), dcos_ptr=turn_q[0], dsin_ptr=turn_q[1], strides_turn=strides(turn_q[0]), **own)
        if of_state:
            parts = state.new_empty((queries["parts"], *state.shape))
            _state_grads[(sequences * kv_heads, queries["parts"], tiles)](dstate_ptr=parts, **common)
            total = add_parts(parts, torch.float32) if queries["parts"] > 1 else parts[0]
    if of_state:
        if dstate is not None:
            total = total + dstate
        shift = (total[..., :-1, :] * state[..., :-1, :]).sum(-1).contiguous() if call.feature_map == "softmax" else total
        keys = side_of(call, call.k, kv_heads, options["BLOCK"])
        launch = functools.partial(
            _key_grads[(sequences * kv_heads, keys["parts"])], v_ptr=call.v, kept_ptr=kept, maps=maps[1], shift_ptr=shift,
            dstate_ptr=total, strides_v=strides(call.v), strides_dk=strides(dk), strides_dv=strides(dv),
            strides_dw=strides(dweight), strides_turn=strides(turn_k[0]), **of_keys(call),
            **turning(call.cos_k, call.sin_k), **weighted(call), **keys, **options)
        others = {"dk_ptr": dk, "dweight_ptr": dweight, "dcos_ptr": turn_k[0], "dsin_ptr": turn_k[1]}
        if options["BF"] > 128 and options["PRECISION"] == "ieee" and dv is not None:        # both take too many registers
            launch(dv_ptr=dv, **dict.fromkeys(others))
            dv = None
        if any(t is not None for t in (dv, *others.values())):
            launch(dv_ptr=dv, **others)
    if learned:
        of_map = map_gradients(call, kept, maps, [dq, dk], new[:2], options, want)
    return (*new, *_summed(turn_q, tables[:2], call), *_summed(turn_k, tables[2:], call), *of_map)


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
