"""bipartite_match on a GPU: the best destination of every source, without the matrix of similarities.

The meaning of every argument is that of the reference, vitkern/reference/bipartite_match.py. Tokens stand in slots: the
sources by position, then the destinations by position, then the rest. A program holds BLOCK_M slots; destination tiles
stream through, and each leaves only the running maximum and its slot. Norms are applied to the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power

ROLES = {"SOURCE": 0, "DESTINATION": 1, "PROTECTED": 3}
TILES = {  # by bytes of what the product reads; float32 products are done without tensor cores, windows need registers
    2: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_C": 64, "warps": 4, "stages": 2},
    4: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_C": 32, "warps": 4, "stages": 1},
}


@triton.jit
def _positions(slot, order_ptr, sources, valid, ALTERNATE: tl.constexpr):
    """The position of the tokens in these slots."""
    if ALTERNATE:
        at = tl.where(slot < sources, 2 * slot, 2 * (slot - sources) + 1)
    else:
        at = tl.load(order_ptr + slot, mask=valid, other=0)
    return at


@triton.jit
def _channels(base, position, valid, start, token_stride, head_stride, dim_stride, HEADS: tl.constexpr, C: tl.constexpr,
              BLOCK_C: tl.constexpr):  # fmt: skip
    """Channels start.. of these tokens, the sum over heads: [tokens, BLOCK_C]. Raw where there is one head."""
    c = start + tl.arange(0, BLOCK_C)
    at = base + position[:, None].to(tl.int64) * token_stride + c[None, :] * dim_stride
    keep = valid[:, None] & (c < C)[None, :]
    x = tl.load(at, mask=keep, other=0.0)
    if HEADS > 1:
        x = x.to(tl.float32)
        for h in range(1, HEADS):
            x += tl.load(at + h * head_stride, mask=keep, other=0.0).to(tl.float32)
    return x


@triton.jit
def _allowed(i, j, segment_i, segments_ptr, segment_token, window_y, window_x, grid_start, grid_width, valid,
             SEGMENTS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Whether segments and window let the tokens at i and j match, [BLOCK_M, BLOCK_N]."""
    ok = (i[:, None] >= 0) & (j[None, :] >= 0)
    if SEGMENTS:
        segment_j = tl.load(segments_ptr + j * segment_token, mask=valid, other=0)
        ok = ok & (segment_i[:, None] == segment_j[None, :])
    if WINDOW == 1:
        ok = ok & (tl.abs(i[:, None] - j[None, :]) <= window_y)
    if WINDOW == 2:
        a, b = i - grid_start, j - grid_start
        ok = ok & (a >= 0)[:, None] & (b >= 0)[None, :]
        ok = ok & (tl.abs(a[:, None] // grid_width - b[None, :] // grid_width) <= window_y)
        ok = ok & (tl.abs(a[:, None] % grid_width - b[None, :] % grid_width) <= window_x)
    return ok


@triton.jit
def _match(
    metric_ptr, role_ptr, order_ptr, counts_ptr, segments_ptr, score_ptr, dst_ptr, role_out_ptr,
    metric_strides, role_strides, segment_strides, tokens, sources, destinations, protect,
    window_y, window_x, grid_start, grid_width, eps, head_factor,
    ALTERNATE: tl.constexpr, COSINE: tl.constexpr, SEGMENTS: tl.constexpr, WINDOW: tl.constexpr, HEADS: tl.constexpr,
    C: tl.constexpr, SOURCE: tl.constexpr, DESTINATION: tl.constexpr, PROTECTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """score, dst and role of BLOCK_M slots of one sample. Grid: slot blocks (fastest) x samples, on axis 0."""
    blocks = (tokens + BLOCK_M - 1) // BLOCK_M
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    slot = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    if not ALTERNATE:
        sources = tl.load(counts_ptr + 2 * sample)
        destinations = tl.load(counts_ptr + 2 * sample + 1)
        order_ptr += sample * tokens
        role_ptr += sample * role_strides[0]
    if SEGMENTS:
        segments_ptr += sample * segment_strides[0]
    real = slot < tokens
    i = _positions(slot, order_ptr, sources, real, ALTERNATE)                          # [BLOCK_M]
    if ALTERNATE:
        role = tl.where(i < protect, PROTECTED, tl.where(slot < sources, SOURCE, DESTINATION))
    else:
        role = tl.load(role_ptr + i * role_strides[1], mask=real, other=PROTECTED).to(tl.int32)
    active = real & (role == SOURCE)
    base = metric_ptr + sample * metric_strides[0]
    segment_i = i
    if SEGMENTS:
        segment_i = tl.load(segments_ptr + i * segment_strides[1], mask=active, other=0)

    square_i = tl.zeros([BLOCK_M], tl.float32)
    broken_i = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_C):
        x = _channels(base, i, active, start, metric_strides[1], metric_strides[2], metric_strides[3],
                      HEADS, C, BLOCK_C)
        f = x.to(tl.float32) * head_factor
        square_i += tl.sum(f * f, 1)
        broken_i += tl.sum(f * 0.0, 1)
    factor_i = tl.full([BLOCK_M], 1.0, tl.float32) * head_factor
    if COSINE:
        factor_i = head_factor / tl.maximum(tl.sqrt(square_i), eps)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    where = i
    limit = tl.where(tl.sum(active.to(tl.int32)) > 0, destinations, 0)
    for first in tl.range(0, limit, BLOCK_N, num_stages=STAGES):
        number = first + tl.arange(0, BLOCK_N)
        valid = number < destinations
        j = _positions(sources + number, order_ptr, sources, valid, ALTERNATE)         # [BLOCK_N]
        if ALTERNATE:
            valid = valid & (j >= protect)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        square_j = tl.zeros([BLOCK_N], tl.float32)
        broken_j = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, C, BLOCK_C):
            x = _channels(base, i, active, start, metric_strides[1], metric_strides[2], metric_strides[3],
                          HEADS, C, BLOCK_C)
            y = _channels(base, j, valid, start, metric_strides[1], metric_strides[2], metric_strides[3],
                          HEADS, C, BLOCK_C)
            s += tl.dot(x, tl.trans(y), input_precision="ieee")
            f = y.to(tl.float32) * head_factor
            square_j += tl.sum(f * f, 1)
            broken_j += tl.sum(f * 0.0, 1)
        factor_j = tl.full([BLOCK_N], 1.0, tl.float32) * head_factor
        if COSINE:
            factor_j = head_factor / tl.maximum(tl.sqrt(square_j), eps)
        s = s * factor_i[:, None] * factor_j[None, :]
        ok = _allowed(i, j, segment_i, segments_ptr, segment_strides[1], window_y, window_x, grid_start, grid_width,
                      valid, SEGMENTS, WINDOW)
        ok = ok & valid[None, :] & (broken_i == 0.0)[:, None] & (broken_j == 0.0)[None, :] & (s == s)
        s = tl.where(ok, s, float("-inf"))
        top = tl.max(s, 1)
        leftmost = tl.min(tl.where(s == top[:, None], j[None, :], 2147483647), 1)
        better = active & (top > best)
        best = tl.where(better, top, best)
        where = tl.where(better, leftmost, where)
    at = sample * tokens + i
    tl.store(score_ptr + at, best, mask=real)
    tl.store(dst_ptr + at, where.to(tl.int32), mask=real)
    tl.store(role_out_ptr + at, role.to(tl.int8), mask=real)


def supported(metric, role, segments, protect, window, cosine, eps) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    why = device_reasons("metric", metric, not isinstance(_match, triton.JITFunction))
    if metric.dtype not in DTYPES:
        why.append(f"metric must be float32, bfloat16 or float16, got {metric.dtype}")
    if metric.shape[1] >= 2**30:
        why.append("a sample may hold fewer than 2^30 tokens")
    return why


def fwd(metric, role, segments, protect, window, cosine, eps) -> tuple[Tensor, Tensor, Tensor]:
    """score [B, N] float32, dst [B, N] int32, role [B, N] int8."""
    batch, tokens = metric.shape[:2]
    made = [metric.new_empty((batch, tokens), dtype=t) for t in (torch.float32, torch.int32, torch.int8)]
    if batch * tokens == 0:
        return tuple(made)
    order = counts = None
    if role is not None:
        role = role.expand(batch, tokens)
        order = role.argsort(dim=1, stable=True).to(torch.int32)
        counts = torch.stack([(role == ROLES[n]).sum(1) for n in ("SOURCE", "DESTINATION")], 1).to(torch.int32)
    heads, width = metric.shape[2:] if metric.dim() == 4 else (1, metric.shape[2])
    strides = metric.stride() if metric.dim() == 4 else (*metric.stride()[:2], 0, metric.stride(2))
    reach = [*window, 0, 0][:2]
    grid = (tokens - window[2] * window[3], window[3]) if len(window) == 4 else (0, 1)
    segment_strides = (0, 0)
    if segments is not None:
        segment_strides = (segments.stride(0) if segments.shape[0] > 1 else 0, segments.stride(1))
    tile = TILES[4 if heads > 1 or len(window) == 4 else metric.element_size()]
    _match[(batch * -(-tokens // tile["BLOCK_M"]),)](
        metric_ptr=metric, role_ptr=role, order_ptr=order, counts_ptr=counts, segments_ptr=segments,
        score_ptr=made[0], dst_ptr=made[1], role_out_ptr=made[2],
        metric_strides=strides, role_strides=(0, 0) if role is None else role.stride(), segment_strides=segment_strides,
        tokens=tokens, sources=(tokens + 1) // 2, destinations=tokens // 2, protect=protect,
        window_y=min(reach[0], 2**30), window_x=min(reach[1], 2**30), grid_start=grid[0], grid_width=grid[1],
        eps=float(eps), head_factor=1.0 / heads,
        ALTERNATE=role is None, COSINE=cosine, SEGMENTS=segments is not None,
        WINDOW={0: 0, 1: 1, 4: 2}[len(window)], HEADS=heads, C=width, **ROLES,
        BLOCK_M=tile["BLOCK_M"], BLOCK_N=tile["BLOCK_N"], BLOCK_C=min(tile["BLOCK_C"], power(width)),
        STAGES=tile["stages"], num_warps=tile["warps"], num_stages=tile["stages"],
    )  # fmt: skip
    return tuple(made)
