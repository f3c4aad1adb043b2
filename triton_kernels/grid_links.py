"""grid_links on a GPU: the gradient of the links along the rows, twice. On the map with its axes exchanged the way from keys to
queries is what the way from queries to keys is here: so the links along the columns are links along rows, with the parts of queries
and keys exchanged too.

The meaning of every argument is that of the reference, vitkern/reference/grid_sum.py. A link gets what the pairs say whose way
crosses it: those of its block of BLOCK_X columns one by one, those beyond through states of keys and of queries that run
along the row, from the left (kept at each block by a first walk) and from the right. Only sums, no differences. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import grid_sum
from ._grid_tiles import column, from_place, line, links_along, pick, tile_of
from .grid_sum import Launch

BLOCK_X = 16


@triton.jit(do_not_specialize=("height", "columns", "heads"))
def row_links(
    g_ptr, a_ptr, b_ptr, c_ptr, row_ptr, col_ptr, state_ptr, kept_ptr, part_ptr, g_strides, a_strides, b_strides, c_strides,
    row_strides, col_strides, part_strides, height, columns, heads,
    F: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part [tiles, B, Hs, Ws, H] of the gradient of row. kept [B, H, Hs, blocks of columns, 2, F, C]: states of keys and of
    queries left of each block, decayed into its first column. Grid: tiles (fastest) x rows x heads x samples, on axis 0."""
    f, c, tile, tiles, place = tile_of(F, C, BLOCK_F, BLOCK_C)
    wide = tl.program_id(0).to(tl.int64) * 0
    y = place % height
    matrix = place // height
    head = (matrix % heads).to(tl.int64)
    sample = (matrix // heads).to(tl.int64)
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    a_at = sample * a_strides[0] + y.to(tl.int64) * a_strides[1] + head * a_strides[3]
    g_at = sample * g_strides[0] + y.to(tl.int64) * g_strides[1] + head * g_strides[3]
    row_at = sample * row_strides[0] + y.to(tl.int64) * row_strides[1] + head * row_strides[3]
    b_at = sample * b_strides[0] + head * b_strides[3]
    c_at = sample * c_strides[0] + head * c_strides[3]
    col_at = sample * col_strides[0] + head * col_strides[3]
    of_strip = (wide + columns) * F * C
    count = (height + BLOCK_R - 1) // BLOCK_R
    half = tl.num_programs(0).to(tl.int64) // tiles // height * count * of_strip
    state_ptr += (matrix.to(tl.int64) * count + y // BLOCK_R) * of_strip
    turns = (columns + BLOCK_X - 1) // BLOCK_X
    kept_ptr += (matrix.to(tl.int64) * height + y) * turns * 2 * F * C
    part_ptr += tile * part_strides[0] + sample * part_strides[1] + y.to(tl.int64) * part_strides[2] + head * part_strides[4]
    p = tl.arange(0, BLOCK_X)
    keys = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    queries = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    for block in tl.range(0, turns, num_stages=1):
        tl.store(kept_ptr + of_state, keys, mask=inside)
        tl.store(kept_ptr + F * C + of_state, queries, mask=inside)
        kept_ptr += 2 * F * C
        x = block * BLOCK_X + p
        a = line(a_ptr, a_strides, a_at, x, a_strides[2], x < columns, f, F)
        g = line(g_ptr, g_strides, g_at, x, g_strides[2], x < columns, c, C)
        links, after = links_along(row_ptr, row_at, x, row_strides[2], columns)
        onwards = tl.exp(tl.cumsum(after, 0, reverse=True))
        keys *= tl.exp(tl.sum(after))
        queries = queries * tl.exp(tl.sum(after)) + tl.dot(tl.trans(a * onwards[:, None]), g, input_precision="tf32x3")
        for i in tl.range(0, tl.minimum(columns - block * BLOCK_X, BLOCK_X), num_stages=1):
            t = column(
                b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, b_at, c_at, col_at, y,
                wide + block * BLOCK_X + i, height, half, f, c, inside, F, C, BLOCK_R,
            )  # fmt: skip
            keys += pick(onwards, p, i) * t
    tl.debug_barrier()                                                                 # what was kept is read
    keys = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)                                    # of the blocks behind, in their first column
    queries = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    for turn in tl.range(0, turns, num_stages=1):
        first = (turns - 1 - turn) * BLOCK_X
        x = first + p
        a = line(a_ptr, a_strides, a_at, x, a_strides[2], x < columns, f, F)
        g = line(g_ptr, g_strides, g_at, x, g_strides[2], x < columns, c, C)
        links, after = links_along(row_ptr, row_at, x, row_strides[2], columns)
        kept_ptr -= 2 * F * C
        keys_before = tl.load(kept_ptr + of_state, mask=inside, other=0.0)
        queries_before = tl.load(kept_ptr + F * C + of_state, mask=inside, other=0.0)
        onwards = tl.exp(tl.cumsum(after, 0, reverse=True))                            # from each column into the next block
        back = from_place(links, after, p, 0)                                          # from each column to the first
        whole = tl.exp(tl.sum(after))                                                  # from the first column into the next block
        through = whole * (tl.sum(keys_before * queries) + tl.sum(queries_before * keys))
        left = back * tl.sum(tl.dot(a, keys_before, input_precision="tf32x3") * g, 1)    # queries here, keys before
        right = onwards * tl.sum(tl.dot(a, keys, input_precision="tf32x3") * g, 1)       # queries here, keys behind
        met = through + tl.cumsum(left, 0, reverse=True) + tl.cumsum(right, 0) - right
        passed = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
        for i in tl.range(0, tl.minimum(columns - first, BLOCK_X), num_stages=1):
            t = column(
                b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, b_at, c_at, col_at, y, wide + first + i,
                height, half, f, c, inside, F, C, BLOCK_R,
            )  # fmt: skip
            w = from_place(links, after, p, i) * tl.sum(tl.dot(a, t, input_precision="tf32x3") * g, 1)
            behind = tl.cumsum(tl.where(p > i, w, 0.0), 0, reverse=True) + pick(onwards, p, i) * tl.sum(t * queries)
            before = pick(back, p, i) * tl.sum(t * queries_before)
            among = tl.where(p < i, w, 0.0)
            met += tl.where(p > i, behind, tl.cumsum(among, 0) - among + before)
            passed += pick(back, p, i) * t
        at = part_ptr + x.to(tl.int64) * part_strides[3]
        tl.store(at, met, mask=x < columns)
        keys = whole * keys + passed
        queries = whole * queries + tl.dot(tl.trans(a * back[:, None]), g, input_precision="tf32x3")


def supported(dout, a, b, c, row, col, turned) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    return grid_sum.supported(a, b, c, row, col, turned)


def of_rows(g, a, b, c, row, col) -> Tensor:
    """The gradient of row, where the way goes along the row of (a, g), then along the column of (b, c)."""
    launch = Launch(b, c)
    parts = a.new_empty((launch.tiles, *row.shape), dtype=torch.float32)
    turns = -(-launch.columns // BLOCK_X)
    kept = a.new_empty((launch.matrices, launch.height, turns, 2, launch.depth, launch.width), dtype=torch.float32)
    row_links[(launch.tiles * launch.height * launch.matrices,)](
        g, a, b, c, row, col, launch.states(b, c, col), kept, parts, g.stride(), a.stride(), b.stride(), c.stride(), row.stride(),
        col.stride(), parts.stride(), BLOCK_X=BLOCK_X, **launch.where,
    )  # fmt: skip
    return parts.sum(0)


def fwd(dout, a, b, c, row, col, turned) -> tuple[Tensor, Tensor]:
    if not a.numel() or not c.numel():
        return tuple(t.new_zeros(t.shape, dtype=torch.float32) for t in (row, col))
    queries, keys = (dout, a), (c, b)
    if turned:
        queries, keys = keys, queries
    drow = of_rows(*queries, *keys[::-1], row, col)
    exchanged = (t.transpose(1, 2) for t in (*keys, *queries[::-1], col, row))
    return drow, of_rows(*exchanged).transpose(1, 2)
