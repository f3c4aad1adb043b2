"""Tiles of sampled window attention: samples of a map, scores, and what the launch functions share.

What belongs to a place has shape [samples, 1], or [samples, BLOCK_D] where parts of a head's channels have places of their own.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power
from ._tiles import clean, load_rows
from .deformable_attention import place_of

MAX_WIDTH = {2: 256, 4: 64}             # D and Dv by the element's bytes; wider products of float32 spill their registers
CONFIGS = (                             # element bytes and width at most; queries and samples of a tile, warps
    (2, 32, 64, 32, 8), (2, 64, 64, 16, 8), (2, 256, 16, 16, 8), (4, 32, 32, 16, 8), (4, 64, 16, 16, 8),
)  # fmt: skip
UNSPECIALIZED = (
    "q_strides", "k_strides", "v_strides", "dout_strides", "coord_strides", "coord_v_strides", "of_strides", "bias_strides",
    "index_strides", "table_rows", "sizes", "counts", "heads", "samples", "total", "chunks",
)  # fmt: skip


@triton.jit
def places(
    coord_ptr, strides, image, window, head, j, samples, sizes, counts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Of the samples j: which lie on the map, their left upper cells, and how far behind those they are.
    strides: (image, window row, window column, sample, group, axis); sizes: those of the map of queries, then of the keys'."""
    at = image.to(tl.int64) * strides[0] + (window // counts[1]).to(tl.int64) * strides[1]
    at = at + (window % counts[1]).to(tl.int64) * strides[2] + (j.to(tl.int64) * strides[3])[:, None]
    real = (j < samples)[:, None]
    if PARTS > 1:
        d = tl.arange(0, BLOCK_D)
        at = at + ((head * PARTS + d // (D // PARTS)).to(tl.int64) * strides[4])[None, :]
        real = real & (d < D)[None, :]
    elif not SHARED:
        at = at + head.to(tl.int64) * strides[4]
    return place_of(coord_ptr, at, real, strides[5], sizes[2], sizes[3], False, True)


@triton.jit
def value_places(
    coord_ptr, coord_v_ptr, strides, strides_v, image, window, head, j, samples, sizes, counts,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, PARTS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The same of the values: their own places, or those of the keys."""
    if coord_v_ptr is not None:
        return places(coord_v_ptr, strides_v, image, window, head, j, samples, sizes, counts, DV, BLOCK_DV, PARTS, SHARED)
    return places(coord_ptr, strides, image, window, head, j, samples, sizes, counts, DV, BLOCK_DV, PARTS, SHARED)


@triton.jit
def sample_rows(
    ptr, strides, image, head, alive, left, top, fx, fy, sizes, D: tl.constexpr, BLOCK_D: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A map at its places, [samples, BLOCK_D] in float32, or their derivatives by x (SIDE 1) or y (SIDE 2).
    strides: (image, row, column, head, channel)."""
    d = tl.arange(0, BLOCK_D)
    base = ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    row, column = top.to(tl.int32), left.to(tl.int32)
    found = tl.zeros([alive.shape[0], BLOCK_D], tl.float32)
    for corner in tl.range(4, num_stages=1):                                           # a loop keeps the registers of one corner
        a, b = corner // 2, corner % 2
        inside = alive & (row + a >= 0) & (row + a < sizes[2]) & (column + b >= 0) & (column + b < sizes[3])
        at = (row + a) * strides[1] + (column + b) * strides[2] + (d * strides[4])[None, :]
        value = tl.load(base + at, mask=inside & (d < D)[None, :], other=0.0)
        share_y = tl.where(a == 1, fy, 1 - fy)
        share_x = tl.where(b == 1, fx, 1 - fx)
        if SIDE == 1:
            share_x = 2.0 * b - 1
        if SIDE == 2:
            share_y = 2.0 * a - 1
        found += share_y * share_x * value.to(tl.float32)
    return found


@triton.jit
def query_rows(first, window, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, sizes, counts):
    """The queries first.. of a window: their positions, cells of the map, and whether they lie on it."""
    i = first + tl.arange(0, BLOCK_M)
    y = window // counts[1] * WINDOW[0] + i // WINDOW[1]
    x = window % counts[1] * WINDOW[1] + i % WINDOW[1]
    return i, y, x, (i < WINDOW[0] * WINDOW[1]) & (y < sizes[0]) & (x < sizes[1])


@triton.jit
def load_queries(
    ptr, strides, image, head, y, x, real, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Their rows of a map: [BLOCK_M, BLOCK_D]."""
    at = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[3]
    at = at + y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2]
    return load_rows(ptr, at, real, strides[4], D, BLOCK_D)


@triton.jit
def load_bias(
    of_ptr, bias_ptr, index_ptr, of_strides, bias_strides, index_strides, table_rows, image, window, head, i, j, inside,
):  # fmt: skip
    """Bias [BLOCK_M, BLOCK_N] in float32: of the window, and of all windows or from a table by its index."""
    i = i.to(tl.int64)[:, None]
    j = j.to(tl.int64)[None, :]
    value = tl.zeros([inside.shape[0], inside.shape[1]], tl.float32)
    if of_ptr is not None:
        at = image.to(tl.int64) * of_strides[0] + window.to(tl.int64) * of_strides[1] + head.to(tl.int64) * of_strides[2]
        value += tl.load(of_ptr + at + i * of_strides[3] + j * of_strides[4], mask=inside, other=0.0).to(tl.float32)
    if index_ptr is not None:
        row = tl.load(index_ptr + i * index_strides[0] + j * index_strides[1], mask=inside, other=0)
        row = tl.minimum(tl.maximum(row, 0), table_rows - 1).to(tl.int64)
        at = row * bias_strides[0] + head.to(tl.int64) * bias_strides[1]
        value += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif bias_ptr is not None:
        at = head.to(tl.int64) * bias_strides[0] + i * bias_strides[1] + j * bias_strides[2]
        value += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def scores(
    q, keys, alive, i, j, real, samples, scale, of_ptr, bias_ptr, index_ptr, of_strides, bias_strides, index_strides, table_rows,
    image, window, head, MASK: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_M, BLOCK_N] of queries and sampled keys (float32), -inf where there is none or a query does not see it."""
    broken = tl.sum(tl.where(tl.abs(keys) < float("inf"), 0, 1), 1) > 0                # [BLOCK_N]
    s = tl.dot(q, tl.trans(clean(keys).to(q.dtype)), input_precision="ieee") * scale
    s = tl.where(broken[None, :], float("nan"), s)
    inside = real[:, None] & (j < samples)[None, :]
    if of_ptr is not None or bias_ptr is not None:
        bias = load_bias(of_ptr, bias_ptr, index_ptr, of_strides, bias_strides, index_strides, table_rows, image, window, head,
                         i, j, inside)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if MASK:
        inside = inside & (tl.max(alive.to(tl.int32), 1) > 0)[None, :]
    return tl.where(inside, s, float("-inf"))


def reasons(q, k, v, coords, coords_v, of_window, bias, interpreted: bool) -> list[str]:
    """Why the kernels cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("q", q, interpreted)
    if any(x.dtype != q.dtype or x.dtype not in DTYPES for x in (q, k, v)):
        why.append(f"q, k, v must share float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    most = MAX_WIDTH.get(q.element_size(), 256)
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[-1] <= most:
            why.append(f"the head size of {name} must lie in 1..{most} in {x.dtype}, got {x.shape[-1]}")
    spans = (sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) for x in (k, v))
    if max(*q.shape[1:3], *k.shape[1:3]) >= 2**24 or k.shape[1] * k.shape[2] >= 2**31 or max(spans) >= 2**31:
        why.append("a map must have sides below 2^24, and an image of k or v must span fewer than 2^31 elements")
    for name, x in (("coords", coords), ("coords_v", coords_v), ("of_window", of_window), ("bias", bias)):
        if x is not None and x.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    return why


def arguments(q, k, v, coords, coords_v, of_window, bias, index, window, scale, mask) -> dict:
    """What all kernels are given."""
    heads, groups, d, dv = q.shape[3], coords.shape[4], q.shape[4], v.shape[4]
    width = max(power(d), power(dv))
    size, n = q.element_size(), window[0] * window[1]
    block_m, block_n, warps = next(c[2:] for c in CONFIGS if c[0] >= size and c[1] >= width)
    given = {"q": q, "k": k, "v": v, "coord": coords, "coord_v": coords_v, "of": of_window, "bias": bias, "index": index}
    pointers = {f"{name}_ptr": t for name, t in given.items()}
    strides = {f"{name}_strides": (0,) * 6 if t is None else t.stride() for name, t in given.items()}
    return pointers | strides | {
        "table_rows": 0 if index is None else bias.shape[0], "sizes": (*q.shape[1:3], *k.shape[1:3]),
        "counts": tuple(coords.shape[1:3]), "heads": heads, "samples": coords.shape[3], "scale": scale,
        "WINDOW": tuple(window), "D": d, "DV": dv, "BLOCK_D": power(d), "BLOCK_DV": power(dv), "GROUP": heads // k.shape[3],
        "PARTS": 1 if groups == 1 else groups // heads, "SHARED": groups == 1, "MASK": mask,
        "BLOCK_M": min(block_m, power(n)), "BLOCK_N": min(block_n, power(coords.shape[3])), "num_warps": warps,
        "enable_fp_fusion": True,
    }  # fmt: skip


def window_count(coords: Tensor) -> int:
    """Of all images."""
    return coords.shape[0] * coords.shape[1] * coords.shape[2]

