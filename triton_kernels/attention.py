"""attention on a GPU: every query against every key, with biases, masks, sinks, dropout, six normalisers, top-k and policies.

The meaning of every argument is that of `definition` in vitkern/ops/attention.py. One query tile of one head walks the
key tiles with an online softmax: those up to the diagonal of a causal mask, those of a list where a mask or ids hide.
Where the tiles are too few programs, several share out the keys of one. Biases and masks are read where they stand,
whatever they are broadcast over. A NaN or infinity in a value is found in the result (0 x NaN is NaN), and only then is the
tile done again, a few channels at a time, with a record of who sees it, so that rows that do not see it stay as they are;
finite values pay one comparison per output element. A policy divides by sums that a walk of its own has made.
Heads that mix go to attention_heads.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention_hard, attention_heads
from ._attention_host import HARD, UNSPECIALIZED, Call, arguments, mixes, programs, reasons, shares, tuned
from ._attention_key_means import _key_means
from ._attention_policy import policy_rows
from ._attention_position_sums import add_values, position_sums
from ._attention_terms import last_key, listed, of_sample, part_of, places, row_factor, scores, stream, visited, weighed
from ._attention_tiles import (
    POLICY,
    SOFTMAX,
    add_weighted,
    divided_weights,
    load_parts,
    offsets,
    row_products,
    scaled_parts,
    store_parts,
    zero_parts,
)
from ._attention_topk import surviving
from ._attention_visits import lists
from ._host import power
from ._tiles import LN2, LOG2E, clean, keep_tile
from .attention_bwd import bwd

__all__ = ["bwd", "fwd", "supported"]
CHANNELS = tl.constexpr(16)                                 # of the second pass over values that are not finite


@triton.jit
def _load_channels(ptr, rows, real, d_stride, first, WIDTH: tl.constexpr):
    d = first + tl.arange(0, CHANNELS)
    at = rows[:, None] + d.to(tl.int64)[None, :] * d_stride
    return tl.load(ptr + at, mask=real[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _exact_channels(
    channel, q_ptr, k_ptr, v_ptr, out_ptr, visit_ptr, flat, base, low, final, begin, end, visits,
    q_strides, k_strides, v_strides, d_strides, factor,
    terms, term_strides, image, head, row, sizes, threshold,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The output in CHANNELS channels where values may be NaN or infinite: NaN in the rows that see one. Everything is read
    a few columns at a time, so that the registers of the kernel are those of its other path."""
    queries, keys = sizes[1], sizes[2]
    i = row + tl.arange(0, BLOCK_M)
    q_rows = offsets(image, head, i + sizes[8], q_strides, 1)
    acc = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    bad = tl.zeros([BLOCK_M, CHANNELS], tl.float32)
    for n in tl.range(begin, end, num_stages=1):
        start = visited(visit_ptr, visits, n, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        k_rows = offsets(image, head // GROUP, j + sizes[9], k_strides, 1)
        a = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, WIDTHS[0], CHANNELS, num_stages=1):
            q = _load_channels(q_ptr, q_rows, i < queries, d_strides[0], first, WIDTHS[0])
            k = _load_channels(k_ptr, k_rows, j < keys, d_strides[1], first, WIDTHS[0])
            a = tl.dot(q, tl.trans(k), a, input_precision="ieee")
        a += a * 0.0
        s = scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                   AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
        if NORM == SOFTMAX:
            p = tl.exp2((s - base[:, None]) * LOG2E)
        else:
            p, slope, bare = divided_weights(s, base, low, terms, term_strides, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        p = weighed(p, terms, term_strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        if terms[5] is not None:
            p = tl.where(keep_tile(stream(terms), image, head, i, start, threshold, BLOCK_N, sizes[1]), p, 0.0)
        v_rows = offsets(image, head // GROUP, j + sizes[9], v_strides, 1)
        v = _load_channels(v_ptr, v_rows, j < keys, d_strides[2], channel, WIDTHS_V[0])
        acc = tl.dot(p.to(v.dtype), clean(v).to(v.dtype), acc, input_precision="ieee")
        seen = tl.where(s == float("-inf"), 0.0, 1.0).to(tl.float16)
        bad = tl.dot(seen, tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0.0, 1.0).to(tl.float16), bad)
    o = tl.where(bad > 0.0, float("nan"), acc * final[:, None])
    d = channel + tl.arange(0, CHANNELS)
    tl.store(out_ptr + (flat[:, None] * WIDTHS_V[0] + d[None, :]), o.to(out_ptr.dtype.element_ty),
             mask=(i < queries)[:, None] & (d < WIDTHS_V[0])[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, low_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, v_strides, d_strides, term_strides, visit_strides, sizes, parts, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BATCH_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head and sample, over all visits or one of `parts` of them: then out and lse have an
    axis of parts in front.
    Grid: query tiles (fastest) x heads x samples on axis 0, parts on axis 1; samples fastest if BATCH_FIRST, for a bias that
    they share.
    Any strides: q, k, v and the terms. out, lse and low, what lse lacks (in base 2), are contiguous; under a policy lse and low
    are read, as divided_weights wants them."""
    batch, queries, heads, offset, total = sizes[0], sizes[1], sizes[3], sizes[4], sizes[8]
    pid = tl.program_id(0)
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    if BATCH_FIRST:
        image = pid % batch
        tile = pid // batch % tiles
        head = pid // batch // tiles
    else:
        tile = pid % tiles
        head = pid // tiles % heads
        image = pid // tiles // heads
    if CAUSAL:
        tile = tiles - 1 - tile                                                        # the longest first
    row = tile * BLOCK_M
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    i = row + tl.arange(0, BLOCK_M)
    real = i < queries
    last = last_key(terms, sizes, row, keys, offset, CAUSAL, BLOCK_M)
    begin, end, visits = listed(count_ptr, visit_strides, image, head, tile, 0, last, BLOCK_N)
    part = tl.program_id(1)
    begin, end = part_of(begin, end, part, parts)
    factor = row_factor(terms, term_strides, head, scale)
    q = load_parts(q_ptr, offsets(image, head, i + sizes[8], q_strides, ALIGN), real, d_strides[0], WIDTHS)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if terms[4] is not None:
        sink = tl.load(terms[4] + head.to(tl.int64) * term_strides[13]).to(tl.float32)
        top = tl.zeros([BLOCK_M], tl.float32) + sink
        top = tl.where(part == 0, top, float("-inf"))
        norm = tl.where(top == float("-inf"), 0.0, 1.0)
    flat = places(terms, image, i, queries, sizes[8]) * heads + head                  # [BLOCK_M]
    if NORM == POLICY:
        top = tl.load(lse_ptr + flat, mask=real, other=0.0)
        norm = tl.load(low_ptr + flat, mask=real, other=1.0)
    acc = zero_parts(BLOCK_M, WIDTHS_V)
    for n in tl.range(begin, end, num_stages=STAGES):
        start = visited(visit_ptr, visits, n, BLOCK_N)
        j = start + tl.arange(0, BLOCK_N)
        at = offsets(image, head // GROUP, j + sizes[9], k_strides, ALIGN)
        k = load_parts(k_ptr, at, j < keys, d_strides[1], WIDTHS)
        a = row_products(q, k, WIDTHS)
        a += a * 0.0                                                                   # an infinity becomes NaN
        s = scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                   AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
        at = offsets(image, head // GROUP, j + sizes[9], v_strides, ALIGN)
        v = load_parts(v_ptr, at, j < keys, d_strides[2], WIDTHS_V)
        if NORM == SOFTMAX:
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2((s - base[:, None]) * LOG2E)                                     # [BLOCK_M, BLOCK_N]
            shrink = tl.exp2((top - base) * LOG2E)
            norm = norm * shrink + tl.sum(p, 1)
            acc = scaled_parts(acc, shrink, WIDTHS_V)
            top = higher
        else:
            p, slope, bare = divided_weights(s, top, norm, terms, term_strides, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        p = weighed(p, terms, term_strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        if terms[5] is not None:
            p = tl.where(keep_tile(stream(terms), image, head, i, start, threshold, BLOCK_N, sizes[1]), p, 0.0)
        acc = add_weighted(acc, p, v, WIDTHS_V)

    flat += part.to(tl.int64) * total * heads
    final = tl.zeros([BLOCK_M], tl.float32) + keep_scale
    base = top
    if NORM == SOFTMAX:
        base = tl.where(top == float("-inf"), 0.0, top)
        full = tl.where(norm == 0.0, 1.0, norm)
        final = keep_scale / full
        lse = top + tl.log2(full) * LN2
        tl.store(lse_ptr + flat, tl.where(norm == 0.0, float("-inf"), lse), mask=real)
        if low_ptr is not None:
            low = (top - lse) * LOG2E + tl.log2(full)
            tl.store(low_ptr + flat, tl.where(tl.abs(lse) < float("inf"), low, 0.0), mask=real)
    broken = tl.sum(tl.where(tl.abs(acc[0]) < float("inf"), 0, 1))
    if WIDTHS_V[2] > 0:
        broken += tl.sum(tl.where(tl.abs(acc[1]) < float("inf"), 0, 1))
    if broken == 0:
        store_parts(out_ptr, flat * WIDTHS_V[0], real, 1, scaled_parts(acc, final, WIDTHS_V), WIDTHS_V)
    else:
        # Something is not finite: again, counting for each row and channel the visible values that are not.
        for channel in tl.range(0, WIDTHS_V[0], CHANNELS, num_stages=1):
            _exact_channels(
                channel, q_ptr, k_ptr, v_ptr, out_ptr, visit_ptr, flat, base, norm, final, begin, end, visits,
                q_strides, k_strides, v_strides, d_strides, factor, terms, term_strides, image, head, row, sizes, threshold,
                NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, WIDTHS_V, CLIP, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=("parts", "count", "width"))
def _join(
    part_ptr, log_ptr, less_ptr, out_ptr, lse_ptr, low_ptr, parts, count, width,
    SOFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One output of several parts of the keys, in their order.
    Grid: ROWS of the `count` rows of out, on axis 0.
    Contiguous: parts [parts, count, width], their lse and its low [parts, count], out [count, width], lse and low [count]."""
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    real = r < count
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK], tl.float32)
    if SOFT:
        for n in tl.range(0, parts):
            top = tl.maximum(top, tl.load(log_ptr + (n * count.to(tl.int64) + r), mask=real, other=0.0))
        top = tl.where(top == float("-inf"), 0.0, top)
    for n in tl.range(0, parts):
        log = tl.zeros([ROWS], tl.float32)
        share = tl.full([ROWS], 1.0, tl.float32)
        if SOFT:
            log = tl.load(log_ptr + (n * count.to(tl.int64) + r), mask=real, other=0.0)
            less = tl.load(less_ptr + (n * count.to(tl.int64) + r), mask=real, other=0.0)
            share = tl.exp2((log - top) * LOG2E + less)
            norm += share
        at = (n * count.to(tl.int64) + r)[:, None] * width + d[None, :]
        x = tl.load(part_ptr + at, mask=real[:, None] & (d < width)[None, :], other=0.0)
        acc += tl.where(log[:, None] == float("-inf"), 0.0, share[:, None] * x)       # a NaN in what is seen stays
    if SOFT:
        full = tl.where(norm == 0.0, 1.0, norm)
        acc = acc / full[:, None]
        lse = top + tl.log2(full) * LN2
        tl.store(lse_ptr + r, tl.where(norm == 0.0, float("-inf"), lse), mask=real)
        if low_ptr is not None:
            tl.store(low_ptr + r, tl.where(tl.abs(lse) < float("inf"), (top - lse) * LOG2E + tl.log2(full), 0.0), mask=real)
    tl.store(out_ptr + (r[:, None] * width + d[None, :]), acc.to(out_ptr.dtype.element_ty),
             mask=real[:, None] & (d < width)[None, :])


def supported(*args) -> list[str]:
    """Why fwd and bwd cannot run these arguments of the op, one sentence each; [] if they can."""
    return reasons(Call(*args), not isinstance(_forward, triton.JITFunction))


def fwd(*args) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, Nq, H, Dv] in v's dtype; lse [B, Nq, H] in float32, 0 but for softmax; key_mean [B, Nk, H], of no keys without
    query_weight."""
    call = Call(*args)
    q, k, v, bias = call[:4]
    batch, queries, heads, _ = q.shape
    if mixes(call):
        return attention_heads.forward(call)
    if call.normalizer in HARD:
        return _attention_hard.forward(call)
    softmax, counts = call.normalizer == "softmax" and call.policy is None, call.query_weight is not None
    values = call.position_v                                # joins before the output is rounded
    dtype = v.dtype if values is None else torch.float32
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=dtype, device=q.device)
    lse = (torch.empty if softmax else torch.zeros)((batch, queries, heads), dtype=torch.float32, device=q.device)
    low = torch.empty_like(lse) if softmax and (counts or values is not None) else None
    key_mean = torch.zeros((batch, k.shape[1] if counts else 0, heads), dtype=torch.float32, device=q.device)
    shared = surviving(call, arguments(call))
    if out.numel():
        top, rest = policy_rows(shared, call.policy_eps) if call.policy is not None else (lse, low)
        blocks = tuned("forward", shared)
        count = programs(shared, -(-shared["sizes"][1] // blocks["BLOCK_M"]))
        tiles = -(-shared["sizes"][2] // blocks["BLOCK_N"])
        split = shares(shared, count, tiles)
        shape = (split,) if split > 1 else ()
        some = torch.empty((*shape, *out.shape), dtype=torch.float32, device=q.device) if split > 1 else out
        logs, less = (
            torch.empty((*shape, *lse.shape), dtype=torch.float32, device=q.device) if split > 1 and softmax else x
            for x in (top, rest))
        _forward[(count, split)](
            **shared, **blocks, **lists(shared, blocks), out_ptr=some, lse_ptr=logs, low_ptr=less, parts=split,
            BATCH_FIRST=bias is not None and shared["term_strides"][0] == 0 and shared["AXES"][0] == (True, True),
        )
        if split > 1:
            block = power(out.shape[3])
            rows = max(1, 2048 // block)
            _join[(-(-lse.numel() // rows),)](
                some, logs, less, out, lse, low, split, lse.numel(), out.shape[3], SOFT=softmax, ROWS=rows, BLOCK=block,
                num_warps=4, enable_fp_fusion=True)
        if values is not None:
            of_rows = {"lse_ptr": top if softmax or call.policy is not None else None, "low_ptr": rest}
            out = add_values(out, position_sums(shared | of_rows, weigh=True), values, v.dtype)
        if key_mean.numel():
            blocks = tuned("backward_keys", shared)
            del shared["v_ptr"], shared["v_strides"], shared["WIDTHS_V"], shared["keep_scale"], shared["threshold"]
            _key_means[(programs(shared, -(-shared["sizes"][2] // blocks["BLOCK_N"])),)](
                **shared, **blocks, **lists(shared, blocks, of_keys=True), low_ptr=rest, mean_ptr=key_mean,
                lse_ptr=top if softmax or call.policy is not None else None)
    return out.to(v.dtype), lse, key_mean
