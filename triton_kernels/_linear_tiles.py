"""Tiles of linear attention: where tokens lie, features and their derivatives, divisors."""

import triton
import triton.language as tl

FEATURES = ("relu", "elu1", "identity", "leaky_relu", "exp", "softmax", "silu_norm", "sign", "focused_head", "focused_width",
            "polar", "hedgehog_joint", "hedgehog_split", "hedgehog_exp", "favor", "favor_relu", "hash")  # their places are MAP
DIVISORS = ("sum", "mean", "none", "max", "abs_max", "subtract")                        # their places are DIVISOR


@triton.jit
def place(seq, head, cu_ptr, rows, columns, tokens, strides):
    """Offset of the first token of a sequence and head, and its first token and their number."""
    if cu_ptr is not None:
        column = seq % columns
        first = tl.load(cu_ptr + column)
        at = (seq // columns).to(tl.int64) * strides[0]
        count = tl.load(cu_ptr + column + 1) - first
    else:
        window = seq // columns
        at = (window // rows).to(tl.int64) * strides[0] + (window % rows).to(tl.int64) * strides[1] \
            + (seq % columns).to(tl.int64) * strides[3]
        first = 0
        count = tokens
    return at + head.to(tl.int64) * strides[5], first, count


@triton.jit
def part_of(count, part, parts, BLOCK: tl.constexpr):
    """The tokens [start, stop) of a part: whole blocks."""
    blocks = tl.cdiv(count, BLOCK)
    each = tl.cdiv(blocks, parts)
    start = part * each * BLOCK
    return start, tl.minimum(start + each * BLOCK, count)


@triton.jit
def spot(t, side, strides):
    """Offsets of tokens of a map whose rows hold `side` of them."""
    return (t // side).to(tl.int64) * strides[2] + (t % side).to(tl.int64) * strides[4]


@triton.jit
def load_rows(ptr, at, c, width, stride, valid):
    """[BLOCK, C] of rows at offsets `at`; 0 where a row is not valid."""
    inside = valid[:, None] & (c < width)[None, :]
    return tl.load(ptr + at[:, None] + c[None, :] * stride, mask=inside, other=0.0)


@triton.jit
def features(x, d, lse, rate, D: tl.constexpr, MAP: tl.constexpr, KEYS: tl.constexpr):
    """phi(x) of x [BLOCK, BD] float32, 0 beyond D; lse [BD] of the softmax of keys."""
    inside = (d < D)[None, :]
    if MAP == 0:
        y = tl.where(x <= 0, 0.0, x)
    elif MAP == 1:
        y = tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    elif MAP == 3:
        y = tl.where(x > 0, x, 0.01 * x)
    elif MAP == 4:
        y = tl.exp(rate * x)
    elif MAP == 5:
        if KEYS:
            y = tl.exp(x - lse[None, :])
        else:
            x = tl.where(inside, x, float("-inf"))
            e = tl.exp(x - tl.max(x, 1)[:, None])
            y = e / tl.sum(e, 1)[:, None]
    elif MAP == 6:
        y = tl.where(inside, x * tl.sigmoid(x) + 0.5, 0.0)
        y = y / tl.sqrt(tl.sum(y * y, 1))[:, None]
    elif MAP == 7:
        y = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
    else:
        y = x
    return tl.where(inside, y, 0.0)


@triton.jit
def feature_grads(x, y, g, d, shift, rate, D: tl.constexpr, MAP: tl.constexpr, KEYS: tl.constexpr):
    """The gradient of x where g is that of y = phi(x); shift [BD] of the softmax of keys."""
    if MAP == 0:
        dx = tl.where(x > 0, g, 0.0)
    elif MAP == 1:
        dx = tl.where(x > 0, g, g * y)
    elif MAP == 3:
        dx = tl.where(x > 0, g, 0.01 * g)
    elif MAP == 4:
        dx = rate * y * g
    elif MAP == 5:
        along = tl.sum(y * g, 1)[:, None]
        if KEYS:
            along = shift[None, :]
        dx = y * (g - along)
    elif MAP == 6:
        s = tl.sigmoid(x)
        raw = tl.where((d < D)[None, :], x * s + 0.5, 0.0)
        norm = tl.sqrt(tl.sum(raw * raw, 1))[:, None]
        dx = (g - y * tl.sum(y * g, 1)[:, None]) / norm * (s * (1.0 + x * (1.0 - s)))
    elif MAP == 7:
        dx = tl.where(tl.abs(x) < 1, g, 0.0)
    else:
        dx = g
    return dx


@triton.jit
def partner(d, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The other channel of every channel's pair, itself beyond the pairs, and the sign of its part in the turned channel."""
    if HALF:
        other = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
        sign = tl.where(d < PAIRS, -1.0, 1.0)
    else:
        other = d ^ 1
        sign = tl.where(d % 2 == 0, -1.0, 1.0)
    return tl.where(d < 2 * PAIRS, other, d), sign


@triton.jit
def angles(cos_ptr, sin_ptr, seq, head, t, d, strides, valid, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [BLOCK, BD] of every channel's pair; 1 and 0 beyond the pairs. Tables [S|1, N, H|1, PAIRS] of equal strides."""
    pair = d % PAIRS if HALF else d // 2
    at = seq.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2] + t.to(tl.int64)[:, None] * strides[1] \
        + (pair * strides[3])[None, :]
    inside = valid[:, None] & (d < 2 * PAIRS)[None, :]
    return tl.load(cos_ptr + at, mask=inside, other=1.0), tl.load(sin_ptr + at, mask=inside, other=0.0)


@triton.jit
def factors(dot, n, scale, offset, eps, DIVISOR: tl.constexpr, DETACH: tl.constexpr):
    """o = num of_num + V of_values; the gradient of dot is <dout, o>, or <dout, V> of "subtract", times of_den."""
    den = dot * scale + offset * n
    if DIVISOR == 2:
        of_num = tl.full(den.shape, 1.0, tl.float32) * scale
        of_values = tl.full(den.shape, 1.0, tl.float32) * offset
        of_den = tl.zeros(den.shape, tl.float32)
    elif DIVISOR == 5:
        count = tl.maximum(n, 1.0)
        of_num = tl.full(den.shape, 1.0, tl.float32) * scale / count
        of_values = offset / count + (1.0 - den / count) / count
        of_den = tl.full(den.shape, -1.0, tl.float32) * scale / (count * count)
    else:
        sign = tl.full(den.shape, 1.0, tl.float32)
        if DIVISOR == 0:
            divisor = den + eps
        elif DIVISOR == 1:
            divisor = den + n * eps
        elif DIVISOR == 3:
            divisor = tl.where(den > eps, den, eps)
            sign = tl.where(den > eps, 1.0, 0.0)
        else:
            divisor = tl.where(tl.abs(den) > eps, tl.abs(den), eps)
            sign = tl.where(tl.abs(den) > eps, tl.where(den < 0, -1.0, 1.0), 0.0)
            if DETACH:
                sign = sign * 0.0
        safe = tl.where(divisor == 0, 1.0, divisor)
        of_num = tl.where(divisor == 0, 0.0, tl.div_rn(scale, safe))
        of_values = tl.where(divisor == 0, 0.0, tl.div_rn(offset, safe))
        of_den = -sign * of_num
    return of_num, of_values, of_den
