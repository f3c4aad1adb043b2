"""linear_attention by all pairs on a GPU, backward: a program takes the queries of one key head tile by tile, then its keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear_tiles import factors, feature_grads, features, load_rows, place, spot
from .linear_attention import Call, count, strides
from .linear_pairs import key_tile, told


@triton.jit
def _pair_grads(
    dout_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, weight_ptr, of_query_ptr, dq_ptr, dk_ptr, dv_ptr, dweight_ptr, strides_do, strides_q,
    strides_k, strides_v, strides_mask, strides_weight, strides_dq, strides_dk, strides_dv, strides_dw, rows, columns, heads, group,
    tokens, keys, side, key_side, rate, scale, offset, eps,
    D: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr, DIVISOR: tl.constexpr, DETACH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """of_query [S, H, 3, Nq] contiguous: of_num, of_values and the gradient of the sum of the scores. Grid: S Hk."""
    unit = tl.program_id(0)
    seq, kv_head = unit // (heads // group), unit % (heads // group)
    k_at = place(seq, kv_head, None, rows, columns, keys, strides_k)[0]
    v_at = place(seq, kv_head, None, rows, columns, keys, strides_v)[0]
    mask_at = place(seq, kv_head * 0, None, rows, columns, keys, strides_mask)[0]
    weight_at = place(seq, kv_head, None, rows, columns, keys, strides_weight)[0]
    d, e, tile = tl.arange(0, BD), tl.arange(0, BE), tl.arange(0, BLOCK)
    for g in range(group):
        head = kv_head * group + g
        q_at = place(seq, head, None, rows, columns, tokens, strides_q)[0]
        do_at = place(seq, head, None, rows, columns, tokens, strides_do)[0]
        dq_at = place(seq, head, None, rows, columns, tokens, strides_dq)[0]
        of_query = of_query_ptr + (seq * heads + head).to(tl.int64) * (3 * tokens)
        for first in range(0, tokens, BLOCK):
            i = first + tile
            inside = i < tokens
            x = load_rows(q_ptr + q_at, spot(i, side, strides_q), d, D, strides_q[6], inside).to(tl.float32)
            do = load_rows(dout_ptr + do_at, spot(i, side, strides_do), e, E, strides_do[6], inside).to(tl.float32)
            a = features(x, d, 0.0, rate, D, MAP, False)
            dot = tl.zeros([BLOCK], tl.float32)
            along = tl.zeros([BLOCK], tl.float32)                                          # <dout, num>
            of_sum = tl.zeros([BLOCK], tl.float32)                                         # <dout, V>
            n = 0.0
            for at in range(0, keys, BLOCK):
                y, b, w, v, valid = key_tile(
                    k_ptr, v_ptr, mask_ptr, weight_ptr, k_at, v_at, mask_at, weight_at, strides_k, strides_v, strides_mask,
                    strides_weight, at + tile, d, e, keys, key_side, rate, D, E, MAP)
                scores = tl.dot(a, tl.trans(b * w[:, None]), input_precision=PRECISION)
                dscores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                dot += tl.sum(scores, 1)
                along += tl.sum(scores * dscores, 1)
                of_sum += tl.sum(dscores, 1)
                n += tl.sum(valid.to(tl.float32))
            of_num, of_values, of_den = factors(dot, n, scale, offset, eps, DIVISOR, DETACH)
            dden = (of_sum if DIVISOR == 5 else along * of_num + of_sum * of_values) * of_den
            tl.store(of_query + i, of_num, mask=inside)
            tl.store(of_query + tokens + i, of_values, mask=inside)
            tl.store(of_query + 2 * tokens + i, dden, mask=inside)
            if dq_ptr is not None:
                da = tl.zeros([BLOCK, BD], tl.float32)
                for at in range(0, keys, BLOCK):
                    y, b, w, v, valid = key_tile(
                        k_ptr, v_ptr, mask_ptr, weight_ptr, k_at, v_at, mask_at, weight_at, strides_k, strides_v, strides_mask,
                        strides_weight, at + tile, d, e, keys, key_side, rate, D, E, MAP)
                    dscores = tl.dot(do, tl.trans(v), input_precision=PRECISION) * of_num[:, None] + dden[:, None]
                    da = tl.dot(dscores, b * w[:, None], da, input_precision=PRECISION)
                dx = feature_grads(x, a, da, d, dot, rate, D, MAP, False)
                at_dq = spot(i, side, strides_dq)[:, None] + d[None, :]
                tl.store(dq_ptr + dq_at + at_dq, dx.to(dq_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    tl.debug_barrier()                                                                     # what was kept of the queries is read
    dk_at = place(seq, kv_head, None, rows, columns, keys, strides_dk)[0]
    dv_at = place(seq, kv_head, None, rows, columns, keys, strides_dv)[0]
    dw_at = place(seq, kv_head, None, rows, columns, keys, strides_dw)[0]
    for at in range(0, keys, BLOCK):
        t = at + tile
        x, b, w, v, valid = key_tile(
            k_ptr, v_ptr, mask_ptr, weight_ptr, k_at, v_at, mask_at, weight_at, strides_k, strides_v, strides_mask,
            strides_weight, t, d, e, keys, key_side, rate, D, E, MAP)
        db = tl.zeros([BLOCK, BD], tl.float32)
        dv = tl.zeros([BLOCK, BE], tl.float32)
        for g in range(group):
            head = kv_head * group + g
            q_at = place(seq, head, None, rows, columns, tokens, strides_q)[0]
            do_at = place(seq, head, None, rows, columns, tokens, strides_do)[0]
            of_query = of_query_ptr + (seq * heads + head).to(tl.int64) * (3 * tokens)
            for first in range(0, tokens, BLOCK):
                i = first + tile
                inside = i < tokens
                y = load_rows(q_ptr + q_at, spot(i, side, strides_q), d, D, strides_q[6], inside).to(tl.float32)
                do = load_rows(dout_ptr + do_at, spot(i, side, strides_do), e, E, strides_do[6], inside).to(tl.float32)
                a = features(y, d, 0.0, rate, D, MAP, False)
                of_num = tl.load(of_query + i, mask=inside, other=0.0)
                of_values = tl.load(of_query + tokens + i, mask=inside, other=0.0)
                dden = tl.load(of_query + 2 * tokens + i, mask=inside, other=0.0)
                if dv_ptr is not None:
                    scores = tl.dot(b * w[:, None], tl.trans(a), input_precision=PRECISION)
                    dv = tl.dot(scores * of_num[None, :], do, dv, input_precision=PRECISION)
                    dv += tl.sum(do * of_values[:, None], 0)[None, :]
                if (dk_ptr is not None) or (dweight_ptr is not None):
                    dscores = tl.dot(v, tl.trans(do), input_precision=PRECISION) * of_num[None, :] + dden[None, :]
                    db = tl.dot(dscores, a, db, input_precision=PRECISION)
        here = t < keys
        if dv_ptr is not None:
            dv = tl.where(valid[:, None], dv, 0.0)
            at_dv = spot(t, key_side, strides_dv)[:, None] + e[None, :]
            tl.store(dv_ptr + dv_at + at_dv, dv.to(dv_ptr.dtype.element_ty), mask=here[:, None] & (e < E)[None, :])
        if dweight_ptr is not None:
            dw = tl.sum(b * db, 1)
            tl.store(dweight_ptr + dw_at + spot(t, key_side, strides_dw), dw.to(dweight_ptr.dtype.element_ty), mask=here)
        if dk_ptr is not None:
            dx = tl.where(valid[:, None], feature_grads(x, b, db * w[:, None], d, w, rate, D, MAP, True), 0.0)
            at_dk = spot(t, key_side, strides_dk)[:, None] + d[None, :]
            tl.store(dk_ptr + dk_at + at_dk, dx.to(dk_ptr.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])


def gradients(dout, _dstate, _dkept, _state, _kept, *rest) -> tuple[Tensor | None, ...]:
    """The gradients of q, k, v and key_weight; there is no state, and neither tables nor parameters of a map."""
    *args, need = rest
    call = Call(*args)
    new = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if need >> i & 1 and x is not None else None
           for i, x in enumerate((call.q, call.k, call.v, call.key_weight))]
    dq, dk, dv, dweight = new
    if dout is not None and count(call):
        of_query = call.q.new_empty((count(call), call.q.shape[5], 3, call.q.shape[2] * call.q.shape[4]), dtype=torch.float32)
        _pair_grads[(count(call) * call.k.shape[5],)](
            dout_ptr=dout, of_query_ptr=of_query, dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, dweight_ptr=dweight, strides_do=strides(dout),
            strides_dq=strides(dq), strides_dk=strides(dk), strides_dv=strides(dv), strides_dw=strides(dweight),
            DETACH=call.detach, **told(call, True))
    return (*new, *(None,) * 7)
