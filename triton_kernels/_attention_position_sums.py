"""Sums over the pairs that name each row of the tables of contextual positions: of the weights, which the table of values then
meets, and of dS, the gradients of what queries and keys add. Nothing of size [B, H, Nq, Nk] exists, only [B, N, H, rows].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd_sums import key_side, query_side
from ._attention_host import UNSPECIALIZED, folded, programs, tuned
from ._attention_positions import named_rows, tile_places
from ._attention_terms import last_key, of_sample, row_factor, scores, stream, weighed
from ._attention_tiles import divided_weights, load_parts, offsets, row_products, weights
from ._host import power
from ._reduce import add_parts
from ._tiles import keep_tile

ROWS = 32                               # of the tables to a program
TILE = 16                               # queries and keys: each pair meets all rows of a program


@triton.jit
def _kept_tile(
    q_ptr, k_ptr, lse_ptr, low_ptr, terms, q_strides, k_strides, d_strides, strides, image, head, row, start, sizes, scale,
    threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the values of keys start.. are multiplied by for queries row..: [BLOCK_M, BLOCK_N]."""
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    real = i < sizes[1]
    q = load_parts(q_ptr, offsets(image, head, i, q_strides, ALIGN), real, d_strides[0], WIDTHS)
    k = load_parts(k_ptr, offsets(image, head // GROUP, j, k_strides, ALIGN), j < sizes[2], d_strides[1], WIDTHS)
    a = row_products(q, k, WIDTHS)
    a += a * 0.0                                                                       # an infinity becomes NaN
    s = scores(a, row_factor(terms, strides, head, scale), terms, strides, image, head, row, start, sizes,
               AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
    flat = (image.to(tl.int64) * sizes[1] + i) * sizes[3] + head
    lse = tl.zeros([BLOCK_M], tl.float32)
    low = lse
    if lse_ptr is not None:
        lse = tl.load(lse_ptr + flat, mask=real, other=0.0)
        real = real & (lse != float("-inf"))
    if low_ptr is not None:
        low = tl.load(low_ptr + flat, mask=real, other=1.0)
    p, slope, bare = divided_weights(s, lse, low, terms, strides, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
    p = tl.where(real[:, None], p, 0.0)
    p = weighed(p, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[5] is not None:
        p = tl.where(keep_tile(stream(terms), image, head, i, start, threshold, BLOCK_N, sizes[1]), p * keep_scale, 0.0)
    return p


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _position_sums(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, sum_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """For BLOCK_M queries of one head and sample, or BLOCK_N keys, the sums over the pairs that name each of BLOCK_R rows: of dS,
    or, without dout, of the weights.
    Grid: heads (fastest) x tiles x samples on axis 0, blocks of rows on axis 1. Writes [B, N, H, rows].
    Any strides: q, k, v, dout and the terms."""
    OWN: tl.constexpr = BLOCK_N if BY_KEYS else BLOCK_M
    OTHER: tl.constexpr = BLOCK_M if BY_KEYS else BLOCK_N
    queries, keys, heads = sizes[1], sizes[2], sizes[3]
    pid = tl.program_id(0)
    count = keys if BY_KEYS else queries
    tiles = (count + OWN - 1) // OWN
    head = pid % heads
    own = pid // heads % tiles * OWN
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros([OWN, BLOCK_R], tl.float32)
    first = own * 0
    last = queries
    if not BY_KEYS:
        last = last_key(terms, sizes, own, keys, sizes[4], CAUSAL, BLOCK_M)
    elif CAUSAL:
        first = tl.maximum(own - sizes[4], 0) // BLOCK_M * BLOCK_M
    for other in tl.range(first, last, OTHER, num_stages=1, disable_licm=True):
        row = other if BY_KEYS else own
        start = own if BY_KEYS else other
        if dout_ptr is None:
            x = _kept_tile(
                q_ptr, k_ptr, lse_ptr, low_ptr, terms, q_strides, k_strides, d_strides, term_strides, image, head, row, start,
                sizes, scale, threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, ALIGN, CLIP, BLOCK_M, BLOCK_N)
        else:
            i = row + tl.arange(0, BLOCK_M)
            j = start + tl.arange(0, BLOCK_N)
            q, dout, lse, low, live, real, flat = query_side(
                q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
                NORM, WIDTHS, WIDTHS_V, ALIGN)
            k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes, WIDTHS, WIDTHS_V, ALIGN)
            delta = tl.zeros([BLOCK_M], tl.float32)
            if delta_ptr is not None:
                delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
            p, slope, kept, dp, given, bare = weights(
                row_products(q, k, WIDTHS), row_factor(terms, term_strides, head, scale), lse, low, live, v, dout, terms,
                term_strides, image, head, row, start, sizes, threshold, keep_scale, NORM, AXES, RULE, FAR, CAUSAL, CLIP, WIDTHS_V,
                BLOCK_M, BLOCK_N)
            x = slope * (dp - delta[:, None])
        at = tile_places(row, start, sizes, BLOCK_M, BLOCK_N)
        named = named_rows(terms[29], term_strides, image, at[0], at[1])
        met = tl.where(named[:, :, None] == r[None, None, :], x[:, :, None], 0.0)     # [BLOCK_M, BLOCK_N, BLOCK_R]
        sums += tl.sum(met, 0 if BY_KEYS else 1)
    n = own + tl.arange(0, OWN)
    at = ((image.to(tl.int64) * count + n) * heads + head) * sizes[19]
    tl.store(sum_ptr + (at[:, None] + r[None, :]), sums, mask=(n < count)[:, None] & (r < sizes[19])[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _pair_sums(
    chosen_ptr, weight_ptr, sum_ptr, terms, term_strides, sizes, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """Of hard choices: for BLOCK queries of one head and sample the sums of the weights of their pairs that name each of BLOCK_R
    rows.
    Grid: heads (fastest) x query tiles x samples on axis 0, blocks of rows on axis 1. Writes [B, Nq, H, rows].
    Any strides: the terms. chosen and weight are contiguous."""
    queries, keys, heads = sizes[1], sizes[2], sizes[3]
    pid = tl.program_id(0)
    tiles = (queries + BLOCK - 1) // BLOCK
    head = pid % heads
    i = pid // heads % tiles * BLOCK + tl.arange(0, BLOCK)
    image = pid // heads // tiles
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    inside = tl.minimum(i, queries - 1)
    base = image.to(tl.int64) * (keys if BY_KEYS else queries)
    for start in tl.range(0, keys if BY_KEYS else 1, BLOCK, num_stages=1):
        n = start + tl.arange(0, BLOCK) if BY_KEYS else i
        real = n < (keys if BY_KEYS else queries)
        flat = (base + n) * heads + head
        at = tl.load(chosen_ptr + flat, mask=real, other=-1)
        w = tl.where(at >= 0, 1.0, 0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + flat, mask=real, other=0.0)
        if BY_KEYS:
            named = named_rows(terms[29], term_strides, image, inside[:, None], tl.minimum(n, keys - 1)[None, :])
            x = tl.where(i[:, None] == at[None, :], w[None, :], 0.0)
            sums += tl.sum(tl.where(named[:, :, None] == r[None, None, :], x[:, :, None], 0.0), 1)
        else:
            named = named_rows(terms[29], term_strides, image, inside, tl.maximum(at, 0))
            sums += tl.where((named[:, None] == r[None, :]) & (at >= 0)[:, None], w[:, None], 0.0)
    at = ((image.to(tl.int64) * queries + i) * heads + head) * sizes[19]
    tl.store(sum_ptr + (at[:, None] + r[None, :]), sums, mask=(i < queries)[:, None] & (r < sizes[19])[None, :])


@triton.jit(do_not_specialize=("count", "tokens", "inner", "width", "x_strides", "w_strides"))
def _row_products(
    x_ptr, w_ptr, base_ptr, out_ptr, count, tokens, heads, inner, width, x_strides, w_strides, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = base + x @ w of each head, for BLOCK of the `count` tokens of all samples, each of `tokens`, and BLOCK columns.
    Grid: heads (fastest) x tiles of tokens on axis 0, columns on axis 1. Writes [count, H, width].
    Any strides: x (sample, token, head, column) and w (head, row, column). base and out are contiguous."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    t = (pid // heads * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    of_token = t // tokens * x_strides[0] + t % tokens * x_strides[1] + head * x_strides[2]
    for first in tl.range(0, inner, BLOCK, num_stages=1):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + (of_token[:, None] + c[None, :].to(tl.int64) * x_strides[3]),
                    mask=(t < count)[:, None] & (c < inner)[None, :], other=0.0).to(tl.float32)
        at = head * w_strides[0] + c[:, None].to(tl.int64) * w_strides[1] + d[None, :].to(tl.int64) * w_strides[2]
        w = tl.load(w_ptr + at, mask=(c < inner)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    at = (t * heads + head)[:, None] * width + d[None, :]
    inside = (t < count)[:, None] & (d < width)[None, :]
    if base_ptr is not None:
        acc += tl.load(base_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("count", "tokens", "rows", "width", "y_strides"))
def _table_sums(
    x_ptr, y_ptr, out_ptr, count, tokens, heads, rows, width, y_strides, BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_t x_tr y_td of each head, for BLOCK rows and BLOCK columns, over one of the chunks of the `count` tokens of all samples.
    Grid: heads (fastest) x blocks of rows on axis 0, columns on axis 1, chunks on axis 2. Writes [chunks, H, rows, width].
    Any strides: y (sample, token, head, column). x [count, H, rows] is contiguous."""
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    r = pid // heads * BLOCK + tl.arange(0, BLOCK)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chunk, chunks = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    last = (chunk + 1) * count // chunks
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in tl.range(chunk * count // chunks, last, BLOCK, num_stages=1):
        t = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + ((t * heads + head)[None, :] * rows + r[:, None]),
                    mask=(t < last)[None, :] & (r < rows)[:, None], other=0.0)
        at = t // tokens * y_strides[0] + t % tokens * y_strides[1] + head * y_strides[2]
        y = tl.load(y_ptr + (at[:, None] + d[None, :].to(tl.int64) * y_strides[3]),
                    mask=(t < last)[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(x, y, acc, input_precision="ieee")
    at = ((chunk * heads + head) * rows + r[:, None]) * width + d[None, :]
    tl.store(out_ptr + at, acc, mask=(r < rows)[:, None] & (d < width)[None, :])


@triton.jit(do_not_specialize=("heads", "queries", "keys", "rows", "index_strides"))
def _map_rows(
    map_ptr, index_ptr, sum_ptr, heads, queries, keys, rows, index_strides, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BY_KEYS: tl.constexpr,
):  # fmt: skip
    """position_sums of maps that are stored, for BLOCK queries or keys of one head and sample.
    Grid: heads (fastest) x tiles x samples on axis 0, blocks of rows on axis 1. Writes [B, N, H, rows].
    Any strides: the index (sample, query, key). Maps [B, H, Nq, Nk] are contiguous."""
    pid = tl.program_id(0)
    count = keys if BY_KEYS else queries
    tiles = (count + BLOCK - 1) // BLOCK
    head = pid % heads
    n = pid // heads % tiles * BLOCK + tl.arange(0, BLOCK)
    image = (pid // heads // tiles).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros([BLOCK, BLOCK_R], tl.float32)
    for start in tl.range(0, queries if BY_KEYS else keys, BLOCK, num_stages=1):
        other = start + tl.arange(0, BLOCK)
        i = (other if BY_KEYS else n)[:, None].to(tl.int64)
        j = (n if BY_KEYS else other)[None, :].to(tl.int64)
        inside = (i < queries) & (j < keys)
        x = tl.load(map_ptr + (((image * heads + head) * queries + i) * keys + j), mask=inside, other=0.0)
        at = image * index_strides[0] + i * index_strides[1] + j * index_strides[2]
        named = tl.load(index_ptr + at, mask=inside, other=-1)
        sums += tl.sum(tl.where(named[:, :, None] == r[None, None, :], x[:, :, None], 0.0), 0 if BY_KEYS else 1)
    at = ((image * count + n) * heads + head) * rows
    tl.store(sum_ptr + (at[:, None] + r[None, :]), sums, mask=(n < count)[:, None] & (r < rows)[None, :])


PRODUCTS = {"BLOCK": 32, "num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
CHUNKS = 32                             # of the tokens that a table's gradient sums
OF_GRADIENTS = ("v_ptr", "v_strides", "dout_ptr", "dout_strides", "delta_ptr")


def _value_strides(table: Tensor) -> tuple[int, int, int]:
    """(head, row, column) of a table of values [1, H|1, rows, Dv]."""
    return 0 if table.shape[1] == 1 else table.stride(1), table.stride(2), table.stride(3)


def add_values(base: Tensor, sums: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sums [B, Nq, H, rows] of the weights bring from the table, added to base [B, Nq, H, Dv] float32."""
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    batch, queries, heads, width = base.shape
    _row_products[(heads * -(-batch * queries // 32), -(-width // 32))](
        sums, table, base, out, batch * queries, queries, heads, sums.shape[3], width, sums.stride(), _value_strides(table),
        **PRODUCTS)
    return out


def with_given(shared: dict, dout: Tensor, table: Tensor | None) -> dict:
    """The arguments of the kernels with the products of dout and the table of values, if there is one."""
    if table is None:
        return shared
    batch, queries, heads, width = dout.shape
    given = torch.empty((batch, queries, heads, table.shape[2]), dtype=torch.float32, device=dout.device)
    strides, by_head = dout.stride(), _value_strides(table)
    _row_products[(heads * -(-batch * queries // 32), -(-given.shape[3] // 32))](
        dout, table, None, given, batch * queries, queries, heads, width, given.shape[3], strides,
        (by_head[0], by_head[2], by_head[1]), **PRODUCTS)
    terms, by_term = shared["terms"], shared["term_strides"]
    return shared | {
        "terms": (*terms[:32], given, *terms[33:]), "term_strides": (*by_term[:71], *given.stride(), *by_term[75:])}


def position_sums(shared: dict, by_keys: bool = False, weigh: bool = False) -> Tensor:
    """For every query, or key, the sums of dS over the pairs that name each row, or of the weights: [B, N, H, rows]."""
    batch, queries, keys, heads = shared["sizes"][:4]
    rows = shared["sizes"][19]
    blocks = tuned("backward_bias", shared) | {"BLOCK_M": TILE, "BLOCK_N": TILE, "CLIP": keys % TILE != 0}
    del blocks["STAGES"]
    sums = torch.empty((batch, keys if by_keys else queries, heads, rows), dtype=torch.float32, device=shared["q_ptr"].device)
    given = shared | (dict.fromkeys(OF_GRADIENTS) | {"v_strides": (0,) * 3, "dout_strides": (0,) * 3} if weigh else {})
    grid = programs(shared, -(-sums.shape[1] // TILE)), -(-rows // ROWS)
    _position_sums[grid](**given, **blocks, sum_ptr=sums, BLOCK_R=min(ROWS, power(rows)), BY_KEYS=by_keys)
    return sums


def map_rows(x: Tensor, index: Tensor, rows: int, by_keys: bool) -> Tensor:
    """The sums of maps [B, H, Nq, Nk] over the pairs that name each row: [B, N, H, rows]."""
    batch, heads, queries, keys = x.shape
    sums = torch.empty((batch, keys if by_keys else queries, heads, rows), dtype=torch.float32, device=x.device)
    strides = (0 if len(index) == 1 else index.stride(0), *index.stride()[1:])
    _map_rows[(batch * heads * -(-sums.shape[1] // TILE), -(-rows // ROWS))](
        x, index, sums, heads, queries, keys, rows, strides, BLOCK=TILE, BLOCK_R=min(ROWS, power(rows)), BY_KEYS=by_keys,
        num_warps=4, num_stages=1, enable_fp_fusion=True)
    return sums


def pair_sums(chosen: Tensor, weight: Tensor | None, shared: dict, by_keys: bool) -> Tensor:
    """position_sums of the weights of hard choices."""
    batch, queries, _, heads = shared["sizes"][:4]
    rows = shared["sizes"][19]
    sums = torch.empty((batch, queries, heads, rows), dtype=torch.float32, device=chosen.device)
    _pair_sums[(programs(shared, -(-queries // TILE)), -(-rows // ROWS))](
        chosen, weight, sums, shared["terms"], shared["term_strides"], shared["sizes"], BLOCK=TILE, BLOCK_R=min(ROWS, power(rows)),
        BY_KEYS=by_keys, num_warps=4, num_stages=1, enable_fp_fusion=True)
    return sums


def values_gradient(sums: Tensor, dout: Tensor, table: Tensor) -> Tensor:
    """The gradient of the table of values from the sums of the weights."""
    batch, queries, heads, width = dout.shape
    rows, count = sums.shape[3], batch * queries
    chunks = max(1, min(CHUNKS, count // 256))
    parts = torch.empty((chunks, heads, rows, width), dtype=torch.float32, device=dout.device)
    _table_sums[(heads * -(-rows // 32), -(-width // 32), chunks)](
        sums, dout, parts, count, queries, heads, rows, width, dout.stride(), **PRODUCTS)
    return folded(add_parts(parts, torch.float32)[None], table)
