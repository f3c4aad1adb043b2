"""Linear attention, before the kernels over the tokens: what feature maps rest on of all heads of a token, or of all tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._linear_maps import distances, focused_u, focused_y, line, projected
from ._linear_tiles import load_rows, part_of, place, spot
from ._reduce import add_parts
from .linear_attention import Call, count, side_of, strides


@triton.jit
def _lengths(
    x_ptr, g_ptr, maps, cu_ptr, strides_x, strides_g, rows, columns, heads, tokens, side, parts, rate,
    D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The lengths of "focused_width"; <g, u> only with g, the gradient of the features. Grid: S (fastest), parts."""
    seq, part = tl.program_id(0), tl.program_id(1)
    x_at, first, count = place(seq, seq * 0, cu_ptr, rows, columns, tokens, strides_x)
    g_at, _, _ = place(seq, seq * 0, cu_ptr, rows, columns, tokens, strides_g)
    start, stop = part_of(count, part, parts, BLOCK)
    d = tl.arange(0, BD)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        at_x, at_g = x_at + spot(first + t, side, strides_x), g_at + spot(first + t, side, strides_g)
        top = tl.zeros([BLOCK], tl.float32)
        for h in range(heads):
            x = load_rows(x_ptr, at_x + h * strides_x[5], d, D, strides_x[6], valid).to(tl.float32)
            y = focused_y(x, tl.load(maps[0] + h * D + d, mask=d < D, other=1.0), (d < D)[None, :])
            top = tl.maximum(top, tl.max(y, 1))
        top = tl.where(valid, top, 1.0)
        square = tl.zeros([BLOCK], tl.float32)
        powers = square
        along = square
        for h in range(heads):
            x = load_rows(x_ptr, at_x + h * strides_x[5], d, D, strides_x[6], valid).to(tl.float32)
            y = focused_y(x, tl.load(maps[0] + h * D + d, mask=d < D, other=1.0), (d < D)[None, :])
            u = focused_u(y, top, rate)
            square += tl.sum(y * y, 1)
            powers += tl.sum(u * u, 1)
            if g_ptr is not None:
                along += tl.sum(u * load_rows(g_ptr, at_g + h * strides_g[5], d, D, strides_g[6], valid), 1)
        to = maps[3] + (line(seq, first, cu_ptr, columns, tokens) + t) * 4
        tl.store(to, top, mask=valid)
        tl.store(to + 1, tl.sqrt(square), mask=valid)
        tl.store(to + 2, tl.sqrt(powers), mask=valid)
        if g_ptr is not None:
            tl.store(to + 3, along / tl.sqrt(powers), mask=valid)


