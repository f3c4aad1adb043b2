"""What depends on the offset between query and key on a grid alone, read from tables, and what belongs to keys behind the
query's own place. An entry for every key minus query, row-major; with a prefix three more: prefix to grid, grid to prefix,
among the prefix.
"""

import triton
import triton.language as tl


@triton.jit
def entries(i, j, sizes):
    """The entries of queries i and keys j of a sample, which broadcast; both must lie in it."""
    height, width, prefix, columns, step = sizes[14], sizes[15], sizes[16], sizes[17], sizes[18]
    across = 2 * width - 1
    query, key = tl.maximum(i - prefix, 0), tl.maximum(j - prefix, 0)
    of_query = (query // columns * across + query % columns) * step
    of_key = key // width * across + key % width
    on_grid = of_key - of_query + ((height - 1) * across + width - 1)
    beside = (2 * height - 1) * across + tl.where(i < prefix, tl.where(j < prefix, 2, 0), 1)
    return tl.where((i < prefix) | (j < prefix), beside, on_grid)


@triton.jit
def table_term(
    ptr, strides, head, row, start, sizes, AT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A table at queries row.. and keys start..: [BLOCK_M, BLOCK_N] in float32."""
    i = tl.maximum(tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1), 0)[:, None]
    j = tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1), 0)[None, :]
    at = ptr + head.to(tl.int64) * strides[AT]
    return tl.load(at + entries(i, j, sizes) * strides[AT + 1]).to(tl.float32)


@triton.jit
def ratio_tile(ptr, row, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The ratio for keys behind the query's own place, 1 for the others: [BLOCK_M, BLOCK_N]."""
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    return tl.where(j[None, :] > i[:, None], tl.load(ptr).to(tl.float32), 1.0)
