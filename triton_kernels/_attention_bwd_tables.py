"""The gradients of tables of offsets on a grid. All pairs of a row of the queries' grid and a row of the keys' grid with the same
step between them are added into one map of columns by columns, whose diagonals then are the entries of that step; what belongs to
the tokens in front of the grid is three sums of its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_bwd_sums import key_side, query_side
from ._attention_host import UNSPECIALIZED, folded, programs, row, tuned
from ._attention_terms import of_sample, row_factor
from ._attention_tiles import row_products, term_gradient, weights
from ._host import power
from ._reduce import add_parts


@triton.jit
def _gradient_tile(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, terms, q_strides, k_strides, v_strides, dout_strides, d_strides,
    strides, image, head, row, start, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """term_gradient of queries row.. and keys start.., which need not be aligned: [BLOCK_M, BLOCK_N], 0 past the last."""
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    factor = row_factor(terms, strides, head, scale)
    q, dout, lse, low, live, real, flat = query_side(
        q_ptr, dout_ptr, lse_ptr, low_ptr, terms, q_strides, dout_strides, d_strides, image, head, i, sizes,
        NORM, WIDTHS, WIDTHS_V, ALIGN)
    k, v = key_side(k_ptr, v_ptr, k_strides, v_strides, d_strides, image, head // GROUP, j, sizes, WIDTHS, WIDTHS_V, ALIGN)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + flat, mask=real, other=0.0)
    a = row_products(q, k, WIDTHS)
    p, slope, kept, dp, given, bare = weights(
        a, factor, lse, low, live, v, dout, terms, strides, image, head, row, start, sizes, threshold, keep_scale,
        NORM, AXES, RULE, FAR, CAUSAL, True, WIDTHS_V, BLOCK_M, BLOCK_N, False)
    return term_gradient(
        a, factor, p, slope, dp, delta, given, terms, strides, image, head, row, start, sizes, TARGET, AXES, FAR, True,
        BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_table(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, pair_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, sizes, members, chunks,
    scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The sums over all pairs of a row of queries and a row of keys one step apart, of BLOCK_M columns of queries and BLOCK_N of
    keys, for one head of the table TARGET and a chunk of the samples and heads that share it, in order; members = (table heads,
    samples and heads that share one).
    Grid: table heads (fastest) x query column tiles x key column tiles x steps (2 height - 1) x chunks, on axis 0. Writes
    [chunks, steps, table heads, columns of queries, columns of keys].
    Any strides: q, k, v, dout and the terms."""
    offset, height, width, prefix, columns, step = sizes[4], sizes[14], sizes[15], sizes[16], sizes[17], sizes[18]
    table_heads, total = members
    shared = sizes[3] // table_heads
    pid = tl.program_id(0)
    m_tiles = (columns + BLOCK_M - 1) // BLOCK_M
    n_tiles = (width + BLOCK_N - 1) // BLOCK_N
    table_head = pid % table_heads
    at_q = pid // table_heads % m_tiles * BLOCK_M
    at_k = pid // table_heads // m_tiles % n_tiles * BLOCK_N
    line = pid // table_heads // m_tiles // n_tiles                                    # chunk and step
    down = line % (2 * height - 1) - (height - 1)
    chunk = (line // (2 * height - 1)).to(tl.int64)
    first = (tl.maximum(-down, 0) + step - 1) // step                                  # of the rows of queries
    count = tl.maximum((height - 1 - tl.maximum(down, 0)) // step + 1 - first, 0)
    begin = (chunk * total // chunks).to(tl.int32) * count
    end = ((chunk + 1) * total // chunks).to(tl.int32) * count
    x_q = at_q + tl.arange(0, BLOCK_M)
    x_k = at_k + tl.arange(0, BLOCK_N)
    inside = (x_q < columns)[:, None] & (x_k < width)[None, :]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for n in tl.range(begin, end, num_stages=STAGES):
        member = n // count
        image = member // shared
        head = table_head + member % shared
        y_q = first + n % count
        row = prefix + y_q * columns + at_q
        start = prefix + (y_q * step + down) * width + at_k
        own = of_sample(terms, sizes, image)
        visit = (row < own[1]) & (start < own[2])
        if CAUSAL:
            visit = visit & (start <= row + (BLOCK_M - 1) + offset)
        if visit:
            x = _gradient_tile(
                q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, terms, q_strides, k_strides, v_strides, dout_strides,
                d_strides, term_strides, image, head, row, start, own, scale, threshold, keep_scale,
                NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, WIDTHS_V, ALIGN, BLOCK_M, BLOCK_N, TARGET)
            sums += tl.where(inside, x, 0.0)
    at = (line.to(tl.int64) * table_heads + table_head) * columns
    tl.store(pair_ptr + ((at + x_q)[:, None] * width + x_k[None, :]), sums, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _backward_prefix(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, beside_ptr,
    terms, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTHS: tl.constexpr, WIDTHS_V: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """The sums from prefix to grid, from grid to prefix and among the prefix, of BLOCK_M queries of one head and sample.
    Grid: heads (fastest) x query tiles x samples, on axis 0. Writes [programs / heads, heads, 3].
    Any strides: q, k, v, dout and the terms."""
    heads, prefix = sizes[3], sizes[16]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    last = tl.where(row < prefix, sizes[2], tl.minimum(sizes[2], prefix))
    to_grid = tl.zeros([BLOCK_M], tl.float32)
    from_grid = tl.zeros([BLOCK_M], tl.float32)
    among = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, tl.where(row < sizes[1], last, 0), BLOCK_N, num_stages=STAGES):
        x = _gradient_tile(
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, low_ptr, terms, q_strides, k_strides, v_strides, dout_strides,
            d_strides, term_strides, image, head, row, start, sizes, scale, threshold, keep_scale,
            NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, WIDTHS_V, ALIGN, BLOCK_M, BLOCK_N, TARGET)
        on_grid = (start + tl.arange(0, BLOCK_N) >= prefix)[None, :]
        of_grid = tl.sum(tl.where(on_grid, x, 0.0), 1)
        of_prefix = tl.sum(tl.where(on_grid, 0.0, x), 1)
        to_grid += tl.where(i < prefix, of_grid, 0.0)
        from_grid += tl.where(i < prefix, 0.0, of_prefix)
        among += tl.where(i < prefix, of_prefix, 0.0)
    at = beside_ptr + pid.to(tl.int64) * 3
    tl.store(at, tl.sum(to_grid, 0))
    tl.store(at + 1, tl.sum(from_grid, 0))
    tl.store(at + 2, tl.sum(among, 0))


@triton.jit(do_not_specialize=("chunks", "lines", "columns", "width", "step"))
def _diagonals(pair_ptr, out_ptr, out_stride, chunks, lines, columns, width, step, BLOCK: tl.constexpr):
    """The sums of a map of columns of queries by columns of keys over pairs at the same distance, and over the chunks.
    Grid: lines, a step and head each (fastest) x blocks of distances, on axis 0. Writes 2 width - 1 numbers of line n from
    n * out_stride on.
    Contiguous: maps [chunks, lines, columns, width]."""
    pid = tl.program_id(0)
    line = (pid % lines).to(tl.int64)
    n = pid // lines * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(0, chunks * columns, num_stages=1):
        place = (at // columns * lines.to(tl.int64) + line) * columns + at % columns
        x = n - (width - 1) + at % columns * step
        sums += tl.load(pair_ptr + (place * width + x), mask=(x >= 0) & (x < width), other=0.0)
    tl.store(out_ptr + (line * out_stride + n), sums, mask=n < 2 * width - 1)


@triton.jit(do_not_specialize=("tokens", "heads", "own_heads", "count"))
def _entry_sums(entry_ptr, product_ptr, out_ptr, tokens, heads, own_heads, count, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK_E entries of the gradient of one head of a table: the products of all pairs that name each, in order.
    Grid: table heads (fastest) x blocks of entries, on axis 0. Writes [table heads, entries].
    Contiguous: entries and products [tokens, H]."""
    pid = tl.program_id(0)
    own = pid % own_heads
    e = pid // own_heads * BLOCK_E + tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E, BLOCK], tl.float32)
    for head in tl.range(own, own + heads // own_heads, num_stages=1):
        for first in tl.range(0, tokens, BLOCK, num_stages=1):
            n = first + tl.arange(0, BLOCK)
            at = n.to(tl.int64) * heads + head
            named = tl.load(entry_ptr + at, mask=n < tokens, other=-1)
            g = tl.load(product_ptr + at, mask=n < tokens, other=0.0)
            acc += tl.where(e[:, None] == named[None, :], g[None, :], 0.0)
    tl.store(out_ptr + (own.to(tl.int64) * count + e), tl.sum(acc, 1), mask=e < count)


@triton.jit(do_not_specialize=("own_heads", "queries", "keys", "grid"))
def _map_offsets(map_ptr, out_ptr, own_heads, queries, keys, grid, BLOCK: tl.constexpr):
    """The sums of maps that are stored over the pairs of each step on a grid; grid = (height, width, prefix, columns, step).
    Grid: table heads (fastest) x steps (2 height - 1) x blocks of distances, on axis 0. Writes [heads, 2 height - 1, 2 width - 1].
    Contiguous: maps [heads, Nq, Nk]."""
    height, width, prefix, columns, step = grid
    pid = tl.program_id(0)
    head = (pid % own_heads).to(tl.int64)
    line = pid // own_heads % (2 * height - 1)
    down = line - (height - 1)
    n = pid // own_heads // (2 * height - 1) * BLOCK + tl.arange(0, BLOCK)
    first = (tl.maximum(-down, 0) + step - 1) // step
    last = tl.maximum((height - 1 - tl.maximum(down, 0)) // step + 1, first)
    sums = tl.zeros([BLOCK], tl.float32)
    for query in tl.range(first * columns, last * columns, num_stages=1):
        x = n - (width - 1) + query % columns * step
        key = prefix + (query // columns * step + down) * width
        at = (head * queries + prefix + query) * keys + key
        sums += tl.load(map_ptr + (at + x), mask=(x >= 0) & (x < width), other=0.0)
    tl.store(out_ptr + ((head * (2 * height - 1) + line) * (2 * width - 1) + n), sums, mask=n < 2 * width - 1)


def map_gradient(x: Tensor, grid: tuple[int, ...], table: Tensor) -> Tensor:
    """The gradient of a table [1, H|1, 1, entries] from a map [1, H|1, Nq, Nk] of its gradients at all pairs."""
    height, width, prefix = grid[:3]
    own, queries, keys = x.shape[1:]
    found = torch.empty((own, (2 * height - 1) * (2 * width - 1)), dtype=torch.float32, device=x.device)
    block = power(min(2 * width - 1, 128))
    _map_offsets[(own * (2 * height - 1) * -(-(2 * width - 1) // block),)](
        x, found, own, queries, keys, grid, BLOCK=block, num_warps=1, enable_fp_fusion=True)
    of_prefix = (x[0, :, :prefix, prefix:], x[0, :, prefix:, :prefix], x[0, :, :prefix, :prefix]) if prefix else ()
    parts = [found, *(part.sum((1, 2))[:, None] for part in of_prefix)]
    return torch.cat(parts, 1)[None, :, None].to(table.dtype)


def table_gradient(shared: dict, table: Tensor, target: int) -> Tensor:
    """The gradient of a table [1, H|1, 1, entries], whose place in `terms` is `target`."""
    batch, queries, _, heads = shared["sizes"][:4]
    height, width, prefix, columns, step = shared["sizes"][14:19]
    own, steps = table.shape[1], 2 * height - 1
    members = own, batch * heads // own
    blocks = tuned("backward_bias", shared)
    del blocks["CLIP"]
    across = blocks | {"BLOCK_M": min(blocks["BLOCK_M"], power(columns)), "BLOCK_N": min(blocks["BLOCK_N"], power(width))}
    fans = steps * own * -(-columns // across["BLOCK_M"]) * -(-width // across["BLOCK_N"])
    chunks = max(1, min(members[1], 4, row("backward_bias", shared)["programs"] // fans))

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=table.device)

    pairs, found = new(chunks, steps, own, columns, width), new(steps, own, 2 * width - 1)
    _backward_table[(fans * chunks,)](**shared, **across, pair_ptr=pairs, members=members, chunks=chunks, TARGET=target)
    block = power(min(2 * width - 1, 128))
    _diagonals[(steps * own * -(-(2 * width - 1) // block),)](
        pairs, found, 2 * width - 1, chunks, steps * own, columns, width, step, BLOCK=block, num_warps=1, enable_fp_fusion=True)
    parts = [found.transpose(0, 1).flatten(1)]
    if prefix:
        tiles = -(-queries // blocks["BLOCK_M"])
        beside = new(batch * tiles, heads, 3)
        _backward_prefix[(programs(shared, tiles),)](**shared, **blocks, beside_ptr=beside, TARGET=target)
        parts.append(add_parts(beside, torch.float32).unflatten(0, (own, -1)).sum(1))
    return folded(torch.cat(parts, 1)[None, :, None], table)


def entry_gradient(products: Tensor, entry: Tensor, table: Tensor) -> Tensor:
    """The products of all pairs, summed into the entries of a table [1, H|1, 1, entries]."""
    own, count = table.shape[1], table.shape[3]
    out = torch.empty((1, own, 1, count), dtype=torch.float32, device=table.device)
    tokens = entry.shape[0] * entry.shape[1]
    _entry_sums[(own * -(-count // 16),)](
        entry, products, out, tokens, entry.shape[2], own, count, BLOCK_E=16, BLOCK=128, num_warps=4, enable_fp_fusion=True)
    return out.to(table.dtype)
