"""channel_attention on a GPU: sums over the tokens in splits, the weights of a head, then rows of tokens.

The meaning of every argument is that of the reference, vitkern/reference/channel_attention.py. A split of a window leaves
partial products, which are added in order: no atomics. Products of 16-bit inputs are exact in TF32; weights enter as
a high and a low part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._channel_tiles import RELU, inverse_length, kept_logits, load_tile, normalized, place_of, store_twice, window_of
from ._host import DTYPES, device_reasons, power
from ._reduce import add_parts

NORMALIZERS = ("softmax", "relu", "none", "plus1")
PROGRAMS = 264                          # that the splits aim at: two to a multiprocessor of an H100
MAX_TOPK = 8
UNSPECIALIZED = ("windows", "across", "splits", "scale", "eps")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _products(
    a_ptr, b_ptr, bounds_ptr, order_ptr, mask_ptr, part_ptr, squares_ptr, a_strides, b_strides, shape, windows, heads, splits,
    total,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part [splits, B W H, D, E]: a^T b over a split of the tokens; squares [splits, B W H, D + E]: theirs.
    Grid: tiles of channels (fastest) x splits x heads x windows x samples, on axis 0. Any strides: a and b."""
    tiles_e = (E + BLOCK_C - 1) // BLOCK_C
    tiles = tiles_e * ((D + BLOCK_C - 1) // BLOCK_C)
    pid = tl.program_id(0)
    tile = pid % tiles
    split = pid // tiles % splits
    matrix = pid // tiles // splits
    head = (matrix % heads).to(tl.int64)
    window = matrix // heads % windows
    sample = (matrix // heads // windows).to(tl.int64)
    c = tile // tiles_e * BLOCK_C + tl.arange(0, BLOCK_C)
    e = tile % tiles_e * BLOCK_C + tl.arange(0, BLOCK_C)
    first_y, first_x, wide, count = window_of(window, bounds_ptr, shape)
    begin = (count.to(tl.int64) * split // splits).to(tl.int32)
    end = (count.to(tl.int64) * (split + 1) // splits).to(tl.int32)
    acc = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    square_c = tl.zeros([BLOCK_C], tl.float32)
    square_e = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        y, x, shown = place_of(i, i < end, first_y, first_x, wide, sample, order_ptr, mask_ptr, shape)
        a = load_tile(a_ptr, sample, head, y, x, shown, a_strides, c, D)
        b = load_tile(b_ptr, sample, head, y, x, shown, b_strides, e, E)
        acc += tl.dot(tl.trans(a), b, input_precision=PRECISION)
        if squares_ptr is not None:
            square_c += tl.sum(a * a, 0)
            square_e += tl.sum(b * b, 0)
    at = split.to(tl.int64) * total + matrix
    inside = (c < D)[:, None] & (e < E)[None, :]
    tl.store(part_ptr + at * D * E + c[:, None] * E + e[None, :], acc, mask=inside)
    if squares_ptr is not None:
        squares_ptr += at * (D + E)
        tl.store(squares_ptr + c, square_c, mask=c < tl.where(tile % tiles_e == 0, D, 0))
        tl.store(squares_ptr + D + e, square_e, mask=e < tl.where(tile < tiles_e, E, 0))


@triton.jit
def _heat(temperature_ptr, stride, head, c, D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The temperatures [ROWS] of rows c of a matrix."""
    if temperature_ptr is None:
        return tl.full([ROWS], 1.0, tl.float32)
    return tl.load(temperature_ptr + (head * GROUPS + c // (D // GROUPS)) * stride, mask=c < D, other=1.0).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _weights(
    gram_ptr, squares_ptr, temperature_ptr, mix_ptr, p_ptr, temperature_stride, mix_stride, heads, scale, eps,
    TOPK: tl.constexpr, NORMALIZE: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """p [B W H, D, E] of ROWS rows of a matrix. Grid: blocks of rows (fastest) x matrices, on axis 0. All but the
    parameters are contiguous."""
    blocks = (D + ROWS - 1) // ROWS
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    c = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)
    inside = (c < D)[:, None] & (e < E)[None, :]
    gram_ptr += matrix * D * E
    squares_ptr += matrix * (D + E)
    heat = _heat(temperature_ptr, temperature_stride, matrix % heads, c, D, GROUPS, ROWS)
    over_c = inverse_length(squares_ptr, c, c < D, eps, NORMALIZE)
    over_e = inverse_length(squares_ptr + D, e, e < E, eps, NORMALIZE)
    at = c[:, None] * E + e[None, :]
    logits = tl.load(gram_ptr + at, mask=inside, other=0.0) * scale * over_c[:, None] * over_e[None, :] * heat[:, None]
    every = (c >= 0)[:, None] & (e < E)[None, :]
    if len(TOPK) == 0:
        p = normalized(logits, every, NORM)
    else:
        p = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for t in tl.static_range(len(TOPK)):
            weight = 1.0
            if mix_ptr is not None:
                weight = tl.load(mix_ptr + t * mix_stride).to(tl.float32)
            best = kept_logits(logits, gram_ptr, squares_ptr + D, c, e, c < D, over_c, heat, scale, eps, TOPK[t], E, NORMALIZE)
            kept = every & best
            p += weight * normalized(logits, kept, NORM)
    tl.store(p_ptr + matrix * D * E + at, p, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _slopes(
    gram_ptr, squares_ptr, temperature_ptr, mix_ptr, dp_ptr, dgram_ptr, dsquares_ptr, p_ptr, slope_ptr, twice_ptr, heat_ptr,
    share_ptr, temperature_stride, mix_stride, heads, scale, eps,
    TOPK: tl.constexpr, NORMALIZE: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr, E: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of one matrix from dp: p and slope (the gradient of gram) [D, E], twice (2 times that of squares) [D + E], and the
    gradients of the temperature and of TOPK's weights. Grid: matrices. All but the parameters are contiguous."""
    matrix = tl.program_id(0).to(tl.int64)
    gram_ptr += matrix * D * E
    squares_ptr += matrix * (D + E)
    twice_ptr += matrix * (D + E)
    e = tl.arange(0, BLOCK_E)
    over_e = inverse_length(squares_ptr + D, e, e < E, eps, NORMALIZE)
    columns = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, D, ROWS):
        c = start + tl.arange(0, ROWS)
        heat = _heat(temperature_ptr, temperature_stride, matrix % heads, c, D, GROUPS, ROWS)
        inside = (c < D)[:, None] & (e < E)[None, :]
        at = c[:, None] * E + e[None, :]
        over_c = inverse_length(squares_ptr, c, c < D, eps, NORMALIZE)
        base = tl.load(gram_ptr + at, mask=inside, other=0.0) * scale * over_c[:, None] * over_e[None, :]
        logits = base * heat[:, None]
        dp = tl.load(dp_ptr + matrix * D * E + at, mask=inside, other=0.0)
        every = (c >= 0)[:, None] & (e < E)[None, :]
        p = tl.zeros([ROWS, BLOCK_E], tl.float32)
        dlogits = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for t in tl.static_range(max(1, len(TOPK))):
            weight = 1.0
            kept = every
            if len(TOPK) > 0:
                kept = every & kept_logits(
                    logits, gram_ptr, squares_ptr + D, c, e, c < D, over_c, heat, scale, eps, TOPK[t], E, NORMALIZE)
            if mix_ptr is not None:
                weight = tl.load(mix_ptr + t * mix_stride).to(tl.float32)
            part = normalized(logits, kept, NORM)
            dot = tl.sum(part * dp, 1)
            if NORM % 3 == 0:                                                          # softmax, plus1
                moved = part * (dp - dot[:, None])
            elif NORM == RELU:
                moved = tl.where(kept & (logits > 0.0), dp, 0.0)
            else:
                moved = tl.where(kept, dp, 0.0)
            dlogits += weight * moved
            p += weight * part
            if share_ptr is not None:
                own = tl.sum(tl.where(c < D, dot, 0.0))
                place = share_ptr + matrix * len(TOPK) + t
                if start > 0:
                    own += tl.load(place)
                tl.store(place, own)
        dlogits = tl.where(inside, dlogits, 0.0)
        slope = dlogits * heat[:, None] * scale * over_c[:, None] * over_e[None, :]
        if dgram_ptr is not None:
            slope += tl.load(dgram_ptr + matrix * D * E + at, mask=inside, other=0.0)
        tl.store(slope_ptr + matrix * D * E + at, slope, mask=inside)
        tl.store(p_ptr + matrix * D * E + at, p, mask=inside)
        if heat_ptr is not None:
            tl.store(heat_ptr + matrix * D + c, tl.sum(dlogits * base, 1), mask=c < D)
        rho = dlogits * logits
        columns += tl.sum(rho, 0)
        store_twice(tl.sum(rho, 1), over_c, squares_ptr, dsquares_ptr, twice_ptr, matrix * (D + E), c, c < D, eps, NORMALIZE)
    store_twice(columns, over_e, squares_ptr, dsquares_ptr, twice_ptr, matrix * (D + E), D + e, e < E, eps, NORMALIZE)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _apply(
    x_ptr, matrix_ptr, own_ptr, factor_ptr, y_ptr, bounds_ptr, order_ptr, mask_ptr, x_strides, own_strides, y_strides,
    matrix_strides, factor_stride, shape, windows, heads, splits,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y_nc = sum over e < E of x_ne m_ce + own_nc factor_c for c < D and a split of the tokens of a window; 0 where masked.
    Grid: tiles of c (fastest) x splits x heads x windows x samples, on axis 0. Any strides: x, own, y and the matrix."""
    tiles = (D + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    split = pid // tiles % splits
    matrix = pid // tiles // splits
    head = (matrix % heads).to(tl.int64)
    window = matrix // heads % windows
    sample = (matrix // heads // windows).to(tl.int64)
    matrix_ptr += matrix.to(tl.int64) * matrix_strides[0]
    first_y, first_x, wide, count = window_of(window, bounds_ptr, shape)
    begin = (count.to(tl.int64) * split // splits).to(tl.int32)
    end = (count.to(tl.int64) * (split + 1) // splits).to(tl.int32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=1):
        i = start + tl.arange(0, BLOCK_N)
        real = i < end
        y, x, shown = place_of(i, real, first_y, first_x, wide, sample, order_ptr, mask_ptr, shape)
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for first in tl.range(0, E, BLOCK_E, num_stages=1):
            e = first + tl.arange(0, BLOCK_E)
            m = tl.load(matrix_ptr + e[:, None] * matrix_strides[2] + c[None, :] * matrix_strides[1],
                        mask=(e < E)[:, None] & (c < D)[None, :], other=0.0)
            rows = load_tile(x_ptr, sample, head, y, x, shown, x_strides, e, E)
            if PRECISION == "tf32":                                                    # whose 10 bits rows fit into
                high = (m.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
                acc = tl.dot(rows, m - high, acc, input_precision="tf32")
                m = high
            acc = tl.dot(rows, m, acc, input_precision=PRECISION)
        if own_ptr is not None:
            factor = tl.load(factor_ptr + matrix.to(tl.int64) * factor_stride + c, mask=c < D, other=0.0)
            acc += load_tile(own_ptr, sample, head, y, x, shown, own_strides, c, D) * factor[None, :]
        at = sample * y_strides[0] + head * y_strides[3] + y * y_strides[1] + x * y_strides[2]
        at = at[:, None] + c.to(tl.int64)[None, :] * y_strides[4]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=real[:, None] & (c < D)[None, :])


# launches ---------------------------------------------------------------------------------------------------------------


def supported(
    q, k, v, temperature, topk_weight, key_mask, cu_seqlens, order, normalize, normalizer, topk, window, scale, eps
) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    why = device_reasons("q", q, not isinstance(_apply, triton.JITFunction))
    for name, t in (("q", q), ("temperature", temperature), ("topk_weight", topk_weight)):
        if t is not None and t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if len(topk) > MAX_TOPK:
        why.append(f"at most {MAX_TOPK} top-k softmaxes are mixed, there are {len(topk)}")
    return why


def blank(t: Tensor) -> Tensor:
    """Empty, with tokens side by side where they are so in t, else contiguous."""
    batch, high, wide, heads, width = t.shape
    if t.stride(2) == 1 and t.stride(4) != 1:
        return t.new_empty((batch, heads, width, high, wide)).permute(0, 3, 4, 1, 2)
    return t.new_empty(t.shape)


class _Launch:
    """What the launches of one call share."""

    def __init__(self, q, k, cu_seqlens, order, key_mask, window):
        batch, high, wide, heads, d = q.shape
        sides = window or [max(high, 1), max(wide, 1)]
        across = -(-wide // sides[1])
        self.windows = -(-high // sides[0]) * across
        self.longest = min(sides[0], high) * min(sides[1], wide)
        if cu_seqlens is not None:
            self.windows = cu_seqlens.shape[0] - 1
        self.d, self.e, self.heads, self.matrices = d, k.shape[4], heads, batch * self.windows * heads
        self.shape = (high, wide, *sides, across)
        self.where = {
            "bounds_ptr": cu_seqlens, "order_ptr": order, "shape": self.shape, "windows": self.windows, "heads": heads,
            "mask_ptr": None if key_mask is None else key_mask.view(torch.int8),
        }  # fmt: skip
        self.block = min(64, max(power(self.d), power(self.e)))
        self.exact = q.dtype == torch.float32
        self.precision = "ieee" if self.exact else "tf32"
        self.empty = self.matrices == 0 or high * wide == 0

    def splits(self, tiles: int, least: int) -> int:
        """Of the tokens of a window, from the shape alone; each has `least` tokens or more."""
        wanted = -(-PROGRAMS // max(1, self.matrices * tiles))
        return max(1, min(wanted, self.longest // least))

    def products(self, a: Tensor, b: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
        tiles = triton.cdiv(self.d, self.block) * triton.cdiv(self.e, self.block)
        splits = self.splits(tiles, 256)
        part = a.new_empty((splits, self.matrices, self.d, self.e), dtype=torch.float32)
        partial = a.new_empty((splits, self.matrices, self.d + self.e), dtype=torch.float32) if squares else None
        _products[(tiles * splits * self.matrices,)](
            a_ptr=a, b_ptr=b, part_ptr=part, squares_ptr=partial, a_strides=a.stride(), b_strides=b.stride(), splits=splits,
            total=self.matrices, **self.where, D=self.d, E=self.e, PRECISION=self.precision,
            BLOCK_N=32 if self.exact else 64, BLOCK_C=self.block, num_warps=8 if self.exact else 4,
        )  # fmt: skip
        return _added(part), None if partial is None else _added(partial)

    def apply(self, x, matrix, y, turned=False, own=None, factor=None) -> None:
        """y = x times matrix [M, D, E], or its transpose; `factor` has rows of D + E."""
        width, depth = (self.e, self.d) if turned else (self.d, self.e)
        tiles = triton.cdiv(width, self.block)
        splits = max(1, min(triton.cdiv(self.longest, 64), 16 * self.splits(tiles, 64)))
        strides = (self.d * self.e, 1, self.e) if turned else (self.d * self.e, self.e, 1)
        none = (0,) * 5
        _apply[(tiles * splits * self.matrices,)](
            x_ptr=x, matrix_ptr=matrix, own_ptr=own, factor_ptr=factor, y_ptr=y, x_strides=x.stride(),
            own_strides=none if own is None else own.stride(), y_strides=y.stride(), matrix_strides=strides,
            factor_stride=self.d + self.e, splits=splits, **self.where, D=width, E=depth,
            PRECISION=self.precision, BLOCK_N=32 if self.exact else 64, BLOCK_C=self.block, BLOCK_E=min(32, self.block),
            num_warps=4 if max(self.d, self.e) <= 64 else 8,
        )  # fmt: skip

    def rows(self, temperature, topk_weight, normalize, normalizer, topk, scale, eps) -> dict:
        """What the kernels of the matrices take."""
        block = power(self.e)
        return {
            "temperature_ptr": temperature, "mix_ptr": topk_weight, "heads": self.heads, "scale": scale, "eps": eps,
            "temperature_stride": 0 if temperature is None else temperature.stride(0),
            "mix_stride": 0 if topk_weight is None else topk_weight.stride(0), "TOPK": tuple(topk), "NORMALIZE": normalize,
            "NORM": NORMALIZERS.index(normalizer), "D": self.d, "E": self.e, "ROWS": max(8, 1024 // block), "BLOCK_E": block,
            "GROUPS": 1 if temperature is None else temperature.shape[0] // self.heads, "num_warps": 4,
        }  # fmt: skip


def _added(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else add_parts(parts, torch.float32)


def fwd(q, k, v, temperature, topk_weight, key_mask, cu_seqlens, order, normalize, normalizer, topk, window, scale, eps):
    """out as q lies, gram [B, W, H, D, E] and squares [B, W, H, D + E] in float32."""
    launch = _Launch(q, k, cu_seqlens, order, key_mask, window)
    out = blank(q)
    lead = (q.shape[0], launch.windows, launch.heads)
    if launch.empty:
        gram, squares = (torch.zeros((*lead, *n), device=q.device) for n in ((launch.d, launch.e), (launch.d + launch.e,)))
        return out, gram, squares
    gram, squares = launch.products(q, k, True)
    p = torch.empty_like(gram)
    rows = launch.rows(temperature, topk_weight, normalize, normalizer, topk, scale, eps)
    _weights[(triton.cdiv(launch.d, rows["ROWS"]) * launch.matrices,)](gram_ptr=gram, squares_ptr=squares, p_ptr=p, **rows)
    launch.apply(v, p, out)
    return out, gram.view(*lead, launch.d, launch.e), squares.view(*lead, launch.d + launch.e)


def bwd(
    dout, dgram, dsquares, gram, squares, q, k, v, temperature, topk_weight, key_mask, cu_seqlens, order, normalize,
    normalizer, topk, window, scale, eps, need,
):  # fmt: skip
    """dq, dk and dv as q, k and v lie, dtemperature [H G] and dtopk_weight [T]; None where `need` does not ask."""
    launch = _Launch(q, k, cu_seqlens, order, key_mask, window)
    dq, dk, dv = (blank(t) if need >> bit & 1 else None for bit, t in enumerate((q, k, v)))
    temperature_wanted, mix_wanted = need & 8 and temperature is not None, need & 16 and topk_weight is not None
    if launch.empty:
        return (
            dq, dk, dv, torch.zeros_like(temperature) if temperature_wanted else None,
            torch.zeros_like(topk_weight) if mix_wanted else None,
        )  # fmt: skip
    dout = q.new_zeros(()).expand(q.shape) if dout is None else dout
    dp, _ = launch.products(dout, v, False)
    p, slope, twice = torch.empty_like(dp), torch.empty_like(dp), torch.empty_like(squares)
    heat = torch.empty((launch.matrices, launch.d), dtype=torch.float32, device=q.device) if temperature_wanted else None
    share = torch.empty((launch.matrices, len(topk)), dtype=torch.float32, device=q.device) if mix_wanted else None
    _slopes[(launch.matrices,)](
        gram_ptr=gram, squares_ptr=squares, dp_ptr=dp, dgram_ptr=None if dgram is None else dgram.contiguous(),
        dsquares_ptr=None if dsquares is None else dsquares.contiguous(), p_ptr=p, slope_ptr=slope, twice_ptr=twice,
        heat_ptr=heat, share_ptr=share, **launch.rows(temperature, topk_weight, normalize, normalizer, topk, scale, eps),
    )  # fmt: skip
    if dq is not None:
        launch.apply(k, slope, dq, own=q, factor=twice)
    if dk is not None:
        launch.apply(q, slope, dk, True, own=k, factor=twice.view(-1)[launch.d :])
    if dv is not None:
        launch.apply(dout, p, dv, True)
    dtemperature = None
    if temperature_wanted:
        rows = add_parts(heat.view(-1, launch.heads * launch.d), torch.float32)
        dtemperature = rows.view(len(temperature), -1).sum(1).to(temperature.dtype)
    return dq, dk, dv, dtemperature, add_parts(share, topk_weight.dtype) if mix_wanted else None
