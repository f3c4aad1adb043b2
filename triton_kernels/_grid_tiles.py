"""The kernels of grid_sum: the columns at strips of rows, then the rows.

A state [F, C] is a sum of b c^T under decays. BLOCK_R rows make a strip. `strips` keeps, for each column at each strip, that of the
rows above, decayed into its first row, and of those below, decayed into its last. A program of `rows` has one row: column x'
gives it the state T[x'] of all rows, made of these two and the strip's own keys; a block of BLOCK_X queries takes each T[x'] of its
block with the decays between, and the others from two states that run along the row. Links are summed forwards, never as a
difference. No atomics.
"""

import triton
import triton.language as tl


@triton.jit
def from_place(links, after, at, i):
    """The decays between place i and each place: `links` into it from the place before, `after` from it into the next one."""
    up = tl.cumsum(tl.where(at > i, links, 0.0), 0)
    down = tl.cumsum(tl.where(at < i, after, 0.0), 0, reverse=True)
    return tl.exp(up + down)


@triton.jit
def tile_of(F: tl.constexpr, C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a program, its tile of the state (fastest), the tiles, and its number among those of other places."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    tiles = blocks * ((F + BLOCK_F - 1) // BLOCK_F)
    tile = tl.program_id(0) % tiles
    f = tile // blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tile % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return f, c, tile, tiles, tl.program_id(0) // tiles


@triton.jit
def pick(values, at, i):
    return tl.sum(tl.where(at == i, values, 0.0))


@triton.jit
def line(ptr, strides, base, places, step, shown, f, width):
    """[places, W] in float32 along one axis of the map, 0 where there is nothing."""
    at = base + places.to(tl.int64)[:, None] * step + f.to(tl.int64)[None, :] * strides[4]
    return tl.load(ptr + at, mask=shown[:, None] & (f < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def links_along(ptr, base, places, step, count):
    """Links into places, and from them into the next ones; 0 where a place has none."""
    at = base + places.to(tl.int64) * step
    links = tl.load(ptr + at, mask=(places > 0) & (places < count), other=0.0).to(tl.float32)
    after = tl.load(ptr + at + step, mask=places + 1 < count, other=0.0).to(tl.float32)
    return links, after


@triton.jit
def column(
    b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, b_at, c_at, col_at, y, x, height, apart, f, c, inside,
    F: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """T[x] in row y: the keys of column x, an int64, under the decays along it. state_ptr is that of the strip."""
    r = tl.arange(0, BLOCK_R)
    first = y // BLOCK_R * BLOCK_R
    there = first + r < height
    b = line(b_ptr, b_strides, b_at + x * b_strides[2], first + r, b_strides[1], there, f, F)
    v = line(c_ptr, c_strides, c_at + x * c_strides[2], first + r, c_strides[1], there, c, C)
    links, after = links_along(col_ptr, col_at + x * col_strides[2], first + r, col_strides[1], height)
    w = from_place(links, after, r, y - first)
    of_state = x * F * C + f[:, None] * C + c[None, :]
    above = tl.load(state_ptr + of_state, mask=inside, other=0.0)
    below = tl.load(state_ptr + apart + of_state, mask=inside, other=0.0)
    own = tl.dot(tl.trans(b * w[:, None]), v, input_precision="tf32x3")
    return own + pick(w, r, 0) * above + pick(w, r, BLOCK_R - 1) * below


@triton.jit(do_not_specialize=("height", "columns", "heads"))
def strips(
    b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, height, columns, heads,
    F: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """state [2, B, H, strips, Ws, F, C], above and below. Grid: tiles (fastest) x columns x heads x samples, on axis 0. Any
    strides: b, c [B, Hs, Ws, H, .], col [B, Hs, Ws, H]."""
    f, c, tile, tiles, place = tile_of(F, C, BLOCK_F, BLOCK_C)
    wide = tl.program_id(0).to(tl.int64) * 0
    x = place % columns
    matrix = place // columns
    head = (matrix % heads).to(tl.int64)
    sample = (matrix // heads).to(tl.int64)
    count = (height + BLOCK_R - 1) // BLOCK_R
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    r = tl.arange(0, BLOCK_R)
    b_at = sample * b_strides[0] + x.to(tl.int64) * b_strides[2] + head * b_strides[3]
    c_at = sample * c_strides[0] + x.to(tl.int64) * c_strides[2] + head * c_strides[3]
    col_at = sample * col_strides[0] + x.to(tl.int64) * col_strides[2] + head * col_strides[3]
    apart = (wide + columns) * F * C                                                   # from strip to strip
    half = tl.num_programs(0).to(tl.int64) // tiles // columns * count * apart
    state_ptr += matrix.to(tl.int64) * count * apart + x.to(tl.int64) * F * C
    for up in tl.static_range(2):
        s = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
        for turn in tl.range(0, count, num_stages=1):
            strip = turn
            if up == 1:
                strip = count - 1 - turn
            tl.store(state_ptr + strip * apart + of_state, s, mask=inside)
            first = strip * BLOCK_R
            there = first + r < height
            b = line(b_ptr, b_strides, b_at, first + r, b_strides[1], there, f, F)
            v = line(c_ptr, c_strides, c_at, first + r, c_strides[1], there, c, C)
            links, after = links_along(col_ptr, col_at, first + r, col_strides[1], height)
            if up == 0:
                w = tl.exp(tl.cumsum(after, 0, reverse=True))
                whole = tl.exp(tl.sum(after))
            else:
                w = tl.exp(tl.cumsum(links, 0))
                whole = tl.exp(tl.sum(links))
            s = whole * s + tl.dot(tl.trans(b * w[:, None]), v, input_precision="tf32x3")
        state_ptr += half


@triton.jit(do_not_specialize=("height", "columns", "heads"))
def rows(
    a_ptr, b_ptr, c_ptr, row_ptr, col_ptr, state_ptr, out_ptr, a_strides, b_strides, c_strides, row_strides, col_strides,
    out_strides, height, columns, heads,
    F: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [blocks of F, B, Hs, Ws, H, C], each the sum over its features. Grid: tiles (fastest) x rows x heads x samples, on
    axis 0. Any strides: a, b, c, row, col, out."""
    f, c, tile, tiles, place = tile_of(F, C, BLOCK_F, BLOCK_C)
    wide = tl.program_id(0).to(tl.int64) * 0
    y = place % height
    matrix = place // height
    head = (matrix % heads).to(tl.int64)
    sample = (matrix // heads).to(tl.int64)
    inside = (f < F)[:, None] & (c < C)[None, :]
    a_at = sample * a_strides[0] + y.to(tl.int64) * a_strides[1] + head * a_strides[3]
    row_at = sample * row_strides[0] + y.to(tl.int64) * row_strides[1] + head * row_strides[3]
    part = tile // ((C + BLOCK_C - 1) // BLOCK_C)
    out_at = part * out_strides[0] + sample * out_strides[1] + y.to(tl.int64) * out_strides[2] + head * out_strides[4]
    b_at = sample * b_strides[0] + head * b_strides[3]
    c_at = sample * c_strides[0] + head * c_strides[3]
    col_at = sample * col_strides[0] + head * col_strides[3]
    of_strip = (wide + columns) * F * C
    count = (height + BLOCK_R - 1) // BLOCK_R
    half = tl.num_programs(0).to(tl.int64) // tiles // height * count * of_strip
    state_ptr += (matrix.to(tl.int64) * count + y // BLOCK_R) * of_strip
    p = tl.arange(0, BLOCK_X)
    turns = (columns + BLOCK_X - 1) // BLOCK_X
    s = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)                                       # of the blocks before, in their last column
    for block in tl.range(0, turns, num_stages=1):
        x = block * BLOCK_X + p
        a = line(a_ptr, a_strides, a_at, x, a_strides[2], x < columns, f, F)
        links, after = links_along(row_ptr, row_at, x, row_strides[2], columns)
        out = tl.exp(tl.cumsum(links, 0))[:, None] * tl.dot(a, s, input_precision="tf32x3")
        s *= tl.exp(tl.sum(links))
        for i in tl.range(0, tl.minimum(columns - block * BLOCK_X, BLOCK_X), num_stages=1):
            t = column(
                b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, b_at, c_at, col_at, y,
                wide + block * BLOCK_X + i, height, half, f, c, inside, F, C, BLOCK_R,
            )  # fmt: skip
            w = from_place(links, after, p, i)
            out += w[:, None] * tl.dot(a, t, input_precision="tf32x3")
            s += pick(w, p, BLOCK_X - 1) * t
        at = out_at + x.to(tl.int64)[:, None] * out_strides[3] + c.to(tl.int64)[None, :] * out_strides[5]
        tl.store(out_ptr + at, out, mask=(x < columns)[:, None] & (c < C)[None, :])
    tl.debug_barrier()                                                                 # what was stored is added to
    s = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)                                       # of the blocks behind, in their first column
    for turn in tl.range(1, turns, num_stages=1):
        first = (turns - turn) * BLOCK_X
        x = first + p
        links, after = links_along(row_ptr, row_at, x, row_strides[2], columns)
        s *= tl.exp(tl.sum(after))
        for i in tl.range(0, tl.minimum(columns - first, BLOCK_X), num_stages=1):
            t = column(
                b_ptr, c_ptr, col_ptr, state_ptr, b_strides, c_strides, col_strides, b_at, c_at, col_at, y, wide + first + i,
                height, half, f, c, inside, F, C, BLOCK_R,
            )  # fmt: skip
            s += pick(from_place(links, after, p, i), p, 0) * t
        x -= BLOCK_X
        a = line(a_ptr, a_strides, a_at, x, a_strides[2], x < columns, f, F)
        links, after = links_along(row_ptr, row_at, x, row_strides[2], columns)
        out = tl.exp(tl.cumsum(after, 0, reverse=True))[:, None] * tl.dot(a, s, input_precision="tf32x3")
        at = out_at + x.to(tl.int64)[:, None] * out_strides[3] + c.to(tl.int64)[None, :] * out_strides[5]
        shown = (x < columns)[:, None] & (c < C)[None, :]
        tl.store(out_ptr + at, out + tl.load(out_ptr + at, mask=shown, other=0.0), mask=shown)
