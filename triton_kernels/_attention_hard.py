"""Hard choices: of argmax_k every query has the first of its best keys, of argmax_q every key has the first of its best queries.

Only v, the factors of the weights and the weights of the queries have gradients. What chooses picks one row; what is chosen
collects the rows of all that chose it, each times the factor and the dropout of that pair.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd_tables import entry_gradient
from ._attention_host import (
    UNSPECIALIZED,
    Call,
    arguments,
    folded,
    of_tokens,
    programs,
    row_strides,
    summed,
    tuned,
    widths,
)
from ._attention_position_sums import add_values, pair_sums, values_gradient, with_given
from ._attention_positions import looked_up, named_rows
from ._attention_tables import entries
from ._attention_terms import last_key, listed, of_sample, places, row_factor, scores, stream, visited
from ._attention_tiles import add_weighted, clean_parts, load_parts, offsets, row_products, store_parts, zero_parts
from ._attention_topk import surviving
from ._attention_visits import lists
from ._tiles import keep_keys


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
    q_ptr, k_ptr, chosen_ptr, visit_ptr, count_ptr, terms, q_strides, k_strides, d_strides, term_strides, visit_strides, sizes,
    scale,
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
    begin, end, visits = listed(count_ptr, visit_strides, image, head, own // OWN, 0, count, OTHER)
    for n in tl.range(begin, end, num_stages=1):
        other = visited(visit_ptr, visits, n, OTHER)
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


@triton.jit
def _choosers(chosen_ptr, terms, sizes, pid, heads, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr):
    """Of the program's BLOCK of those that choose: the sample, the head, its sizes, their places in [B, N, H], which are real, and
    the query and the key of each pair, -1 of none."""
    tiles = ((sizes[2] if BY_KEYS else sizes[1]) + BLOCK - 1) // BLOCK
    head = pid % heads
    r = pid // heads % tiles * BLOCK + tl.arange(0, BLOCK)
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    count = sizes[2] if BY_KEYS else sizes[1]
    flat = places(terms, image, r, count, sizes[9] if BY_KEYS else sizes[8]) * heads + head
    at = tl.load(chosen_ptr + flat, mask=r < count, other=-1)
    i = at if BY_KEYS else r
    j = r if BY_KEYS else at
    return image, head, sizes, flat, r < count, at >= 0, i, j


@triton.jit
def _pair_factors(x, terms, strides, image, head, sizes, paired, i, j, BUT: tl.constexpr = -1):
    """x times the factors of the weights of each pair, without the term BUT."""
    if terms[7] is not None and BUT != 7:
        at = image.to(tl.int64) * strides[18] + head.to(tl.int64) * strides[19]
        at += i.to(tl.int64) * strides[20] + j.to(tl.int64) * strides[21]
        x *= tl.load(terms[7] + at, mask=paired, other=0.0).to(tl.float32)
    if terms[27] is not None and BUT != 27:
        at = terms[27] + head.to(tl.int64) * strides[58]
        x *= tl.load(at + entries(i, j, sizes) * strides[59], mask=paired, other=0.0).to(tl.float32)
    if terms[28] is not None and BUT != 28:
        x = tl.where(paired & (j > i), x * tl.load(terms[28]).to(tl.float32), x)
    return x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pair_weights(
    chosen_ptr, weight_ptr, terms, term_strides, sizes, threshold, keep_scale, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """The factor of each pair times its dropout, 0 of none.
    Grid: heads (fastest) x tiles of what chooses x samples, on axis 0. Writes [B, N, H].
    Any strides: the factors."""
    image, head, sizes, flat, real, paired, i, j = _choosers(
        chosen_ptr, terms, sizes, tl.program_id(0), sizes[3], BLOCK, BY_KEYS)
    w = _pair_factors(tl.where(paired, 1.0, 0.0), terms, term_strides, image, head, sizes, paired, i, j)
    if terms[5] is not None:
        w = tl.where(keep_keys(stream(terms), image, head, i, j, threshold, sizes[1]), w * keep_scale, 0.0)
    tl.store(weight_ptr + flat, w, mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pair_products(
    dout_ptr, v_ptr, chosen_ptr, product_ptr, entry_ptr, terms, dout_strides, v_strides, d_strides, term_strides, sizes, threshold,
    keep_scale,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The gradient that each pair gives to the factor TARGET, a place in `terms`, 0 of none; and the entry of each pair in a table,
    -1 of none.
    Grid: heads (fastest) x tiles of what chooses x samples, on axis 0. Writes [B, N, H].
    Any strides: dout, v and the factors."""
    image, head, sizes, flat, real, paired, i, j = _choosers(
        chosen_ptr, terms, sizes, tl.program_id(0), sizes[3], BLOCK, BY_KEYS)
    x = load_parts(dout_ptr, offsets(image, head, i + sizes[8], dout_strides, 1), paired, d_strides[0], WIDTHS)
    y = load_parts(v_ptr, offsets(image, head // GROUP, j + sizes[9], v_strides, 1), paired, d_strides[1], WIDTHS)
    y = clean_parts(y, WIDTHS)
    g = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
    if WIDTHS[2] > 0:
        g += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
    if terms[32] is not None:
        at_q, at_k = tl.maximum(i, 0), tl.maximum(j, 0)
        at_q, at_k = tl.minimum(at_q, sizes[1] - 1), tl.minimum(at_k, sizes[2] - 1)
        rows = named_rows(terms[29], term_strides, image, at_q, at_k)
        g += tl.where(paired, looked_up(terms[32], term_strides, 71, image, head, at_q, rows), 0.0)
    if terms[5] is not None:
        g = tl.where(keep_keys(stream(terms), image, head, i, j, threshold, sizes[1]), g * keep_scale, 0.0)
    g = _pair_factors(g, terms, term_strides, image, head, sizes, paired, i, j, TARGET)
    if TARGET == 28:
        g = tl.where(paired & (j > i), g, 0.0)
    tl.store(product_ptr + flat, g, mask=real)
    if entry_ptr is not None:
        tl.store(entry_ptr + flat, tl.where(paired, entries(i, j, sizes), -1), mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _spread(
    chosen_ptr, product_ptr, out_ptr, terms, sizes, members, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a factor: the products of the pairs that stand in it, summed over the samples and heads that
    share it, in order; members = (factor heads, samples sharing, heads sharing).
    Grid: factor heads (fastest) x query tiles x key tiles x factor samples, on axis 0. Writes [factor samples, factor heads,
    Nq, Nk].
    Contiguous: all."""
    queries, keys, heads = sizes[1], sizes[2], sizes[3]
    own_heads, samples, shared = members
    pid = tl.program_id(0)
    m_tiles = (queries + BLOCK_M - 1) // BLOCK_M
    n_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    own_head = pid % own_heads
    i = pid // own_heads % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    j = pid // own_heads // m_tiles % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    own_sample = pid // own_heads // m_tiles // n_tiles
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for member in tl.range(0, samples * shared, num_stages=1):
        image = own_sample + member // shared
        own = of_sample(terms, sizes, image)
        n = j if BY_KEYS else i
        count = own[2] if BY_KEYS else own[1]
        flat = places(terms, image, n, count, own[9] if BY_KEYS else own[8]) * heads + (own_head + member % shared)
        at = tl.load(chosen_ptr + flat, mask=n < count, other=-1)
        g = tl.load(product_ptr + flat, mask=n < count, other=0.0)
        if BY_KEYS:
            acc += tl.where(i[:, None] == at[None, :], g[None, :], 0.0)
        else:
            acc += tl.where(j[None, :] == at[:, None], g[:, None], 0.0)
    at = (own_sample.to(tl.int64) * own_heads + own_head) * queries
    tl.store(out_ptr + ((at + i)[:, None] * keys + j[None, :]), acc.to(out_ptr.dtype.element_ty),
             mask=(i < queries)[:, None] & (j < keys)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pick(
    x_ptr, y_ptr, chosen_ptr, weight_ptr, terms, x_strides, y_strides, x_d_stride, sizes,
    GROUP_X: tl.constexpr, GROUP: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
    MARK: tl.constexpr,
):  # fmt: skip
    """Of BLOCK of those that choose, the row of x that each chose times the weight of the pair, 0 for none, summed over the
    GROUP heads that share a head of y; GROUP_X heads share one of x. If MARK, a value that is not finite becomes NaN.
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
        w = tl.zeros([BLOCK], tl.float32) + 1.0
        if weight_ptr is not None:
            w = tl.load(weight_ptr + (places(terms, image, r, count, first) * heads + head), mask=r < count, other=0.0)
        seen = (at >= 0) & (w != 0.0)
        x = load_parts(x_ptr, offsets(image, head // GROUP_X, of_x, x_strides, 1), seen, x_d_stride, WIDTHS)
        w = w.to(x_ptr.dtype.element_ty).to(tl.float32)
        first_part = x[0].to(tl.float32) * w[:, None]
        second_part = x[1].to(tl.float32) * w[:, None]
        if MARK:
            first_part += first_part * 0.0                                             # an infinity becomes NaN
            second_part += second_part * 0.0
        acc = acc[0] + first_part, acc[1] + second_part
    store_parts(y_ptr, offsets(image, y_head, r + first, y_strides, 1), r < count, 1, acc, WIDTHS)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _collect(
    x_ptr, y_ptr, chosen_ptr, weight_ptr, terms, x_strides, y_strides, x_d_stride, sizes,
    GROUP_X: tl.constexpr, GROUP: tl.constexpr, WIDTHS: tl.constexpr, BLOCK: tl.constexpr, BY_KEYS: tl.constexpr,
    MARK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Of BLOCK of what is chosen, the sum of the rows of x of all that chose each times the weight of the pair, over the GROUP
    heads that share a head of y; GROUP_X heads share one of x. If MARK, a value that is not finite makes the sum NaN, else it
    counts as 0.
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
            w = tl.zeros([STEP], tl.float32) + 1.0
            if weight_ptr is not None:
                w = tl.load(weight_ptr + (places(terms, image, n, choosers, first) * heads + head), mask=n < choosers, other=0.0)
            match = tl.where(r[:, None] == at[None, :], w[None, :], 0.0)               # [chosen, choosers]
            acc = add_weighted(acc, match, clean_parts(x, WIDTHS), WIDTHS)
            if MARK:
                off = (tl.where(tl.abs(x[0].to(tl.float32)) < float("inf"), 0.0, 1.0).to(x[0].dtype),
                       tl.where(tl.abs(x[1].to(tl.float32)) < float("inf"), 0.0, 1.0).to(x[1].dtype))
                bad = add_weighted(bad, tl.where(match == 0.0, 0.0, 1.0), off, WIDTHS)
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
        _choose[(programs(shared, tiles),)](
            **{n: shared[n] for n in names}, **blocks, **lists(shared, blocks, by_keys), chosen_ptr=chosen, BY_KEYS=by_keys)
    return chosen, shared, blocks


def _moved(x, y, chosen, weight, shared: dict, by_keys: bool, pick: bool, mark: bool = False) -> Tensor:
    """y, filled with the rows of x that were picked or collected, times the weights of their pairs; heads share those of y."""
    sizes, block = shared["sizes"], 16
    tiles = -(-sizes[2 if by_keys == pick else 1] // block)
    group = sizes[3] // y.shape[2]
    launch = {
        "x_ptr": x, "y_ptr": y, "chosen_ptr": chosen, "weight_ptr": weight, "terms": shared["terms"], "x_strides": row_strides(x),
        "y_strides": row_strides(y), "x_d_stride": x.stride(-1), "sizes": sizes, "GROUP_X": sizes[3] // x.shape[2],
        "GROUP": group, "WIDTHS": widths(x.shape[-1]), "BLOCK": block, "BY_KEYS": by_keys, "MARK": mark, "num_warps": 4,
        "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    count = programs(shared, tiles) // group
    if pick:
        _pick[(count,)](**launch)
    else:
        _collect[(count,)](**launch, STEP=32)
    return y


PAIRS = {"BLOCK": 64, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _paired(kernel, shared: dict, chosen: Tensor, by_keys: bool, **more) -> None:
    """A number of each pair, made by programs of 64 that choose."""
    names = ("terms", "sizes", "threshold", "keep_scale")
    tiles = -(-shared["sizes"][2 if by_keys else 1] // PAIRS["BLOCK"])
    kernel[(programs(shared, tiles),)](**{n: shared[n] for n in names}, **PAIRS, chosen_ptr=chosen, BY_KEYS=by_keys, **more)


def _weights_of(call: Call, chosen: Tensor, shared: dict, by_keys: bool) -> Tensor | None:
    """What multiplies the row of each pair, [B, N, H]; None where that is 1."""
    if call.weight is None and call.weight_table is None and call.later_ratio is None and not call.dropout_p:
        return None
    weight = torch.empty(chosen.shape, dtype=torch.float32, device=chosen.device)
    _paired(_pair_weights, shared, chosen, by_keys, weight_ptr=weight, term_strides=shared["term_strides"])
    return weight


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """out; lse, of argmax_k the chosen key; key_mean."""
    q, v, counts = call.q, call.v, call.query_weight
    by_keys = call.normalizer == "argmax_q"
    values = call.position_v                                # joins before the output is rounded
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=v.dtype if values is None else torch.float32, device=q.device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)
    key_mean = torch.zeros((len(q), 0 if counts is None else v.shape[1], q.shape[2]), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out.to(v.dtype), lse, key_mean
    chosen, shared, _ = _chosen(call)
    if v.shape[1]:
        weight = _weights_of(call, chosen, shared, by_keys)
        _moved(v, out, chosen, weight, shared, by_keys, pick=not by_keys, mark=True)
        if values is not None:
            out = add_values(out, pair_sums(chosen, weight, shared, by_keys), values, v.dtype)
    if key_mean.numel():
        _moved(counts[..., None], key_mean[..., None], chosen, None, shared, by_keys, pick=by_keys)
    return out.to(v.dtype), lse if by_keys else chosen.float(), key_mean


def backward(dout: Tensor, dkey_mean: Tensor | None, call: Call, needs: dict[str, bool]) -> dict[str, Tensor]:
    """The gradients of v, the factors of the weights and query_weight."""
    v, weight, found = call.v, call.weight, {}
    by_keys = call.normalizer == "argmax_q"
    chosen, shared, _ = _chosen(call)
    shared, pairs = with_given(shared, dout, call.position_v), _weights_of(call, chosen, shared, by_keys)
    if needs["v"]:
        dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        found["v"] = _moved(dout, dv, chosen, pairs, shared, by_keys, pick=by_keys)
    if needs["position_v"]:
        found["position_v"] = values_gradient(pair_sums(chosen, pairs, shared, by_keys), dout, call.position_v)

    def products(target: int, entry: Tensor | None = None) -> Tensor:
        """What each pair gives to a factor of the weights, [B, N, H]."""
        made = torch.zeros(chosen.shape, dtype=torch.float32, device=v.device)
        _paired(_pair_products, shared, chosen, by_keys, dout_ptr=dout, v_ptr=v, product_ptr=made, entry_ptr=entry,
                dout_strides=row_strides(dout), v_strides=row_strides(v), d_strides=(dout.stride(-1), v.stride(-1)),
                term_strides=shared["term_strides"], GROUP=shared["GROUP"], WIDTHS=shared["WIDTHS_V"], TARGET=target)
        return made

    if needs["weight"] and not summed(weight, None):
        sums = products(7)                                  # of what chooses; what is chosen collects them
        if summed(weight, "queries") != by_keys:
            tokens = (call.q if by_keys else call.k).shape[1]
            of_chosen = torch.zeros((len(sums), tokens, sums.shape[2]), dtype=torch.float32, device=v.device)
            sums = _moved(sums[..., None], of_chosen[..., None], chosen, None, shared, by_keys, pick=False)[..., 0]
        found["weight"] = of_tokens(call, sums, weight)
    elif needs["weight"]:
        batch, queries, keys, heads = shared["sizes"][:4]
        found["weight"] = torch.empty(weight.shape, dtype=weight.dtype, device=v.device)
        _spread[(weight.shape[0] * weight.shape[1] * -(-queries // 32) * -(-keys // 32),)](
            chosen, products(7), found["weight"], shared["terms"], shared["sizes"],
            (weight.shape[1], batch // weight.shape[0], heads // weight.shape[1]), BLOCK_M=32, BLOCK_N=32, BY_KEYS=by_keys,
            num_warps=4, num_stages=1, enable_fp_fusion=True)
    if needs["weight_table"]:
        entry = torch.full_like(chosen, -1)
        found["weight_table"] = entry_gradient(products(27, entry), entry, call.weight_table)
    if needs["later_ratio"]:
        found["later_ratio"] = folded(products(28).sum(), call.later_ratio)
    if needs["query_weight"] and dkey_mean is not None:
        dweight = torch.empty(call.query_weight.shape, dtype=torch.float32, device=v.device)
        _moved(dkey_mean[..., None], dweight[..., None], chosen, None, shared, by_keys, pick=not by_keys)
        found["query_weight"] = dweight.to(call.query_weight.dtype)
    return found
