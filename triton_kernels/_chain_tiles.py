"""The kernels of chain_sum: steps of BLOCK_T visits, single visits, and the gradients of the links of both."""

import triton
import triton.language as tl

NONE, SHARED, ROWS, COLUMNS = 0, 1, 2, 3


@triton.jit
def place_of(step, begin, end, order_ptr, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Of visits of a walk: whether they are there, their tokens, the tokens of the links crossed on the way in, whether there is
    such a link, and whether the state starts anew."""
    there = (step < end - begin) & (step >= 0)
    visit = step
    if REVERSE:
        visit = end - begin - 1 - step
    link = visit
    if REVERSE:
        link = visit + 1
    linked = there & (link < end - begin)
    anew = there & (step < 0)
    if BLOCK > 0:
        anew = linked & (link > 0) & (link % BLOCK == 0)
    token = tl.where(there, begin + visit, 0)
    crossed = tl.where(linked, begin + link, 0)
    if order_ptr is not None:
        token = tl.load(order_ptr + token, mask=there, other=0)
        crossed = tl.load(order_ptr + crossed, mask=linked, other=0)
    return there, token.to(tl.int64), crossed.to(tl.int64), linked, anew


@triton.jit
def rows_of(ptr, strides, sample, head, token, shown, f, width):
    """[T, W] in float32, 0 where there is nothing."""
    at = sample * strides[0] + head * strides[2] + token[:, None] * strides[1] + f.to(tl.int64)[None, :] * strides[3]
    return tl.load(ptr + at, mask=shown[:, None] & (f < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def row_of(ptr, strides, sample, head, token, f, width):
    """[W] in float32."""
    at = sample * strides[0] + head * strides[2] + token * strides[1] + f.to(tl.int64) * strides[3]
    return tl.load(ptr + at, mask=f < width, other=0.0).to(tl.float32)


@triton.jit
def between(g, cut, BLOCK_T: tl.constexpr):
    """Of BLOCK_T visits with links g into them: the decays [i, j] from visit j to i, 0 where i < j or the state started anew
    between; those from the state before to i; those from j to the end; and that of the state itself."""
    i = tl.arange(0, BLOCK_T)
    later = i[:, None] > i[None, :]
    sums = tl.cumsum(tl.where(later, g[:, None], 0.0), 0)
    cuts = tl.cumsum(tl.where(later & cut[:, None], 1, 0), 0)
    among = tl.where((i[:, None] >= i[None, :]) & (cuts == 0), tl.exp(sums), 0.0)
    before = tl.where(tl.cumsum(cut.to(tl.int32), 0) == 0, tl.exp(tl.cumsum(g, 0)), 0.0)
    to_end = tl.sum(tl.where((i == BLOCK_T - 1)[:, None], among, 0.0), 0)
    whole = tl.sum(tl.where(i == BLOCK_T - 1, before, 0.0), 0)
    return among, before, to_end, whole


@triton.jit
def bounds_of(sequence, bounds_ptr, tokens):
    """Sample, first visit and end of a sequence."""
    sample = sequence.to(tl.int64)
    begin = 0
    end = tokens
    if bounds_ptr is not None:
        begin = tl.load(bounds_ptr + sequence)
        end = tl.load(bounds_ptr + sequence + 1)
        sample = sample * 0
    return sample, begin, end


@triton.jit
def first_token(order_ptr, begin, end):
    """The token of the first visit; 0 where the sequence is empty."""
    token = tl.where(begin < end, begin, 0)
    if order_ptr is not None:
        token = tl.load(order_ptr + token, mask=begin < end, other=0)
    return token.to(tl.int64)


@triton.jit
def decay_of(link_ptr, strides, sample, head, token, f, c, F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr):
    """The decay of one link, [F, 1] or [1, C]."""
    if KIND == 0:
        decay = tl.full([1, 1], 1.0, tl.float32)
    elif KIND == 2:
        decay = tl.exp(row_of(link_ptr, strides, sample, head, token, f, F))[:, None]
    elif KIND == 3:
        decay = tl.exp(row_of(link_ptr, strides, sample, head, token, c, C))[None, :]
    else:
        decay = tl.exp(row_of(link_ptr, strides, sample, head, token, c * 0, 1))[None, :]
    return decay


@triton.jit
def put_met(to_ptr, met, f, c, there, F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr):
    """The gradient of one link from the products [F, C] of a state and its gradient."""
    if KIND == 2:
        tl.store(to_ptr + f, tl.sum(met, 1), mask=f < tl.where(there, F, 0))
    elif KIND == 3:
        tl.store(to_ptr + c, tl.sum(met, 0), mask=c < tl.where(there, C, 0))
    else:
        tl.store(to_ptr, tl.sum(met), mask=there)


@triton.jit(do_not_specialize=("tokens",))
def steps(
    a_ptr, b_ptr, c_ptr, link_ptr, first_ptr, out_ptr, last_ptr, kept_ptr, a_strides, b_strides, c_strides, link_strides,
    out_strides, order_ptr, bounds_ptr, tokens, heads,
    F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, N, H, C], last [S, H, F, C], kept [S, H, steps, F, C]: the state before each step. Grid: blocks of columns (fastest)
    x heads x sequences, on axis 0. Any strides: a, b, c, link. KIND is NONE or SHARED."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    matrix = tl.program_id(0) // blocks
    head = (matrix % heads).to(tl.int64)
    sample, begin, end = bounds_of(matrix // heads, bounds_ptr, tokens)
    f = tl.arange(0, BLOCK_F)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    state_at = matrix.to(tl.int64) * F * C + of_state
    s = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    if first_ptr is not None:
        s = tl.load(first_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
    kept_at = matrix.to(tl.int64) * ((tokens + BLOCK_T - 1) // BLOCK_T) * F * C
    i = tl.arange(0, BLOCK_T)
    for start in tl.range(0, end - begin, BLOCK_T, num_stages=1):
        if kept_ptr is not None:
            tl.store(kept_ptr + kept_at + of_state, s, mask=inside)
            kept_at += F * C
        there, token, crossed, linked, cut = place_of(start + i, begin, end, order_ptr, BLOCK, REVERSE)
        a = rows_of(a_ptr, a_strides, sample, head, token, there, f, F)
        b = rows_of(b_ptr, b_strides, sample, head, token, there, f, F)
        v = rows_of(c_ptr, c_strides, sample, head, token, there, c, C)
        g = tl.zeros([BLOCK_T], tl.float32)
        if KIND == 1:
            at = sample * link_strides[0] + head * link_strides[2] + crossed * link_strides[1]
            g = tl.load(link_ptr + at, mask=linked, other=0.0).to(tl.float32)
        among, before, to_end, whole = between(g, cut, BLOCK_T)
        seen = tl.where(i[:, None] > i[None, :], among, 0.0) if STRICT else among
        scores = tl.dot(a, tl.trans(b), input_precision="tf32x3") * seen
        out = tl.dot(scores, v, input_precision="tf32x3")
        out += before[:, None] * tl.dot(a, s, input_precision="tf32x3")
        s = whole * s + tl.dot(tl.trans(b * to_end[:, None]), v, input_precision="tf32x3")
        at = sample * out_strides[0] + head * out_strides[2] + token[:, None] * out_strides[1] + c.to(tl.int64)[None, :]
        tl.store(out_ptr + at, out, mask=there[:, None] & (c < C)[None, :])
    if REVERSE and KIND == 1:
        first = decay_of(link_ptr, link_strides, sample, head, first_token(order_ptr, begin, end), f, c, F, C, KIND)
        s *= tl.where(begin < end, first, 1.0)
    tl.store(last_ptr + state_at, s, mask=inside)


@triton.jit(do_not_specialize=("tokens",))
def visits(
    a_ptr, b_ptr, c_ptr, link_ptr, first_ptr, out_ptr, last_ptr, kept_ptr, a_strides, b_strides, c_strides, link_strides,
    out_strides, order_ptr, bounds_ptr, tokens, heads,
    F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `steps`, one visit at a time, for every KIND; the state is kept before every BLOCK_T-th visit."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    matrix = tl.program_id(0) // blocks
    head = (matrix % heads).to(tl.int64)
    sample, begin, end = bounds_of(matrix // heads, bounds_ptr, tokens)
    f = tl.arange(0, BLOCK_F)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    state_at = matrix.to(tl.int64) * F * C + of_state
    s = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    if first_ptr is not None:
        s = tl.load(first_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
    kept_at = matrix.to(tl.int64) * ((tokens + BLOCK_T - 1) // BLOCK_T) * F * C
    for step in tl.range(0, end - begin, num_stages=1):
        if kept_ptr is not None:
            tl.store(kept_ptr + kept_at + of_state, s, mask=inside & (step % BLOCK_T == 0))
            kept_at += tl.where(step % BLOCK_T == BLOCK_T - 1, F * C, 0)
        there, token, crossed, linked, cut = place_of(step, begin, end, order_ptr, BLOCK, REVERSE)
        decay = decay_of(link_ptr, link_strides, sample, head, crossed, f, c, F, C, KIND)
        s = tl.where(cut, 0.0, tl.where(linked, s * decay, s))
        a = row_of(a_ptr, a_strides, sample, head, token, f, F)
        b = row_of(b_ptr, b_strides, sample, head, token, f, F)
        v = row_of(c_ptr, c_strides, sample, head, token, c, C)
        after = s + b[:, None] * v[None, :]
        out = tl.sum(a[:, None] * (s if STRICT else after), 0)
        s = after
        at = sample * out_strides[0] + head * out_strides[2] + token * out_strides[1] + c.to(tl.int64)
        tl.store(out_ptr + at, out, mask=c < C)
    if REVERSE:
        first = decay_of(link_ptr, link_strides, sample, head, first_token(order_ptr, begin, end), f, c, F, C, KIND)
        s *= tl.where(begin < end, first, 1.0)
    tl.store(last_ptr + state_at, s, mask=inside)


@triton.jit(do_not_specialize=("tokens",))
def step_links(
    dout_ptr, a_ptr, b_ptr, c_ptr, link_ptr, dlast_ptr, last_ptr, kept_ptr, inside_ptr, part_ptr, dout_strides, a_strides,
    b_strides, c_strides, link_strides, part_strides, order_ptr, bounds_ptr, tokens, heads,
    F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """part [blocks of columns, B, N, H, 1] of the gradient of the links of a SHARED decay: what each step's pairs, its state and
    the gradient behind it say; products in three TF32 parts do not fit into registers here. Grid and strides as in `steps`, dout
    too; part starts as zeros."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    matrix = tl.program_id(0) // blocks
    head = (matrix % heads).to(tl.int64)
    sample, begin, end = bounds_of(matrix // heads, bounds_ptr, tokens)
    f = tl.arange(0, BLOCK_F)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    state_at = matrix.to(tl.int64) * F * C + of_state
    part_ptr += tl.program_id(0) % blocks * part_strides[0] + sample * part_strides[1] + head * part_strides[3]
    back = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    if dlast_ptr is not None:
        back = tl.load(dlast_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            at_first = first_token(order_ptr, begin, end)
            ended = tl.sum(back * tl.load(last_ptr + state_at, mask=inside, other=0.0))
            tl.store(part_ptr + at_first * part_strides[2], ended, mask=begin < end)
            back *= decay_of(link_ptr, link_strides, sample, head, at_first, f, c, F, C, KIND)
    count = (end - begin + BLOCK_T - 1) // BLOCK_T
    i = tl.arange(0, BLOCK_T)
    for turn in tl.range(0, count, num_stages=1):
        step = count - 1 - turn
        there, token, crossed, linked, cut = place_of(step * BLOCK_T + i, begin, end, order_ptr, BLOCK, REVERSE)
        a = rows_of(a_ptr, a_strides, sample, head, token, there, f, F)
        b = rows_of(b_ptr, b_strides, sample, head, token, there, f, F)
        v = rows_of(c_ptr, c_strides, sample, head, token, there, c, C)
        dout = rows_of(dout_ptr, dout_strides, sample, head, token, there, c, C)
        at = sample * link_strides[0] + head * link_strides[2] + crossed * link_strides[1]
        g = tl.load(link_ptr + at, mask=linked, other=0.0).to(tl.float32)
        among, before, to_end, whole = between(g, cut, BLOCK_T)
        kept_at = (matrix.to(tl.int64) * ((tokens + BLOCK_T - 1) // BLOCK_T) + step) * F * C
        s = tl.load(kept_ptr + kept_at + of_state, mask=inside, other=0.0)
        pairs = tl.dot(a, tl.trans(b), input_precision="ieee") * tl.dot(dout, tl.trans(v), input_precision="ieee") * among
        pairs = tl.where(i[:, None] > i[None, :], pairs, 0.0)
        from_state = before * tl.sum(tl.dot(a, s, input_precision="ieee") * dout, 1)
        to_back = to_end * tl.sum(tl.dot(b, back, input_precision="ieee") * v, 1)
        through = whole * tl.sum(s * back)
        crossing = tl.where(i[None, :] < i[:, None], tl.cumsum(pairs, 0, reverse=True) + to_back[None, :], 0.0)
        met = through + tl.sum(crossing, 1) + tl.cumsum(from_state, 0, reverse=True)
        tl.store(part_ptr + crossed * part_strides[2], met, mask=linked)
        back = whole * back + tl.dot(tl.trans(a * before[:, None]), dout, input_precision="ieee")


@triton.jit(do_not_specialize=("tokens",))
def visit_links(
    dout_ptr, a_ptr, b_ptr, c_ptr, link_ptr, dlast_ptr, last_ptr, kept_ptr, inside_ptr, part_ptr, dout_strides, a_strides,
    b_strides, c_strides, link_strides, part_strides, order_ptr, bounds_ptr, tokens, heads,
    F: tl.constexpr, C: tl.constexpr, KIND: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """As `step_links` for every KIND, visit by visit; inside [programs, BLOCK_T, BLOCK_F, BLOCK_C]: the states of a step."""
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    matrix = tl.program_id(0) // blocks
    head = (matrix % heads).to(tl.int64)
    sample, begin, end = bounds_of(matrix // heads, bounds_ptr, tokens)
    f = tl.arange(0, BLOCK_F)
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (f < F)[:, None] & (c < C)[None, :]
    of_state = f[:, None] * C + c[None, :]
    state_at = matrix.to(tl.int64) * F * C + of_state
    part_ptr += tl.program_id(0) % blocks * part_strides[0] + sample * part_strides[1] + head * part_strides[3]
    inside_ptr += tl.program_id(0).to(tl.int64) * BLOCK_T * BLOCK_F * BLOCK_C
    own = f[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    back = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    if dlast_ptr is not None:
        back = tl.load(dlast_ptr + state_at, mask=inside, other=0.0).to(tl.float32)
        if REVERSE:
            at_first = first_token(order_ptr, begin, end)
            ended = back * tl.load(last_ptr + state_at, mask=inside, other=0.0)
            put_met(part_ptr + at_first * part_strides[2], ended, f, c, begin < end, F, C, KIND)
            back *= decay_of(link_ptr, link_strides, sample, head, at_first, f, c, F, C, KIND)
    count = (end - begin + BLOCK_T - 1) // BLOCK_T
    for turn in tl.range(0, count, num_stages=1):
        step = count - 1 - turn
        kept_at = (matrix.to(tl.int64) * ((tokens + BLOCK_T - 1) // BLOCK_T) + step) * F * C
        s = tl.load(kept_ptr + kept_at + of_state, mask=inside, other=0.0)
        some = tl.minimum(BLOCK_T, end - begin - step * BLOCK_T)
        for i in tl.range(0, some, num_stages=1):
            there, token, crossed, linked, cut = place_of(step * BLOCK_T + i, begin, end, order_ptr, BLOCK, REVERSE)
            decay = decay_of(link_ptr, link_strides, sample, head, crossed, f, c, F, C, KIND)
            s = tl.where(cut, 0.0, tl.where(linked, s * decay, s))
            tl.store(inside_ptr + i * BLOCK_F * BLOCK_C + own, s)
            b = row_of(b_ptr, b_strides, sample, head, token, f, F)
            v = row_of(c_ptr, c_strides, sample, head, token, c, C)
            s += b[:, None] * v[None, :]
        for j in tl.range(0, some, num_stages=1):
            i = some - 1 - j
            there, token, crossed, linked, cut = place_of(step * BLOCK_T + i, begin, end, order_ptr, BLOCK, REVERSE)
            a = row_of(a_ptr, a_strides, sample, head, token, f, F)
            dout = row_of(dout_ptr, dout_strides, sample, head, token, c, C)
            back += a[:, None] * dout[None, :]
            met = back * tl.load(inside_ptr + i * BLOCK_F * BLOCK_C + own)
            put_met(part_ptr + crossed * part_strides[2], met, f, c, linked, F, C, KIND)
            decay = decay_of(link_ptr, link_strides, sample, head, crossed, f, c, F, C, KIND)
            back = tl.where(cut, 0.0, tl.where(linked, back * decay, back))
