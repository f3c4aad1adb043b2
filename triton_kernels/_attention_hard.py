"""Hard choices: of argmax_k every query has the first of its best keys, of argmax_q every key has the first of its best queries.

Only v has a gradient. What chooses picks one row; what is chosen collects the rows of all that chose it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_host import UNSPECIALIZED, Call, arguments, programs, row_strides, tuned
from ._attention_terms import last_key, of_sample, places, row_factor, scores
from ._attention_tiles import add_weighted, clean_parts, load_parts, offsets, row_products, store_parts, zero_parts
from ._attention_topk import surviving


@triton.jit
def _better(s, at, top, best, AXIS: tl.constexpr, NOBODY: tl.constexpr):
    """The largest scores so far and where they first stand; a NaN is above all, a score of -inf is hidden."""
    s = tl.where(s != s, float("inf"), s)
    here = tl.max(s, AXIS)
    first = tl.min(tl.where((s == tl.expand_dims(here, AXIS)) & (s != float("-inf")), at, NOBODY), AXIS)
    best = tl.where((here > top) & (first < NOBODY), first, best)
    return tl.maximum(top, here), best


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _choose(
    q_ptr, k_ptr, chosen_ptr, terms, q_strides, k_strides, d_strides, term_strides, sizes, scale,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BY_KEYS: tl.constexpr,
):  # fmt: skip
    """The key of each of BLOCK_M queries of one head and sample, or the query of each of BLOCK_N keys; -1 for none.
    Grid: heads (fastest) x tiles of what chooses x samples, on axis 0. Writes [B, N, H] int32.
    Any strides: q, k and the terms."""
    NOBODY: tl.constexpr = 2147483647
    OWN: tl.constexpr = BLOCK_N if BY_KEYS else BLOCK_M
    OTHER: tl.constexpr = BLOCK_M if BY_KEYS else BLOCK_N
    heads, offset = sizes[3], sizes[4]
    pid = tl.program_id(0)
    tiles = ((sizes[2] if BY_KEYS else sizes[1]) + OWN - 1) // OWN
    head = pid % heads
    own = pid // heads % tiles * OWN
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    factor = row_factor(terms, term_strides, head, scale)
    r = own + tl.arange(0, OWN)
    top = tl.full([OWN], float("-inf"), tl.float32)
    best = tl.full([OWN], -1, tl.int32)
    count = queries if BY_KEYS else last_key(terms, sizes, own, keys, offset, CAUSAL, BLOCK_M)
    for other in tl.range(0, count, OTHER, num_stages=1):
        row = other if BY_KEYS else own
        start = own if BY_KEYS else other
        i = row + tl.arange(0, BLOCK_M)
        j = start + tl.arange(0, BLOCK_N)
        q = load_parts(q_ptr, offsets(image, head, i + sizes[8], q_strides, ALIGN), i < queries, d_strides[0], WIDTHS)
        k = load_parts(k_ptr, offsets(image, head // GROUP, j + sizes[9], k_strides, ALIGN), j < keys, d_strides[1], WIDTHS)
        a = row_products(q, k, WIDTHS)
        a += a * 0.0                                                                   # an infinity becomes NaN
        s = scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                   AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
        s = tl.where((i < queries)[:, None] & (j < keys)[None, :], s, float("-inf"))
        if BY_KEYS:
            top, best = _better(s, i[:, None], top, best, 0, NOBODY)
        else:
            top, best = _better(s, j[None, :], top, best, 1, NOBODY)
    total = keys if BY_KEYS else queries
    first = sizes[9] if BY_KEYS else sizes[8]
    tl.store(chosen_ptr + (places(terms, image, r, total, first) * heads + head), best, mask=r < total)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pick(
    x_ptr, y_ptr, chosen_ptr, terms, x_strides, y_strides, x_d_stride, sizes,
    GROUP_X: tl.constexpr, GROUP: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
    MARK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK of those that choose, the row of x that each chose, 0 for none, summed over the GROUP heads that share a head
    of y; GROUP_X heads share one of x. If MARK, a value that is not finite becomes NaN.
    Grid: heads of y (fastest) x tiles x samples, on axis 0.
    Any strides: x and y."""
    heads = sizes[3]
    y_heads = heads // GROUP
    pid = tl.program_id(0)
    tiles = ((sizes[2] if BY_KEYS else sizes[1]) + BLOCK - 1) // BLOCK
    y_head = pid % y_heads
    r = pid // y_heads % tiles * BLOCK + tl.arange(0, BLOCK)
    image = pid // y_heads // tiles
    sizes = of_sample(terms, sizes, image)
    count = sizes[2] if BY_KEYS else sizes[1]
    first = sizes[9] if BY_KEYS else sizes[8]
    acc = zero_parts(BLOCK, WIDTHS)
    for g in tl.range(0, GROUP, num_stages=1):
        head = y_head * GROUP + g
        at = tl.load(chosen_ptr + (places(terms, image, r, count, first) * heads + head), mask=r < count, other=-1)
        of_x = at + (sizes[8] if BY_KEYS else sizes[9])
        x = load_parts(x_ptr, offsets(image, head // GROUP_X, of_x, x_strides, 1), at >= 0, x_d_stride, WIDTHS)
        first_part = x[0].to(tl.float32)
        second_part = x[1].to(tl.float32)
        if MARK:
            first_part += first_part * 0.0                                             # an infinity becomes NaN
            second_part += second_part * 0.0
        acc = acc[0] + first_part, acc[1] + second_part
    store_parts(y_ptr, offsets(image, y_head, r + first, y_strides, 1), r < count, 1, acc, WIDTHS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _collect(
    x_ptr, y_ptr, chosen_ptr, terms, x_strides, y_strides, x_d_stride, sizes,
    GROUP_X: tl.constexpr, GROUP: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
    MARK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK of what is chosen, the sum of the rows of x of all that chose each, over the GROUP heads that share a head of
    y; GROUP_X heads share one of x. If MARK, a value that is not finite makes the sum NaN, else it counts as 0.
    Grid: heads of y (fastest) x tiles x samples, on axis 0.
    Any strides: x and y."""
    heads = sizes[3]
    y_heads = heads // GROUP
    pid = tl.program_id(0)
    tiles = ((sizes[1] if BY_KEYS else sizes[2]) + BLOCK - 1) // BLOCK
    y_head = pid % y_heads
    r = pid // y_heads % tiles * BLOCK + tl.arange(0, BLOCK)
    image = pid // y_heads // tiles
    sizes = of_sample(terms, sizes, image)
    choosers = sizes[2] if BY_KEYS else sizes[1]
    count = sizes[1] if BY_KEYS else sizes[2]
    first = sizes[9] if BY_KEYS else sizes[8]
    acc = zero_parts(BLOCK, WIDTHS)
    bad = zero_parts(BLOCK, WIDTHS)
    for g in tl.range(0, GROUP, num_stages=1):
        head = y_head * GROUP + g
        for start in tl.range(0, choosers, STEP, num_stages=1):
            n = start + tl.arange(0, STEP)
            at = tl.load(chosen_ptr + (places(terms, image, n, choosers, first) * heads + head), mask=n < choosers, other=-1)
            x = load_parts(x_ptr, offsets(image, head // GROUP_X, n + first, x_strides, 1), n < choosers, x_d_stride, WIDTHS)
            match = tl.where(r[:, None] == at[None, :], 1.0, 0.0)                      # [chosen, choosers]
            acc = add_weighted(acc, match, clean_parts(x, WIDTHS), WIDTHS)
            if MARK:
                off = (tl.where(tl.abs(x[0].to(tl.float32)) < float("inf"), 0.0, 1.0).to(x[0].dtype),
                       tl.where(tl.abs(x[1].to(tl.float32)) < float("inf"), 0.0, 1.0).to(x[1].dtype))
                bad = add_weighted(bad, match, off, WIDTHS)
    acc = tl.where(bad[0] > 0.0, float("nan"), acc[0]), tl.where(bad[1] > 0.0, float("nan"), acc[1])
    of_y = sizes[8] if BY_KEYS else sizes[9]
    store_parts(y_ptr, offsets(image, y_head, r + of_y, y_strides, 1), r < count, 1, acc, WIDTHS)


def _chosen(call: Call) -> tuple[Tensor, dict, dict]:
    """What every query, or of argmax_q every key, chooses: [B, N, H] int32, and the arguments of the kernels."""
    shared = surviving(call, arguments(call))
    blocks = tuned("backward_queries", shared)
    by_keys = call.normalizer == "argmax_q"
    side = 2 if by_keys else 1
    tokens = (call.k if by_keys else call.q).shape[1]
    chosen = torch.empty((call.q.shape[0], tokens, call.q.shape[2]), dtype=torch.int32, device=call.q.device)
    tiles = -(-shared["sizes"][side] // blocks["BLOCK_N" if by_keys else "BLOCK_M"])
    names = ("q_ptr", "k_ptr", "terms", "q_strides", "k_strides", "d_strides", "term_strides", "sizes", "scale", "AXES", "RULE",
             "FAR", "CAUSAL", "GROUP", "WIDTHS", "ALIGN")  # fmt: skip
    del blocks["STAGES"]
    if chosen.numel():
        _choose[(programs(shared, tiles),)](**{n: shared[n] for n in names}, **blocks, chosen_ptr=chosen, BY_KEYS=by_keys)
    return chosen, shared, blocks


def _moved(x: Tensor, y: Tensor, chosen: Tensor, shared: dict, group: int, by_keys: bool, pick: bool, mark: bool) -> None:
    """Fills y with the rows of x that were picked or collected; `group` heads share one of y."""
    sizes, block = shared["sizes"], 16
    tiles = -(-sizes[2 if by_keys == pick else 1] // block)
    launch = {
        "x_ptr": x, "y_ptr": y, "chosen_ptr": chosen, "terms": shared["terms"], "x_strides": row_strides(x),
        "y_strides": row_strides(y), "x_d_stride": x.stride(-1), "sizes": sizes, "GROUP_X": sizes[3] // x.shape[2],
        "GROUP": group, "WIDTHS": shared["WIDTHS_V"], "BLOCK": block, "BY_KEYS": by_keys, "MARK": mark, "num_warps": 4,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    count = programs(shared, tiles) // group
    if pick:
        _pick[(count,)](**launch)
    else:
        _collect[(count,)](**launch, STEP=32)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """out, and lse, of argmax_k the chosen key."""
    q, v = call.q, call.v
    by_keys = call.normalizer == "argmax_q"
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=v.dtype, device=q.device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    chosen, shared, _ = _chosen(call)
    if v.shape[1]:
        _moved(v, out, chosen, shared, 1, by_keys, pick=not by_keys, mark=True)
    return out, lse if by_keys else chosen.float()


def backward(dout: Tensor, call: Call) -> Tensor:
    """The gradient of v."""
    dv = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    by_keys = call.normalizer == "argmax_q"
    chosen, shared, _ = _chosen(call)
    _moved(dout, dv, chosen, shared, shared["GROUP"], by_keys, pick=by_keys, mark=False)
    return dv
