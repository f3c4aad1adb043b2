"""Backward of window_attention on a GPU: gradients of q, k, v, bias or table, logit_scale and the pad vectors.

P is computed again from lse, delta_i = sum_j P_ij dP_ij in the kernels; `out` is not needed. Windows of one tile take
one pass that keeps the bias gradient of its chunk of windows in registers; larger windows and grouped queries take the
three passes of _window_bwd_tiled. Sums over windows have a fixed number of chunks and are added in order: no atomics,
the same bits on every run. A NaN or infinity in a key or value that a bias or mask of -inf hides does not leak; values
that are not finite count as 0 where they are seen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import config, family, power
from ._reduce import add_parts, table_gradient
from ._tiles import clean, store_rows
from ._window_bwd_tiled import _backward_bias, _backward_keys, _backward_queries
from ._window_bwd_tiles import key_side, query_side, row_factor, weights
from ._window_host import UNSPECIALIZED, arguments, row_strides, tied_strides
from ._window_tiles import load_bias, row_offsets, seams, sides, unit_rows, unit_rows_grad


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_window(
    q_ptr, k_ptr, v_ptr, bias_ptr, index_ptr, tau_ptr, k_pad_ptr, v_pad_ptr, stream, dout_ptr, lse_ptr, dlse_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbias_ptr, dtau_ptr, dk_pad_ptr, dv_pad_ptr,
    q_strides, k_strides, v_strides, d_strides, dout_strides, dout_d_stride, dlse_strides, dq_strides, dq_d_stride,
    dk_strides, dk_d_stride, dv_strides, dv_d_stride, bias_strides, index_strides, pad_strides, tau_stride,
    lengths, counts, shifts, table_rows, windows, heads, total, chunks,
    scale, mask_value, cosine_max, cosine_eps, threshold, keep_scale,
    WINDOW: tl.constexpr, AXES: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr, PADS: tl.constexpr, SHIFTED: tl.constexpr,
    ROLL_FIRST: tl.constexpr, HIDE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of one head in a chunk of all images' windows, each window one tile of BLOCK_N >= N slots.
    Grid: heads (fastest) x chunks, on axis 0. Partial sums of a chunk go to [chunks, ...] buffers.
    Any strides: q, k, v, dout, dlse, dq, dk, dv, bias, index, the pad vectors and tau."""
    if k_strides is None:
        k_strides = q_strides
    if v_strides is None:
        v_strides = q_strides
    if dk_strides is None:
        dk_strides = dq_strides
    if dv_strides is None:
        dv_strides = dq_strides
    pid = tl.program_id(0)
    head = pid % heads
    chunk = (pid // heads).to(tl.int64)
    i = tl.arange(0, BLOCK_N)
    factor = row_factor(tau_ptr, tau_stride, head, scale, cosine_max)
    bias = load_bias(bias_ptr, index_ptr, bias_strides, index_strides, table_rows, head, i, i, N)
    side = sides(i, shifts, WINDOW, AXES, SHIFTED)
    dbias = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    dtau = tl.zeros([BLOCK_N], tl.float32)
    dk_pad = tl.zeros([BLOCK_D], tl.float32)
    dv_pad = tl.zeros([BLOCK_DV], tl.float32)

    first = (chunk * total // chunks).to(tl.int32)
    last = ((chunk + 1) * total // chunks).to(tl.int32)
    for work in tl.range(first, last, num_stages=STAGES):
        image, window = work // windows, work % windows
        q_raw, dout, lse, dlse, coords, tokens, _, real = query_side(
            image, window, head, i, heads, q_ptr, dout_ptr, lse_ptr, dlse_ptr,
            q_strides, dout_strides, dlse_strides, d_strides, dout_d_stride, lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        k_raw, v, _, _, pad, visible = key_side(
            image, window, head, i, k_ptr, v_ptr, k_pad_ptr, v_pad_ptr, k_strides, v_strides, d_strides, pad_strides,
            lengths, counts, shifts,
            WINDOW, AXES, N, D, DV, BLOCK_D, BLOCK_DV, PADS, SHIFTED, ROLL_FIRST, ALIGN)
        q = q_raw                                                                      # [BLOCK_N, BLOCK_D]
        k = k_raw                                                                      # [BLOCK_N, BLOCK_D]
        if tau_ptr is not None:
            q = unit_rows(q_raw, cosine_eps)
            k = unit_rows(k_raw, cosine_eps)
        a, p, dropped, dp = weights(
            q, k, v, dout, lse, tl.zeros_like(lse), bias, side, side, seams(window, counts, AXES, SHIFTED), visible,
            stream, image, head, tokens, 0, factor, mask_value, threshold, keep_scale,
            BLOCK_N, N, PADS, SHIFTED, HIDE, bias_ptr is not None)
        if q_ptr.dtype.element_ty == tl.float32:                                       # lse has been rounded
            norm = tl.sum(p, 1)
            norm = 1.0 / tl.where(norm == 0.0, 1.0, norm)
            p *= norm[:, None]
            dropped *= norm[:, None]
        delta = tl.sum(p * dp, 1) - dlse                                               # [BLOCK_N]
        ds = p * (dp - delta[:, None])                                                 # [BLOCK_N, BLOCK_N]
        if dbias_ptr is not None:
            dbias += ds
        if dtau_ptr is not None:
            dtau += tl.sum(tl.where(ds == 0.0, 0.0, ds * a), 1)
        ds = ds.to(q.dtype)                                                            # before the products: registers
        dropped = dropped.to(q.dtype)
        if dv_ptr is not None or dv_pad_ptr is not None:
            dv = tl.dot(tl.trans(dropped), dout, input_precision="ieee")
            if dv_ptr is not None:
                at = row_offsets(coords, image, head, dv_strides, AXES, ALIGN)
                store_rows(dv_ptr, at, real, dv_d_stride, dv, DV, BLOCK_DV)
            if dv_pad_ptr is not None:
                dv_pad += tl.sum(tl.where(pad[:, None], dv, 0.0), 0)
        if dq_ptr is not None:
            dq = tl.dot(ds, clean(k).to(k.dtype), input_precision="ieee") * factor
            if tau_ptr is not None:
                dq = unit_rows_grad(q_raw, dq, cosine_eps)
            at = row_offsets(coords, image, head, dq_strides, AXES, ALIGN)
            store_rows(dq_ptr, at, real, dq_d_stride, dq, D, BLOCK_D)
        if dk_ptr is not None or dk_pad_ptr is not None:
            dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * factor
            if tau_ptr is not None:
                dk = unit_rows_grad(k_raw, dk, cosine_eps)
            if dk_ptr is not None:
                at = row_offsets(coords, image, head, dk_strides, AXES, ALIGN)
                store_rows(dk_ptr, at, real, dk_d_stride, dk, D, BLOCK_D)
            if dk_pad_ptr is not None:
                dk_pad += tl.sum(tl.where(pad[:, None], dk, 0.0), 0)

    part = chunk * heads + head
    if dbias_ptr is not None:
        inside = (i < N)[:, None] & (i < N)[None, :]
        tl.store(dbias_ptr + part * N * N + (i[:, None] * N + i[None, :]), dbias, mask=inside)
    if dtau_ptr is not None:
        tau = tl.load(tau_ptr + head * tau_stride).to(tl.float32)
        tl.store(dtau_ptr + part, tl.where(tau <= cosine_max, tl.sum(dtau, 0), 0.0))
    if dk_pad_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        tl.store(dk_pad_ptr + part * D + d, dk_pad, mask=d < D)
    if dv_pad_ptr is not None:
        d = tl.arange(0, BLOCK_DV)
        tl.store(dv_pad_ptr + part * DV + d, dv_pad, mask=d < DV)


def bwd(
    dout, dlse, lse, q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible,
    scale, mask_value, cosine_max, cosine_eps, dropout_p, need, dq=None, dk=None, dv=None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbias, dlogit_scale, dk_pad, dv_pad), None where `need` says False; dq, dk, dv may be given."""
    dq = _output(need[0], dq, q)
    dk = _output(need[1], dk, k)
    dv = _output(need[2], dv, v)
    sums = [x is not None and wanted for x, wanted in zip((bias, logit_scale, k_pad, v_pad), need[3:], strict=True)]
    if q.numel() == 0 or (dout is None and dlse is None):
        for x in (dq, dk, dv):
            if x is not None:
                x.zero_()
        rest = [torch.zeros_like(x) if s else None
                for x, s in zip((bias, logit_scale, k_pad, v_pad), sums, strict=True)]
        return dq, dk, dv, *rest
    if dout is None:
        dout = v.new_zeros(()).expand(*q.shape[:-1], v.shape[-1])
    dout = dout.to(v.dtype)
    given = [x for x in (dq, dk, dv) if x is not None]
    shared = arguments(q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible,
                       scale, mask_value, cosine_max, cosine_eps, dropout_p, [dout, *given])
    axes = len(window)
    shared |= {
        "dout_ptr": dout, "lse_ptr": lse.contiguous(), "dout_strides": row_strides(dout, axes),
        "dout_d_stride": dout.stride(-1), "enable_fp_fusion": True,
    }  # fmt: skip
    grads = {"dlse_ptr": dlse, "dlse_strides": (0,) * 6 if dlse is None else row_strides(dlse[..., None], axes)}
    outputs = {"dq": dq, "dk": dk, "dv": dv}
    grads |= tied_strides(outputs, axes) | {f"{n}_ptr": x for n, x in outputs.items()}
    grads |= {f"{n}_d_stride": 1 if x is None else x.stride(-1) for n, x in outputs.items()}
    passes = _one_pass if _fits_one_tile(shared, q) else _three_passes
    dense, dtau, dk_parts, dv_parts = passes(shared, grads, sums, q)

    dbias = None
    if sums[0] and index is not None:
        dense = dense[0] if len(dense) == 1 else add_parts(dense, torch.float32)
        dbias = table_gradient(dense, index, bias.shape[0], bias.dtype)
    elif sums[0] and bias.shape == dense.shape[1:]:
        dbias = add_parts(dense, bias.dtype)
    elif sums[0]:
        dbias = add_parts(dense, torch.float32).sum_to_size(bias.shape).to(bias.dtype)
    dtau = add_parts(dtau, logit_scale.dtype) if sums[1] else None
    dk_pad = add_parts(dk_parts, k_pad.dtype) if sums[2] else None
    dv_pad = add_parts(dv_parts, v_pad.dtype) if sums[3] else None
    return dq, dk, dv, dbias, dtau, dk_pad, dv_pad


def _output(wanted: bool, given: Tensor | None, like: Tensor) -> Tensor | None:
    """Where a gradient goes: the given view, a new contiguous tensor, or nowhere."""
    if not wanted:
        return None
    return torch.empty(like.shape, dtype=like.dtype, device=like.device) if given is None else given


def _tuned(kernel: str, shared: dict, q: Tensor) -> dict:
    width = max(shared["BLOCK_D"], shared["BLOCK_DV"])
    return config("window_attention", family(q.device), kernel, shared["N"], width, q.element_size())


def _fits_one_tile(shared: dict, q: Tensor) -> bool:
    """Whether one pass holds a window in registers. Cosine scores and dropout keep more: their small windows only."""
    block = _tuned("backward_window", shared, q)["block"]
    plain = shared["tau_ptr"] is None and shared["threshold"] == 0
    return shared["GROUP"] == 1 and block >= shared["N"] and (plain or block <= 16)


def _one_pass(shared: dict, grads: dict, sums: list[bool], q: Tensor):
    """Partial sums [chunks, ...] of dbias, dtau, dk_pad and dv_pad; writes dq, dk and dv."""
    n, heads, total = shared["N"], shared["heads"], q.shape[0] * shared["windows"]
    tuned = _tuned("backward_window", shared, q)
    chunks = min(total, max(1, tuned["programs"] // heads))
    shapes = ((chunks, heads, n, n), (chunks, heads), (chunks, heads, shared["D"]), (chunks, heads, shared["DV"]))
    parts = [q.new_empty(s, dtype=torch.float32) if wanted else None for s, wanted in zip(shapes, sums, strict=True)]
    _backward_window[(heads * chunks,)](
        **shared, **grads, dbias_ptr=parts[0], dtau_ptr=parts[1], dk_pad_ptr=parts[2], dv_pad_ptr=parts[3],
        total=total, chunks=chunks, BLOCK_N=power(n),
        STAGES=tuned["stages"], num_warps=tuned["warps"], num_stages=tuned["stages"],
    )
    return parts


def _three_passes(shared: dict, grads: dict, sums: list[bool], q: Tensor):
    """The same by query tiles, key tiles and bias tiles; the parts of dtau and the pads are one per tile and window."""
    n, heads, total = shared["N"], shared["heads"], q.shape[0] * shared["windows"]
    key_heads = heads // shared["GROUP"]
    by_query, by_key, by_bias = (_tuned(f"backward_{x}", shared, q) for x in ("queries", "keys", "bias"))
    delta = torch.empty_like(shared["lse_ptr"])
    low = torch.empty_like(delta) if q.dtype == torch.float32 else None

    def part(wanted, *shape):
        return q.new_empty(shape, dtype=torch.float32) if wanted else None

    def launch(kernel, tuned, programs, names, **rest):
        block_m, block_n = min(tuned["block_m"], power(n)), min(tuned["block_n"], power(n))
        kernel[(programs,)](
            **shared, **{x: grads[x] for x in names}, **rest, delta_ptr=delta, low_ptr=low,
            BLOCK_M=block_m, BLOCK_N=block_n,
            STAGES=tuned["stages"], num_warps=tuned["warps"], num_stages=tuned["stages"],
        )

    tiles = total * -(-n // min(by_query["block_m"], power(n)))
    dtau = part(sums[1], tiles, heads)
    launch(_backward_queries, by_query, tiles * heads,
           ("dlse_ptr", "dlse_strides", "dq_ptr", "dq_strides", "dq_d_stride"), dtau_ptr=dtau)

    tiles = total * -(-n // min(by_key["block_n"], power(n)))
    dk_pad, dv_pad = part(sums[2], tiles, key_heads, shared["D"]), part(sums[3], tiles, key_heads, shared["DV"])
    if grads["dk_ptr"] is not None or grads["dv_ptr"] is not None or sums[2] or sums[3]:
        launch(_backward_keys, by_key, tiles * key_heads,
               ("dk_ptr", "dk_d_stride", "dv_ptr", "dv_d_stride", "dq_strides", "dk_strides", "dv_strides"),
               dk_pad_ptr=dk_pad, dv_pad_ptr=dv_pad)

    dense = None
    if sums[0]:
        fans = heads * -(-n // min(by_bias["block_m"], power(n))) * -(-n // min(by_bias["block_n"], power(n)))
        chunks = min(total, max(1, by_bias["programs"] // fans))
        dense = part(True, chunks, heads, n, n)
        launch(_backward_bias, by_bias, fans * chunks, (), dbias_ptr=dense, total=total, chunks=chunks)
    return dense, dtau, dk_pad, dv_pad
