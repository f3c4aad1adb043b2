"""Tiles of linear attention's feature maps that have parameters: features, and what they rest on.

`maps` are the parameters and the lengths of "focused_width": of every token, all its heads together, the largest y, |y|, |u|
and <g, u> / |u|. Those of a head lie one behind the other.
"""

import triton
import triton.language as tl

from ._linear_tiles import features, load_rows


@triton.jit
def line(seq, first, cu_ptr, columns, tokens):
    """The place of a sequence's first token among the tokens of all sequences."""
    row = seq // columns if cu_ptr is not None else seq
    return row.to(tl.int64) * tokens + first


@triton.jit
def rests_on(kept_ptr, unit, f, F: tl.constexpr, MAP: tl.constexpr, KEYS: tl.constexpr):
    """What the features of a sequence and key head rest on of all tokens: a number for each, or one."""
    if MAP == 5 and KEYS:
        kept = tl.load(kept_ptr + unit.to(tl.int64) * F + f, mask=f < F, other=0.0)
    elif MAP == 14 and KEYS:
        kept = tl.load(kept_ptr + unit)
    elif MAP == 16:
        kept = tl.load(kept_ptr + 2 * unit + (1 if KEYS else 0))
    else:
        kept = tl.zeros(f.shape, tl.float32)
    return kept