@triton.jit
def _tops(
    x_ptr, mask_ptr, maps, top_ptr, cu_ptr, strides_x, strides_mask, rows, columns, heads, tokens, side, parts,
    D: tl.constexpr, M: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of "favor" the largest <omega, x>, [parts, S, Hk]. Grid: S Hk (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    x_at, first, count = place(seq, head, cu_ptr, rows, columns, tokens, strides_x)
    mask_at, _, _ = place(seq, head * 0, cu_ptr, rows, columns, tokens, strides_mask)
    start, stop = part_of(count, part, parts, BLOCK)
    m = tl.arange(0, BM)
    top = tl.full([BM], float("-inf"), tl.float32)
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        at_x = x_at + spot(first + t, side, strides_x)
        y = projected(x_ptr, at_x, valid, strides_x[6], maps[0], head, m, D, M, 0, EXACT)[0]
        top = tl.maximum(top, tl.max(tl.where(valid[:, None] & (m < M)[None, :], y, float("-inf")), 0))
    tl.store(top_ptr + part * tl.num_programs(0) + unit, tl.max(top, 0) * D ** -0.25)


@triton.jit
def _spreads(
    x_ptr, mask_ptr, maps, sum_ptr, cu_ptr, strides_x, strides_mask, rows, columns, heads, tokens, side, parts,
    D: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Of "hash" the sum of the distances, and their number, [parts, S, H, 2]. Grid: S H (fastest), parts."""
    unit, part = tl.program_id(0), tl.program_id(1)
    seq, head = unit // heads, unit % heads
    x_at, first, count = place(seq, head, cu_ptr, rows, columns, tokens, strides_x)
    mask_at, _, _ = place(seq, head * 0, cu_ptr, rows, columns, tokens, strides_mask)
    start, stop = part_of(count, part, parts, BLOCK)
    m = tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    n = 0.0
    for at in range(start, stop, BLOCK):
        t = at + tl.arange(0, BLOCK)
        valid = t < stop
        if mask_ptr is not None:
            valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
        at_x = x_at + spot(first + t, side, strides_x)
        far = distances(x_ptr, at_x, maps[0] + head * OWN * (M * D), m, valid, strides_x[6], D, M)
        total += tl.sum(tl.where(valid[:, None], far, 0.0), 0)
        n += tl.sum(valid.to(tl.float32))
    out = sum_ptr + (part * tl.num_programs(0) + unit) * 2
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, n * M)


def sides(call: Call) -> list[dict]:
    """What kernels over the tokens of q, and of k, are told of them."""
    mask = None if call.key_mask is None else call.key_mask.view(torch.uint8)
    of_mask = strides(None if mask is None else mask[..., None])
    return [
        {"x_ptr": call.q, "mask_ptr": None, "cu_ptr": call.cu_q, "strides_x": strides(call.q), "strides_mask": (0,) * 7},
        {"x_ptr": call.k, "mask_ptr": mask, "cu_ptr": call.cu_k, "strides_x": strides(call.k), "strides_mask": of_mask},
    ]


def pick(options: dict, *names: str) -> dict:
    """Those options, and how every kernel runs."""
    return {n: options[n] for n in (*names, "rows", "columns", "BLOCK", "num_warps", "num_stages", "enable_fp_fusion")}


def parameters(call: Call, options: dict) -> list[tuple]:
    """`maps` of the kernels over q, and of those over k."""
    given = [None if t is None else t.float().contiguous() for t in (call.map0, call.map1, call.map2)]
    if call.feature_map != "focused_width":
        return [(*given, None)] * 2
    found = []
    for x, side in zip((call.q, call.k), sides(call), strict=True):
        maps = (*given, x.new_empty((*x.shape[:5], 4), dtype=torch.float32))
        lengths(call, x, side, maps, options)
        found.append(maps)
    return found


def lengths(call: Call, x: Tensor, side: dict, maps: tuple, options: dict, g: Tensor | None = None) -> None:
    """Fills the lengths in `maps`."""
    own = side_of(call, x, 1, options["BLOCK"]) | {"heads": x.shape[5]}
    names = ("x_ptr", "cu_ptr", "strides_x")
    _lengths[(count(call), own["parts"])](
        g_ptr=g, maps=maps, strides_g=strides(g), **{n: side[n] for n in names}, **own, **pick(options, "rate", "D", "BD"))


def kept_of(call: Call, maps: tuple, options: dict) -> Tensor:
    """What the map rests on of all tokens, [S, Hk, K]."""
    heads = call.k.shape[5]
    if call.feature_map not in ("favor", "hash"):
        return call.q.new_empty((count(call), heads, 0), dtype=torch.float32)
    found = []
    for x, side in tuple(zip((call.q, call.k), sides(call), strict=True))[call.feature_map == "favor" :]:
        own = side_of(call, x, heads, options["BLOCK"])
        grid, units = (count(call) * heads, own["parts"]), (own["parts"], count(call), heads)
        if call.feature_map == "favor":
            tops = x.new_empty(units, dtype=torch.float32)
            _tops[grid](maps=maps, top_ptr=tops, **side, **own, **pick(options, "D", "M", "EXACT", "BM"))
            top = tops.amax(0)
            found.append(top.masked_fill(top.isinf(), 0.0))
        else:
            sums = x.new_empty((*units, 2), dtype=torch.float32)
            _spreads[grid](maps=maps, sum_ptr=sums, **side, **own, **pick(options, "D", "M", "OWN", "BM"))
            total, n = add_parts(sums, torch.float32).unbind(-1)
            found.append(total / n.clamp(min=call.map0.shape[1]))
    return torch.stack(found, -1)
