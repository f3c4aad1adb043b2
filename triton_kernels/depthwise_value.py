"""depthwise_value on a GPU: a program per tile of cells and block of channels; for the weights one per chunk of cells and tap.

The meaning of every argument is that of the reference, vitkern/reference/depthwise_value.py. Any strides: v, dout, weight, bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons
from ._reduce import add_parts

MAX_SIDE = 15                                               # of a kernel: its taps are unrolled by the compiler
CELLS = 32                                                  # of a tile
CHANNELS = 64                                               # of a block, at most
CHUNKS = 64                                                 # of the cells of all maps, summed apart


@triton.jit
def _channels(block, channels, width, strides, BLOCK_C: tl.constexpr):
    """The channels of a block, which are real, and where they begin in a row of v."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < channels, (c // width).to(tl.int64) * strides[2] + (c % width).to(tl.int64) * strides[3]


@triton.jit
def _moved(at, rows, columns, strides, up, left):
    """Where cells `at` (image, row, column) moved by a tap begin in v, and whether they are on the map."""
    image, y, x = at
    y += up
    x += left
    return image * strides[0] + (y * columns + x).to(tl.int64) * strides[1], (y >= 0) & (y < rows) & (x >= 0) & (x < columns)


@triton.jit(do_not_specialize=("cells", "rows", "columns", "channels", "own", "blocks", "tiles"))
def _slide(
    v_ptr, weight_ptr, bias_ptr, out_ptr, v_strides, weight_strides, cells, rows, columns, channels, width, own, blocks, tiles,
    TALL: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, N, H D] = the taps times the cells around each, and the bias. TURNED: the kernel of the gradient.
    Grid: blocks of channels (fastest) x tiles of cells x images, on axis 0."""
    pid = tl.program_id(0)
    c, real, of_channel = _channels(pid % blocks, channels, width, v_strides, BLOCK_C)
    image = (pid // blocks // tiles).to(tl.int64)
    cell = pid // blocks % tiles * BLOCK + tl.arange(0, BLOCK)
    at = image, cell // columns, cell % columns
    acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c % own, mask=real, other=0.0).to(tl.float32)[None, :]
    for n in tl.range(TALL * WIDE):
        begin, inside = _moved(at, rows, columns, v_strides, n // WIDE - TALL // 2, n % WIDE - WIDE // 2)
        inside = inside & (cell < cells)
        v = tl.load(v_ptr + (begin[:, None] + of_channel[None, :]), mask=inside[:, None] & real[None, :], other=0.0)
        tap = TALL * WIDE - 1 - n if TURNED else n
        of_tap = tap // WIDE * weight_strides[2] + tap % WIDE * weight_strides[3]
        weight = tl.load(weight_ptr + ((c % own).to(tl.int64) * weight_strides[0] + of_tap), mask=real, other=0.0)
        acc += v.to(tl.float32) * weight.to(tl.float32)[None, :]                       # [BLOCK, BLOCK_C]
    to = (image * cells + cell)[:, None] * channels + c[None, :]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=(cell < cells)[:, None] & real[None, :])


@triton.jit(do_not_specialize=("batch", "cells", "rows", "columns", "channels", "blocks", "tiles", "per_chunk"))
def _weights(
    v_ptr, dout_ptr, part_ptr, v_strides, dout_strides, batch, cells, rows, columns, channels, width, blocks, tiles, per_chunk,
    TALL: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part [chunks, taps + 1, H D]: the sums of dout times the cell of each tap, and of dout alone.
    Grid: taps + 1 (fastest) x blocks of channels x chunks of tiles, on axis 0."""
    pid = tl.program_id(0)
    tap = pid % (TALL * WIDE + 1)
    block = pid // (TALL * WIDE + 1) % blocks
    chunk = pid // (TALL * WIDE + 1) // blocks
    c, real, of_channel = _channels(block, channels, width, v_strides, BLOCK_C)
    given = (c // width).to(tl.int64) * dout_strides[2] + (c % width).to(tl.int64) * dout_strides[3]
    alone = tap == TALL * WIDE
    acc = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for tile in tl.range(chunk * per_chunk, tl.minimum(tiles, (chunk + 1) * per_chunk)):
        place = tl.full([BLOCK], BLOCK, tl.int64) * tile + tl.arange(0, BLOCK)             # of the cells of all images
        image, cell = place // cells, (place % cells).to(tl.int32)
        real_cell = image < batch
        begin, inside = _moved((image, cell // columns, cell % columns), rows, columns, v_strides,
                               tap // WIDE - TALL // 2, tap % WIDE - WIDE // 2)
        g = tl.load(dout_ptr + ((image * dout_strides[0] + cell.to(tl.int64) * dout_strides[1])[:, None] + given[None, :]),
                    mask=real_cell[:, None] & real[None, :], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + (begin[:, None] + of_channel[None, :]),
                    mask=(inside & real_cell)[:, None] & real[None, :], other=0.0)
        acc += tl.where(alone, g, g * v.to(tl.float32))
    to = (chunk.to(tl.int64) * (TALL * WIDE + 1) + tap) * channels + c
    tl.store(part_ptr + to, tl.sum(acc, 0), mask=real)


def supported(v, weight, bias, grid) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("v", v, not isinstance(_slide, triton.JITFunction))
    if v.dtype not in DTYPES:
        why.append(f"v must be float32, bfloat16 or float16, got {v.dtype}")
    if max(weight.shape[2:]) > MAX_SIDE:
        why.append(f"the sides of weight may be {MAX_SIDE}, they are {list(weight.shape[2:])}")
    return why


def fwd(v, weight, bias, grid) -> Tensor:
    """out [B, N, H, D] in v's dtype, contiguous."""
    return _slid(v, weight, bias, grid, False)


def bwd(dout, v, weight, bias, grid, need) -> tuple[Tensor | None, ...]:
    """dv, dweight and dbias, each in the dtype of its tensor."""
    dv = _slid(dout, weight, None, grid, True) if need & 1 else None
    if not need & 6:
        return dv, None, None
    sums = _summed(dout, v, weight, grid)                                              # [taps + 1, H D]
    sums = sums.view(len(sums), -1, len(weight)).sum(1)                                # [taps + 1, H D|D]
    dweight = sums[:-1].t().reshape(weight.shape).to(weight.dtype) if need & 2 else None
    return dv, dweight, sums[-1].to(bias.dtype) if need & 4 and bias is not None else None


def _tile(v) -> dict:
    block = min(CHANNELS, triton.next_power_of_2(v.shape[2] * v.shape[3]))
    return {"BLOCK": CELLS, "BLOCK_C": block, "num_warps": 4, "enable_fp_fusion": True}


def _slid(v, weight, bias, grid, turned) -> Tensor:
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    batch, cells, heads, width = v.shape
    found, channels = _tile(v), heads * width
    blocks, tiles = triton.cdiv(channels, found["BLOCK_C"]), triton.cdiv(cells, CELLS)
    if out.numel():
        _slide[(blocks * tiles * batch,)](
            v, weight, None if bias is None else bias.contiguous(), out, v.stride(), weight.stride(), cells, *grid, channels, width,
            len(weight), blocks, tiles, TALL=weight.shape[2], WIDE=weight.shape[3], TURNED=turned, **found)
    return out


def _summed(dout, v, weight, grid) -> Tensor:
    """[taps + 1, H D] float32: the sums of dout times the cells of each tap, and of dout."""
    batch, cells, heads, width = v.shape
    taps, channels, found = weight.shape[2] * weight.shape[3] + 1, heads * width, _tile(v)
    tiles, blocks = triton.cdiv(batch * cells, CELLS), triton.cdiv(channels, found["BLOCK_C"])
    per_chunk = max(1, triton.cdiv(tiles, CHUNKS))
    chunks = max(1, triton.cdiv(tiles, per_chunk))
    parts = torch.empty(chunks, taps, channels, dtype=torch.float32, device=v.device)
    _weights[(taps * blocks * chunks,)](
        v, dout, parts, v.stride(), dout.stride(), batch, cells, *grid, channels, width, blocks, tiles, per_chunk,
        TALL=weight.shape[2], WIDE=weight.shape[3], **found)
    return add_parts(parts, torch.float32)
