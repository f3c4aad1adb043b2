"""Offsets that meet the content: every pair names a row of small tables, whose products with each query and key are at hand."""

import triton
import triton.language as tl


@triton.jit
def named_rows(ptr, strides, image, i, j):
    """The rows that queries i and keys j of a sample name; both must lie in it."""
    at = ptr + image.to(tl.int64) * strides[60]
    return tl.load(at + (i.to(tl.int64) * strides[61] + j.to(tl.int64) * strides[62]))


@triton.jit
def looked_up(ptr, strides, AT: tl.constexpr, image, head, n, rows):
    """What the tokens n of a sample have in the rows of their pairs."""
    at = ptr + (image.to(tl.int64) * strides[AT] + head.to(tl.int64) * strides[AT + 2])
    return tl.load((at + n.to(tl.int64) * strides[AT + 1]) + rows * strides[AT + 3]).to(tl.float32)


@triton.jit
def tile_places(row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Queries row.. and keys start.., those past the last as the last: [BLOCK_M, 1] and [1, BLOCK_N]."""
    i = tl.maximum(tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1), 0)
    j = tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1), 0)
    return i[:, None], j[None, :]


@triton.jit
def position_term(
    terms, strides, image, head, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the tables add to the scores of queries row.. and keys start..: [BLOCK_M, BLOCK_N]."""
    i, j = tile_places(row, start, sizes, BLOCK_M, BLOCK_N)
    rows = named_rows(terms[29], strides, image, i, j)
    x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if terms[30] is not None:
        x += looked_up(terms[30], strides, 63, image, head, i, rows)
    if terms[31] is not None:
        x += looked_up(terms[31], strides, 67, image, head, j, rows)
    return x


@triton.jit
def position_given(
    terms, strides, image, head, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the table of values adds to the gradients of the weights: [BLOCK_M, BLOCK_N]."""
    i, j = tile_places(row, start, sizes, BLOCK_M, BLOCK_N)
    return looked_up(terms[32], strides, 71, image, head, i, named_rows(terms[29], strides, image, i, j))
