"""Linear attention on a GPU, backward: from the gradients of features to those of q or k and of the parameters of their map.

A program takes one head of a run of sequences, so that there are few partial sums however many sequences there are; they are
added in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import linear_attention as forward
from ._linear_maps import (
    distances,
    favor,
    focused_u,
    focused_y,
    hash_kernel,
    hash_matrix,
    line,
    projected,
    projection,
    raised,
)
from ._linear_tiles import load_rows, part_of, place, spot
from ._reduce import add_parts
from .linear_attention import Call, count, heads_of, side_of, strides
from .linear_maps import lengths, pick, sides


@triton.jit
def _channel_grads(
    x_ptr, g_ptr, mask_ptr, maps, dx_ptr, part_ptr, cu_ptr, strides_x, strides_g, strides_mask, strides_dx, sequences, rows,
    columns, heads, tokens, side, groups, parts, rate,
    D: tl.constexpr, MAP: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Focused and polar maps; of the parameters [groups, parts, H, 1 or 2, D]. Grid: H (fastest), groups, parts."""
    head, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, BD)
    inside = (d < D)[None, :]
    divisor = tl.load(maps[0] + head * D + d, mask=d < D, other=1.0)
    power = tl.zeros([BLOCK, BD], tl.float32)
    if MAP == 10:
        power += tl.load(maps[1] + head * D + d, mask=d < D, other=1.0)[None, :]
    of_divisor = tl.zeros([BD], tl.float32)
    of_power = of_divisor
    for run in range(tl.cdiv(sequences - group, groups)):
        seq = group + run * groups
        x_at, first, count = place(seq, head, cu_ptr, rows, columns, tokens, strides_x)
        g_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_g)
        dx_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_dx)
        mask_at, _, _ = place(seq, head * 0, cu_ptr, rows, columns, tokens, strides_mask)
        start, stop = part_of(count, part, parts, BLOCK)
        for at in range(start, stop, BLOCK):
            t = at + tl.arange(0, BLOCK)
            valid = t < stop
            if mask_ptr is not None:
                valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
            x = load_rows(x_ptr + x_at, spot(first + t, side, strides_x), d, D, strides_x[6], valid).to(tl.float32)
            at_g = g_at + spot(first + t, side, strides_g)
            g = load_rows(g_ptr, at_g, d, D, strides_g[6], valid)
            if MAP == 10:
                h = load_rows(g_ptr, at_g + D * strides_g[6], d, D, strides_g[6], valid)
                y = x / divisor[None, :]
                size = tl.where(y > 0, y, tl.where(y < 0, -y, 1.0))
                u, log = raised(size, power)
                u = u * tl.where(y > 0, g, tl.where(y < 0, h, 0.0))
                of_power += tl.sum(u * log * 0.6931471805599453, 0)
                u = power * u / divisor[None, :]
                of_divisor -= tl.sum(u, 0)
                dx = u / tl.where(y < 0, -size, size)
            else:
                y = focused_y(x, divisor, inside)
                if MAP == 8:
                    top = tl.max(y, 1)
                    u = focused_u(y, top, rate)
                    length, of_u = tl.sqrt(tl.sum(y * y, 1)), tl.sqrt(tl.sum(u * u, 1))
                    along = tl.sum(u * g, 1) / of_u
                else:
                    to = maps[3] + (line(seq, first, cu_ptr, columns, tokens) + t) * 4
                    top = tl.load(to, mask=valid, other=1.0)
                    u = focused_u(y, top, rate)
                    length, of_u = tl.load(to + 1, mask=valid, other=1.0), tl.load(to + 2, mask=valid, other=1.0)
                    along = tl.load(to + 3, mask=valid, other=0.0)
                steep = rate * focused_u(y, top, rate - 1.0) * (length / (of_u * top))[:, None]
                u = u * (along / of_u)[:, None]
                dx = (y * (along / length)[:, None] + steep * (g - u)) / divisor[None, :]
                dx = tl.where(valid[:, None] & inside, dx, 0.0)
                of_divisor -= tl.sum(dx * y, 0)
                dx = tl.where(x > 0, dx, 0.0)
            if dx_ptr is not None:
                at_dx = dx_at + spot(first + t, side, strides_dx)[:, None] + d[None, :]
                tl.store(dx_ptr + at_dx, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & inside)
    if part_ptr is not None:
        slot = (group * parts + part).to(tl.int64) * heads + head
        if MAP == 10:
            tl.store(part_ptr + slot * 2 * D + d, of_divisor, mask=d < D)
            tl.store(part_ptr + slot * 2 * D + D + d, of_power, mask=d < D)
        else:
            tl.store(part_ptr + slot * D + d, of_divisor, mask=d < D)