@triton.jit
def facing(f, e, F: tl.constexpr, E: tl.constexpr, MAP: tl.constexpr):
    """Rows of S as the features f of a query meet them: of "polar" the other half of them in the second half of the values."""
    row = f[:, None]
    if MAP == 10:
        row = tl.where((e < E // 2)[None, :], row, ((f + F // 2) % F)[:, None])
    return row


@triton.jit
def swapped(state_ptr, f, F: tl.constexpr, E: tl.constexpr):
    """z [BF] as the features of a query meet it in the second half of the values of "polar"."""
    return tl.load(state_ptr + (f + F // 2) % F * (E + 1) + E, mask=f < F, other=0.0)


@triton.jit
def halves(e, E: tl.constexpr, first, second):
    """Numbers [BLOCK, BE] of two halves of the values, from those of each [BLOCK]."""
    return tl.where((e < E // 2)[None, :], first[:, None], second[:, None])


@triton.jit
def raised(y, power):
    """y^power, 0 where y is not positive, and log2 y; only the mantissa goes through the logarithm."""
    y = tl.where(y > 0, y, 1.0)
    bits = y.to(tl.int32, bitcast=True)
    whole = (bits - 0x3F3504F3) >> 23
    log = tl.log2((bits - (whole << 23)).to(tl.float32, bitcast=True))                  # in [-1/2, 1/2]
    high = (power.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    whole = whole.to(tl.float32)
    exact = whole * high
    n = tl.floor(exact + 0.5)
    low = (exact - n) + whole * (power - high) + power * log
    half = tl.floor(n * 0.5)
    return tl.exp2(low) * tl.exp2(half) * tl.exp2(n - half), whole + log


@triton.jit
def focused_y(x, divisor, inside):
    return tl.where(inside, (tl.where(x <= 0, 0.0, x) + 1e-6) / divisor[None, :], 0.0)


@triton.jit
def focused_u(y, top, rate):
    """(y / top)^rate."""
    power = tl.zeros(y.shape, tl.float32) + rate
    return tl.where(y > 0, raised(y / top[:, None], power)[0], 0.0)


@triton.jit
def projection(map_ptr, head, m, d, D: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr):
    """Rows m of a head's matrix [M, D], as columns: [BD, BM]."""
    at = map_ptr + head * OWN * (M * D) + m[None, :] * D + d[:, None]
    return tl.load(at, mask=(m < M)[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def projected(ptr, at, valid, stride, map_ptr, head, m, D: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr):
    """x times the rows m of a head's matrix [BLOCK, BM], and |x|^2, sixteen channels at a time: the matrix takes few registers."""
    y = tl.zeros([at.shape[0], m.shape[0]], tl.float32)
    square = tl.zeros([at.shape[0]], tl.float32)
    for c in range(0, D, 16):
        d = c + tl.arange(0, 16)
        x = load_rows(ptr, at, d, D, stride, valid).to(tl.float32)
        y = tl.dot(x, projection(map_ptr, head, m, d, D, M, OWN), y, input_precision=EXACT)
        square += tl.sum(x * x, 1)
    return y, square


@triton.jit
def distances(ptr, at, anchors_ptr, m, valid, stride, D: tl.constexpr, M: tl.constexpr):
    """|x - anchor|^2 [BLOCK, BM], of differences: 0 beyond M."""
    far = tl.zeros([at.shape[0], m.shape[0]], tl.float32)
    for c in range(D):
        x = tl.load(ptr + at + c * stride, mask=valid, other=0.0).to(tl.float32)
        apart = x[:, None] - tl.load(anchors_ptr + m * D + c, mask=m < M, other=0.0)[None, :]
        far += apart * apart
    return tl.where((m < M)[None, :], far, 0.0)


@triton.jit
def phi(
    ptr, at, f, kept, valid, stride, maps, head, token, rate, KEYS: tl.constexpr, D: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    MAP: tl.constexpr, OWN: tl.constexpr, EXACT: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """phi(x) [BLOCK, BF] of the rows at offsets `at`, 0 beyond F; before it x, of a map of single channels. `token`: `line`."""
    inside = (f < F)[None, :]
    if MAP < 8:
        x = load_rows(ptr, at, f, D, stride, valid).to(tl.float32)
        y = features(x, f, kept, rate, D, MAP, KEYS)
    elif MAP <= 9:
        x = load_rows(ptr, at, f, D, stride, valid).to(tl.float32)
        y = focused_y(x, tl.load(maps[0] + head * D + f, mask=f < D, other=1.0), inside)
        if MAP == 8:
            top = tl.max(y, 1)
            u = focused_u(y, top, rate)
            ratio = tl.sqrt(tl.sum(y * y, 1)) / tl.sqrt(tl.sum(u * u, 1))
        else:
            at = maps[3] + token * 4
            u = focused_u(y, tl.load(at, mask=valid, other=1.0), rate)
            ratio = tl.load(at + 1, mask=valid, other=1.0) / tl.load(at + 2, mask=valid, other=1.0)
        y = u * ratio[:, None]
    elif MAP == 10:
        c = head * D + f % D
        x = load_rows(ptr, at, tl.where(f < F, f % D, D), D, stride, valid).to(tl.float32)
        y = x / tl.load(maps[0] + c)[None, :] * tl.where(f < D, 1.0, -1.0)[None, :]
        power = tl.zeros(y.shape, tl.float32) + tl.load(maps[1] + c)[None, :]
        y = tl.where(y > 0, raised(y, power)[0], tl.where(y <= 0, 0.0, y))
    elif MAP == 16:
        m = tl.arange(0, BM)
        x = distances(ptr, at, maps[0] + head * OWN * (M * D), m, valid, stride, D, M)
        kappa = hash_kernel(x, kept, maps, head, m, M, OWN)[1]
        x = tl.dot(kappa, hash_matrix(maps, head, m, f, F, M, OWN), input_precision=EXACT)
        y = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    else:
        if MAP <= 13:
            half = f < M
            m = tl.where(f < F, f % M, M)
            y = projected(ptr, at, valid, stride, maps[0], head, m, D, M, OWN, EXACT)[0]
            if maps[1] is not None:
                y += tl.load(maps[1] + head * OWN * M + f % M)[None, :]
            y = hedgehog(y * tl.where(half, 1.0, -1.0)[None, :], half[None, :], inside, rate, MAP)
        else:
            y, square = projected(ptr, at, valid, stride, maps[0], head, f, D, M, OWN, EXACT)
            y = y * D ** -0.25
            if MAP == 14:
                y = (favor(y, square * D ** -0.5, kept, inside, KEYS) + rate) * M ** -0.5
            if MAP == 15:
                y = tl.where(y <= 0, 0.0, y) + 1e-3
        x = y
    return x, tl.where(inside, y, 0.0)


@triton.jit
def hedgehog(y, half, inside, rate, MAP: tl.constexpr):
    """The features of y and -y one behind the other; `half`: the first."""
    if MAP == 11:
        y = 2.0 * y
    y = tl.where(inside, y, float("-inf"))
    if MAP == 12:
        first, second = tl.max(tl.where(half, y, float("-inf")), 1), tl.max(tl.where(half, float("-inf"), y), 1)
        e = tl.exp(y - tl.where(half, first[:, None], second[:, None]))
        first, second = tl.sum(tl.where(half, e, 0.0), 1), tl.sum(tl.where(half, 0.0, e), 1)
        e = e / tl.where(half, first[:, None], second[:, None])
        e = tl.where(e < rate, rate, e)
    else:
        e = tl.exp(y - tl.max(y, 1)[:, None])
        if MAP == 11:
            e = e / tl.sum(e, 1)[:, None]
    return e


@triton.jit
def favor(y, square, kept, inside, KEYS: tl.constexpr):
    """exp(y - square / 2 - top): the largest y of a query, `kept` of the keys."""
    top = square * 0.0 + kept if KEYS else tl.max(tl.where(inside, y, float("-inf")), 1)
    return tl.exp(y - (square * 0.5 + top)[:, None])


@triton.jit
def hash_kernel(far, spread, maps, head, m, M: tl.constexpr, OWN: tl.constexpr):
    """exp(-far / (2 spread)) [BLOCK, BM], and the same less its mean, 0 beyond M."""
    inside = (m < M)[None, :]
    e = tl.exp(-far / (2.0 * spread))
    mean = tl.load(maps[2] + head * OWN * M + m, mask=m < M, other=0.0)
    return tl.where(inside, e, 0.0), tl.where(inside, e - mean[None, :], 0.0)


@triton.jit
def hash_matrix(maps, head, m, f, F: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr):
    """A [BM, BF] of a head."""
    at = maps[1] + head * OWN * (M * F) + m[:, None] * F + f[None, :]
    return tl.load(at, mask=(m < M)[:, None] & (f < F)[None, :], other=0.0)