@triton.jit
def _projection_grads(
    x_ptr, g_ptr, mask_ptr, maps, kept_ptr, dx_ptr, part_ptr, cu_ptr, strides_x, strides_g, strides_mask, strides_dx, sequences,
    rows, columns, heads, tokens, side, groups, parts, rate,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, OWN: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Hedgehog and Favor; of the matrix and its bias [groups, parts, H, M (D + 1)]. Grid: H (fastest), groups, parts times tiles
    of channels, each of which makes the projections anew."""
    head, group = tl.program_id(0), tl.program_id(1)
    part, tile = tl.program_id(2) % parts, tl.program_id(2) // parts
    d, m = tile * BT + tl.arange(0, BT), tl.arange(0, BM)
    inside = (m < M)[None, :]
    of_matrix = tl.zeros([BM, BT], tl.float32)
    of_bias = tl.zeros([BM], tl.float32)
    for run in range(tl.cdiv(sequences - group, groups)):
        seq = group + run * groups
        x_at, first, count = place(seq, head, cu_ptr, rows, columns, tokens, strides_x)
        g_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_g)
        dx_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_dx)
        mask_at, _, _ = place(seq, head * 0, cu_ptr, rows, columns, tokens, strides_mask)
        start, stop = part_of(count, part, parts, BLOCK)
        kept = 0.0
        if MAP == 14 and KEYS:
            kept = tl.load(kept_ptr + seq * heads + head)
        for at in range(start, stop, BLOCK):
            t = at + tl.arange(0, BLOCK)
            valid = t < stop
            if mask_ptr is not None:
                valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
            at_x = x_at + spot(first + t, side, strides_x)
            y, square = projected(x_ptr, at_x, valid, strides_x[6], maps[0], head, m, D, M, OWN, EXACT)
            at_g = g_at + spot(first + t, side, strides_g)
            g = load_rows(g_ptr, at_g, m, M, strides_g[6], valid)
            if MAP == 15:
                dy = tl.where(y > 0, g, 0.0)
            elif MAP == 14:
                e = favor(y * D ** -0.25, square * D ** -0.5, kept, inside, KEYS)
                dy = tl.where(inside, e, 0.0) * g * M ** -0.5
            else:
                if maps[1] is not None:
                    y += tl.load(maps[1] + head * OWN * M + m, mask=m < M, other=0.0)[None, :]
                h = load_rows(g_ptr, at_g + M * strides_g[6], m, M, strides_g[6], valid)
                dy = _hedgehog_grads(y, g, h, inside, rate, MAP)
            dy = tl.where(valid[:, None], dy, 0.0)
            if MAP >= 14:
                dy = dy * D ** -0.25
            x = load_rows(x_ptr, at_x, d, D, strides_x[6], valid).to(tl.float32)
            of_bias += tl.sum(dy, 0)
            of_matrix = tl.dot(tl.trans(dy), x, of_matrix, input_precision=PRECISION)
            if dx_ptr is not None:
                matrix = projection(maps[0], head, m, d, D, M, OWN)
                dx = tl.dot(dy, tl.trans(matrix), input_precision=PRECISION)
                if MAP == 14:
                    dx -= x * (tl.sum(dy, 1) * D ** -0.25)[:, None]
                at_dx = dx_at + spot(first + t, side, strides_dx)[:, None] + d[None, :]
                tl.store(dx_ptr + at_dx, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    if part_ptr is not None:
        part_ptr += ((group * parts + part).to(tl.int64) * heads + head) * (M * (D + 1))
        tl.store(part_ptr + m[:, None] * D + d[None, :], of_matrix, mask=(m < M)[:, None] & (d < D)[None, :])
        if tile == 0:
            tl.store(part_ptr + M * D + m, of_bias, mask=m < M)


@triton.jit
def _hedgehog_grads(y, g, h, inside, rate, MAP: tl.constexpr):
    """The gradient of y, where those of its features are g, and those of the features of -y are h."""
    if MAP == 12:
        e, n = _softmax(y, inside), _softmax(-y, inside)
        g, h = tl.where(e < rate, 0.0, g), tl.where(n < rate, 0.0, h)
        dy = e * (g - tl.sum(e * g, 1)[:, None]) - n * (h - tl.sum(n * h, 1)[:, None])
    else:
        if MAP == 11:
            y = 2.0 * y
        top = tl.max(tl.where(inside, tl.abs(y), 0.0), 1)[:, None]
        e, n = tl.where(inside, tl.exp(y - top), 0.0), tl.where(inside, tl.exp(-y - top), 0.0)
        if MAP == 11:
            total = tl.sum(e + n, 1)[:, None]
            e, n = e / total, n / total
        along = tl.sum(e * g + n * h, 1)[:, None]
        if MAP == 11:
            dy = 2.0 * (e * (g - along) - n * (h - along))
        else:
            # the gradient of the largest is shared by all that reach it
            first, second = (inside & (y == top)).to(tl.float32), (inside & (-y == top)).to(tl.float32)
            dy = e * g - n * h - along / tl.sum(first + second, 1)[:, None] * (first - second)
    return dy


@triton.jit
def _softmax(y, inside):
    y = tl.where(inside, y, float("-inf"))
    e = tl.exp(y - tl.max(y, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _hash_grads(
    x_ptr, g_ptr, mask_ptr, maps, kept_ptr, shift_ptr, dx_ptr, part_ptr, cu_ptr, strides_x, strides_g, strides_mask, strides_dx,
    sequences, rows, columns, heads, tokens, side, groups, parts,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr, KEYS: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Without `shift`, the gradients of the spreads [parts, S, H], groups being S; with what they leave for every distance, dx and
    those of the parameters [groups, parts, H, M (D + F + 1)]. Grid: H (fastest), groups, parts."""
    head, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d, f, m = tl.arange(0, BD), tl.arange(0, BF), tl.arange(0, BM)
    anchors_ptr = maps[0] + head * OWN * (M * D)
    of_spread = tl.zeros([BM], tl.float32)
    of_mean = of_spread
    of_far = of_spread
    of_matrix = tl.zeros([BM, BF], tl.float32)
    of_anchors = tl.zeros([BM, BD], tl.float32)
    for run in range(tl.cdiv(sequences - group, groups)):
        seq = group + run * groups
        x_at, first, count = place(seq, head, cu_ptr, rows, columns, tokens, strides_x)
        g_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_g)
        dx_at, _, _ = place(seq, head, cu_ptr, rows, columns, tokens, strides_dx)
        mask_at, _, _ = place(seq, head * 0, cu_ptr, rows, columns, tokens, strides_mask)
        start, stop = part_of(count, part, parts, BLOCK)
        spread = tl.load(kept_ptr + 2 * (seq * heads + head) + KEYS)
        for at in range(start, stop, BLOCK):
            t = at + tl.arange(0, BLOCK)
            valid = t < stop
            if mask_ptr is not None:
                valid = valid & (tl.load(mask_ptr + mask_at + spot(first + t, side, strides_mask), mask=valid, other=0) != 0)
            at_x = x_at + spot(first + t, side, strides_x)
            far = distances(x_ptr, at_x, anchors_ptr, m, valid, strides_x[6], D, M)
            e, kappa = hash_kernel(far, spread, maps, head, m, M, OWN)
            kappa = tl.where(valid[:, None], kappa, 0.0)
            matrix = hash_matrix(maps, head, m, f, F, M, OWN)
            g = load_rows(g_ptr, g_at + spot(first + t, side, strides_g), f, F, strides_g[6], valid)
            g = tl.where(tl.abs(tl.dot(kappa, matrix, input_precision=EXACT)) < 1, g, 0.0)
            dkappa = tl.dot(g, tl.trans(matrix), input_precision=PRECISION)            # [BLOCK, BM]
            dfar = tl.where(valid[:, None], dkappa * e / (-2.0 * spread), 0.0)
            if shift_ptr is None:
                of_spread -= tl.sum(dfar * far / spread, 0)
            else:
                shift = tl.load(shift_ptr + seq * heads + head)
                dfar += tl.where(valid[:, None] & (m < M)[None, :], shift, 0.0)
                x = load_rows(x_ptr, at_x, d, D, strides_x[6], valid).to(tl.float32)
                of_mean -= tl.sum(dkappa, 0)
                of_far += tl.sum(dfar, 0)
                of_matrix = tl.dot(tl.trans(kappa), g, of_matrix, input_precision=PRECISION)
                of_anchors = tl.dot(tl.trans(dfar), x, of_anchors, input_precision=PRECISION)
                if dx_ptr is not None:
                    dx = tl.dot(dfar, tl.trans(projection(anchors_ptr, 0, m, d, D, M, 0)), input_precision=PRECISION)
                    dx = 2.0 * (x * tl.sum(dfar, 1)[:, None] - dx)
                    at_dx = dx_at + spot(first + t, side, strides_dx)[:, None] + d[None, :]
                    tl.store(dx_ptr + at_dx, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    if shift_ptr is None:
        tl.store(part_ptr + (part * sequences + group) * heads + head, tl.sum(of_spread, 0))
    elif part_ptr is not None:
        part_ptr += ((group * parts + part).to(tl.int64) * heads + head) * (M * (D + F + 1))
        at = m[:, None] * D + d[None, :]
        anchors = tl.load(anchors_ptr + at, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0)
        tl.store(part_ptr + at, 2.0 * (anchors * of_far[:, None] - of_anchors), mask=(m < M)[:, None] & (d < D)[None, :])
        tl.store(part_ptr + M * D + m[:, None] * F + f[None, :], of_matrix, mask=(m < M)[:, None] & (f < F)[None, :])
        tl.store(part_ptr + M * (D + F) + m, of_mean, mask=m < M)


def map_gradients(call: Call, kept: Tensor, maps: list, gs: list, dxs: list, options: dict, wanted: list) -> list:
    """Fills dq and dk from the gradients gs of their features, and the gradients of the three parameters, where wanted."""
    total = None
    for keys, (x, side, own, g, dx) in enumerate(zip((call.q, call.k), sides(call), maps, gs, dxs, strict=True)):
        if g is None or (dx is None and not any(wanted)):
            continue
        if call.feature_map == "focused_width":
            lengths(call, x, side, own, options, g)
        found = _of_side(call, x, side, own, g, dx, kept, keys, options, any(wanted))
        if found is not None:
            total = found if total is None else total + found
    given = (call.map0, call.map1, call.map2)
    if total is None:
        return [torch.zeros_like(t) if want else None for t, want in zip(given, wanted, strict=True)]
    cuts, result = [0 if t is None else t.numel() // heads_of(call) for t in given], []
    for t, cut, want in zip(given, cuts, wanted, strict=True):
        result.append(total[:, :cut].reshape(t.shape).to(t.dtype) if want else None)
        total = total[:, cut:]
    return result


def _of_side(call, x, side, maps, g, dx, kept, keys, options, wanted) -> Tensor | None:
    """The gradients of the parameters, of every head or of all [H|1, their number], one behind the other."""
    name, heads, sequences = call.feature_map, x.shape[5], count(call)
    own = side_of(call, x, heads, options["BLOCK"]) | {"sequences": sequences}
    options = options | {"num_warps": 8}
    groups = min(sequences, max(1, triton.cdiv(forward.PROGRAMS, heads * own["parts"])))
    d, f, m = options["D"], options["F"], options["M"]
    size = {"polar": 2 * d, "hash": m * (d + f + 1)}.get(name, d if name.startswith("focused") else m * (d + 1))
    parts = x.new_empty((groups * own["parts"], heads, size), dtype=torch.float32) if wanted else None
    common = {
        **side, **own, "g_ptr": g, "maps": maps, "dx_ptr": dx, "part_ptr": parts, "strides_g": strides(g),
        "strides_dx": strides(dx), "groups": groups,
    }  # fmt: skip
    grid = (heads, groups, own["parts"])
    if name in ("focused_head", "focused_width", "polar"):
        _channel_grads[grid](**common, **pick(options, "rate", "D", "MAP", "BD"))
    elif name == "hash":
        more = pick(options, "D", "F", "M", "OWN", "EXACT", "PRECISION", "BD", "BF", "BM") | {"KEYS": keys, "kept_ptr": kept}
        spreads = x.new_empty((own["parts"], sequences, heads), dtype=torch.float32)
        each = common | {"dx_ptr": None, "part_ptr": spreads, "groups": sequences}
        _hash_grads[heads, sequences, own["parts"]](shift_ptr=None, **each, **more)
        shift = add_parts(spreads, torch.float32) / (_tokens(call, keys).clamp(min=1) * m)[:, None]
        _hash_grads[grid](shift_ptr=shift, **common, **more)
    else:
        names, tile = ("rate", "D", "M", "MAP", "OWN", "EXACT", "PRECISION", "BM"), 16 if m > 64 else min(options["BD"], 32)
        _projection_grads[heads, groups, own["parts"] * triton.cdiv(d, tile)](
            kept_ptr=kept, BT=tile, KEYS=keys, **common, **pick(options, *names))
    if not wanted:
        return None
    return add_parts(parts if heads_of(call) > 1 else parts.flatten(0, 1)[:, None], torch.float32)


def _tokens(call: Call, keys: int) -> Tensor:
    """The number of queries, or of valid keys, of every sequence [S]."""
    x, cu = (call.k, call.cu_k) if keys else (call.q, call.cu_q)
    used = torch.ones(x.shape[:5], device=x.device) if not keys or call.key_mask is None else call.key_mask.float()
    rows = used.transpose(2, 3).flatten(3, 4).flatten(0, 2)                             # [rows, N]
    if cu is None:
        return rows.sum(1)
    upto = torch.nn.functional.pad(rows.cumsum(1), (1, 0))
    return (upto[:, cu[1:].long()] - upto[:, cu[:-1].long()]).flatten()
