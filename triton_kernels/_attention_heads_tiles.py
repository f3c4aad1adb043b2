"""Tiles of attention whose heads mix: all heads of a tile of queries and a tile of keys at once, [HEADS, BLOCK_M, BLOCK_N].

`mixtures` is (pre_weight, pre_bias, post_weight, post_bias), float32 and contiguous or None. Products are made a few columns of
q and k at a time, mixtures from three products of tf32, which lose little of float32 and take fewer registers. No loop
hoists what stays the same: registers are short. ALIKE: what is added to the products is the same in all heads.
"""

import triton
import triton.language as tl

from ._attention_terms import gains, last_key, places, score_term, scores, stream, weighed
from ._attention_tiles import ARGMAX_K, ARGMAX_Q, SOFTMAX, plain_weights, slopes
from ._tiles import LOG2E, clean, counted

HEADS = tl.constexpr(16)                                    # matrix products want 16
PRE = tl.constexpr(0)                                       # places in `mixtures`
POST = tl.constexpr(2)
EARLY_GAIN = tl.constexpr(33)                               # places in `terms` of the factors in front of the mixtures
GAIN = tl.constexpr(6)                                      # and of the first of those behind them
EARLY_WEIGHT = tl.constexpr(34)
WEIGHT = tl.constexpr(7)


@triton.jit
def row_places(terms, image, n, count, first, heads):
    """The places of the tokens n of all heads in [B, N, H], and which of them are real: [HEADS, n] each."""
    h = tl.arange(0, HEADS)
    flat = (places(terms, image, n, count, first) * heads)[None, :] + h[:, None]
    return flat, (h < heads)[:, None] & (n < count)[None, :]


@triton.jit
def query_visits(count_ptr, strides, terms, image, row, sizes, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """The visits of queries row.. to tiles of keys: from, to, and where their list begins. Without lists from and to are keys."""
    at = image.to(tl.int64) * strides[0] + row // BLOCK_M
    end = last_key(terms, sizes, row, sizes[2], sizes[4], CAUSAL, BLOCK_M)
    if count_ptr is not None:
        end = tl.load(count_ptr + at)
    return end * 0, end, at * strides[2]


@triton.jit
def key_visits(count_ptr, strides, image, start, sizes, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The visits of keys start.. to tiles of queries, or without lists to queries."""
    at = image.to(tl.int64) * strides[0] + start // BLOCK_N
    begin = start * 0
    if count_ptr is not None:
        end = tl.load(count_ptr + at)
    else:
        end = sizes[1]
        if CAUSAL:
            begin = tl.maximum(start - sizes[4], 0) // BLOCK_M * BLOCK_M
    return begin, end, at * strides[2]


@triton.jit
def visited_tile(visit_ptr, at, n, BLOCK: tl.constexpr):
    """The first token of visit n of a list that begins at `at`; without lists n itself."""
    start = n
    if visit_ptr is not None:
        start = tl.load(visit_ptr + (at + n)) * BLOCK
    return start


@triton.jit
def load_heads(
    ptr, strides, d_stride, image, token, real, column, heads,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Columns column.. of the tokens of all heads, 0 where not real and past WIDTH: [HEADS, token, BLOCK]."""
    h = (tl.minimum(tl.arange(0, HEADS), heads - 1) // GROUP).to(tl.int64)
    at = (token.to(tl.int64) * strides[1] + image.to(tl.int64) * strides[0])[None, :] + (h * strides[2])[:, None]
    at = tl.multiple_of(at, (ALIGN, ALIGN))
    d = column + tl.arange(0, BLOCK)
    return tl.load(ptr + (at[:, :, None] + (d.to(tl.int64) * d_stride)[None, None, :]),
                   mask=real[:, :, None] & (d < WIDTH)[None, None, :], other=0.0)


@triton.jit
def store_heads(ptr, flat, real, column, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes x [HEADS, token, BLOCK] to columns column.. of the places flat of a contiguous [B, N, H, WIDTH]."""
    d = column + tl.arange(0, BLOCK)
    tl.store(ptr + (flat[:, :, None] * WIDTH + d[None, None, :]), x.to(ptr.dtype.element_ty),
             mask=real[:, :, None] & (d < WIDTH)[None, None, :])


@triton.jit
def head_products(
    x_ptr, x_strides, x_d, of_x, x_real, y_ptr, y_strides, y_d, of_y, y_real, image, heads,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP_Y: tl.constexpr, ALIGN: tl.constexpr, CLEAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The products of the tokens of_x of x with the tokens of_y of y, head by head; if CLEAN, what is not finite in y is 0."""
    a = tl.zeros([HEADS, BLOCK_M, BLOCK_N], tl.float32)
    for column in tl.range(0, WIDTH, BLOCK, num_stages=1, disable_licm=True):
        x = load_heads(x_ptr, x_strides, x_d, image, of_x, x_real, column, heads, WIDTH, BLOCK, 1, ALIGN)
        y = load_heads(y_ptr, y_strides, y_d, image, of_y, y_real, column, heads, WIDTH, BLOCK, GROUP_Y, ALIGN)
        if CLEAN:
            y = clean(y).to(y.dtype)
        a = tl.dot(x, tl.permute(y, (0, 2, 1)), a, input_precision="ieee")
    return a


@triton.jit
def mixed(ptr, x, heads, TURNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x_g <- sum_h w_gh x_h, or of the turned matrix; x itself without one."""
    if ptr is not None:
        g = tl.arange(0, HEADS)[:, None]
        h = tl.arange(0, HEADS)[None, :]
        at = h * heads + g if TURNED else g * heads + h
        w = tl.load(ptr + at, mask=(g < heads) & (h < heads), other=0.0)
        flat = tl.dot(w, tl.reshape(x, [HEADS, BLOCK_M * BLOCK_N]), input_precision="tf32x3")
        x = tl.reshape(flat, [HEADS, BLOCK_M, BLOCK_N])
    return x


@triton.jit
def offset_of_heads(ptr, heads):
    """A number of each head, [HEADS, 1, 1]; 0 without."""
    h = tl.arange(0, HEADS)
    x = tl.zeros([HEADS], tl.float32)
    if ptr is not None:
        x = tl.load(ptr + h, mask=h < heads, other=0.0)
    return x[:, None, None]


@triton.jit
def head_factors(terms, strides, heads, scale):
    """What the products of each head are multiplied by, [HEADS, 1, 1]."""
    h = tl.arange(0, HEADS)
    factor = tl.zeros([HEADS], tl.float32) + scale
    if terms[3] is not None:
        factor = tl.load(terms[3] + h.to(tl.int64) * strides[12], mask=h < heads, other=0.0).to(tl.float32)
    return factor[:, None, None]


@triton.jit
def head_terms(
    terms, strides, image, row, start, sizes,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What is added to the products of every head, -inf where it sees nothing and past the last head."""
    nothing = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    h = tl.arange(0, HEADS)[:, None, None]
    x = tl.full([HEADS, BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    if ALIKE:
        one = scores(nothing, 1.0, terms, strides, image, image * 0, row, start, sizes,
                     AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N, False)
        x = tl.where(h < sizes[3], one[None, :, :], x)
    else:
        for n in tl.range(0, sizes[3], num_stages=1, disable_licm=True):
            one = scores(nothing, 1.0, terms, strides, image, image * 0 + n, row, start, sizes,
                         AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N, False)
            x = tl.where(h == n, one[None, :, :], x)
    return x


@triton.jit
def has_factor(terms, PLACE: tl.constexpr, BUT: tl.constexpr):
    """Whether there is a factor at PLACE, or of those behind the mixtures one that is not BUT."""
    if PLACE == GAIN:
        found: tl.constexpr = (terms[6] is not None and BUT != 6) or (terms[26] is not None and BUT != 26)
    elif PLACE == WEIGHT:
        found: tl.constexpr = (
            (terms[7] is not None and BUT != 7) or (terms[27] is not None and BUT != 27) or (terms[28] is not None and BUT != 28))
    else:
        found: tl.constexpr = terms[PLACE] is not None
    return found


@triton.jit
def times_factors(
    x, terms, strides, image, row, start, sizes,
    PLACE: tl.constexpr, AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BUT: tl.constexpr = -1,
):  # fmt: skip
    """x times the factor PLACE of every head, or those behind a mixture without the term BUT; 0 stays 0."""
    if has_factor(terms, PLACE, BUT):
        h = tl.arange(0, HEADS)[:, None, None]
        factor = tl.full([HEADS, BLOCK_M, BLOCK_N], 1.0, tl.float32)
        for n in tl.range(0, sizes[3], num_stages=1, disable_licm=True):
            head = image * 0 + n
            one = tl.full([BLOCK_M, BLOCK_N], 1.0, tl.float32)
            if PLACE == GAIN:
                one = one * gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, BUT)
            elif PLACE == WEIGHT:
                one = weighed(one, terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, BUT)
            elif PLACE == EARLY_GAIN:
                one = one * score_term(terms[33], strides, image, head, row, start, sizes, 1.0,
                                       75, AXES[5][0], AXES[5][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
            else:
                one = one * score_term(terms[34], strides, image, head, row, start, sizes, 1.0,
                                       79, AXES[6][0], AXES[6][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
            factor = tl.where(h == n, one[None, :, :], factor)
        x = tl.where(x == 0.0, 0.0, x * factor)
    return x


@triton.jit
def times_early(
    x, s, terms, strides, image, row, start, sizes,
    PLACE: tl.constexpr, AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x times a factor in front of the mixtures; one that is NaN where the head sees nothing, s being -inf, counts as 1."""
    y = times_factors(x, terms, strides, image, row, start, sizes, PLACE, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if has_factor(terms, PLACE, -1):
        y = tl.where((y != y) & (s == float("-inf")), x, y)
    return y


@triton.jit
def mixed_scores(
    q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, strides, image, row, start, sizes, scale,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, ALIKE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The products of all heads, what is mixed, what comes of it, and the scores, -inf where hidden; a NaN that its own head does
    not see is mixed as 0."""
    heads = sizes[3]
    h = tl.arange(0, HEADS)
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    a = head_products(
        q_ptr, q_strides, d_strides[0], i + sizes[8], (h < heads)[:, None] & (i < sizes[1])[None, :],
        k_ptr, k_strides, d_strides[1], j + sizes[9], (h < heads)[:, None] & (j < sizes[2])[None, :],
        image, heads, WIDTH, CHUNK, GROUP, ALIGN, False, BLOCK_M, BLOCK_N)
    a += a * 0.0                                                                       # an infinity becomes NaN
    more = head_terms(terms, strides, image, row, start, sizes, AXES, RULE, FAR, CAUSAL, CLIP, ALIKE, BLOCK_M, BLOCK_N)
    seen = tl.where((a != a) & (more == float("-inf")), 0.0, a)
    x = times_early(seen * head_factors(terms, strides, heads, scale), more, terms, strides, image, row, start, sizes,
                    EARLY_GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    y = mixed(mixtures[PRE], x, heads, False, BLOCK_M, BLOCK_N) + offset_of_heads(mixtures[PRE + 1], heads)
    s = times_factors(y, terms, strides, image, row, start, sizes, GAIN, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    return a, x, y, tl.where(more == float("-inf"), float("-inf"), s + more)


@triton.jit
def head_weights(s, lse, low, NORM: tl.constexpr):
    """The weights of scores whose rows are known, before the second mixture."""
    p = plain_weights(s, NORM) if NORM != SOFTMAX else tl.exp2((s - lse[:, :, None]) * LOG2E - low[:, :, None])
    return tl.where(s == float("-inf"), 0.0, p)


@triton.jit
def tile_weights(
    s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The weights before the second mixture; of hard choices 1 for each pair, from what lse_ptr says is chosen."""
    if NORM >= ARGMAX_K and NORM <= ARGMAX_Q:
        i = row + tl.arange(0, BLOCK_M)
        j = start + tl.arange(0, BLOCK_N)
        if NORM == ARGMAX_K:
            flat, real = row_places(terms, image, i, sizes[1], sizes[8], sizes[3])
            p = tl.where(j[None, None, :] == tl.load(lse_ptr + flat, mask=real, other=-1)[:, :, None], 1.0, 0.0)
        else:
            flat, real = row_places(terms, image, j, sizes[2], sizes[9], sizes[3])
            p = tl.where(i[None, :, None] == tl.load(lse_ptr + flat, mask=real, other=-1)[:, None, :], 1.0, 0.0)
    else:
        p = head_weights(s, lse, low, NORM)
    return p


@triton.jit
def mixed_weights(
    p, s, mixtures, terms, strides, image, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BUT: tl.constexpr = -1,
):  # fmt: skip
    """The weights after the second mixture and all factors but BUT, 0 where hidden."""
    p = times_factors(p, terms, strides, image, row, start, sizes, EARLY_WEIGHT, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    x = mixed(mixtures[POST], p, sizes[3], False, BLOCK_M, BLOCK_N) + offset_of_heads(mixtures[POST + 1], sizes[3])
    x = tl.where(s == float("-inf"), 0.0, x)
    return times_factors(x, terms, strides, image, row, start, sizes, WEIGHT, AXES, FAR, CLIP, BLOCK_M, BLOCK_N, BUT)


@triton.jit
def keep_heads(stream, image, tokens, start, threshold, BLOCK_N: tl.constexpr, queries):
    """keep_tile of all heads."""
    quads = (start // 4 + tl.arange(0, BLOCK_N // 4))[None, None, :]
    image, head, tokens = counted(stream, image, tl.arange(0, HEADS)[:, None, None], tokens[None, :, None], queries)
    shape = (head + tokens + quads) * 0                                                # [HEADS, i, BLOCK_N / 4]
    lane0, lane1, lane2, lane3 = tl.philox(tl.load(stream[0]), shape + image, shape + head, shape + tokens, shape + quads)
    lanes = tl.interleave(tl.interleave(lane0, lane2), tl.interleave(lane1, lane3))    # [HEADS, i, BLOCK_N]
    return lanes.to(tl.int64) >= threshold


@triton.jit
def known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM: tl.constexpr, BLOCK_M: tl.constexpr):
    """lse, low, which rows have a gradient, which are real, and their places in [B, Nq, H]: [HEADS, BLOCK_M] each."""
    flat, real = row_places(terms, image, i, sizes[1], sizes[8], sizes[3])
    lse = tl.zeros([HEADS, BLOCK_M], tl.float32)
    low = lse
    live = real
    if NORM == SOFTMAX:
        lse = tl.load(lse_ptr + flat, mask=real, other=float("-inf"))
        live = tl.abs(lse) < float("inf")
        if low_ptr is not None:
            low = tl.load(low_ptr + flat, mask=real, other=0.0)
    return lse, low, live, real, flat


@triton.jit
def token_numbers(ptr, strides, AT: tl.constexpr, image, n, count, first, heads):
    """A number of each token and head, 0 past the last: [HEADS, n]; strides are (batch, token, head) from AT."""
    h = tl.arange(0, HEADS)
    at = image.to(tl.int64) * strides[AT] + (n + first).to(tl.int64)[None, :] * strides[AT + 1]
    at += h.to(tl.int64)[:, None] * strides[AT + 2]
    return tl.load(ptr + at, mask=(h < heads)[:, None] & (n < count)[None, :], other=0.0).to(tl.float32)


@triton.jit
def head_gradients(
    s, live, dout_ptr, v_ptr, mixtures, terms, dout_strides, v_strides, d_strides, strides, image, row, start, sizes,
    threshold, keep_scale, AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, WIDTH_V: tl.constexpr, GROUP: tl.constexpr,
    ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of the weights that meet the values, of those after the second mixture, of what it mixes, and of the weights
    of the scores; 0 where hidden and in rows that are not live."""
    heads = sizes[3]
    h = tl.arange(0, HEADS)
    i = row + tl.arange(0, BLOCK_M)
    j = start + tl.arange(0, BLOCK_N)
    given = head_products(
        dout_ptr, dout_strides, d_strides[3], i + sizes[8], (h < heads)[:, None] & (i < sizes[1])[None, :],
        v_ptr, v_strides, d_strides[2], j + sizes[9], (h < heads)[:, None] & (j < sizes[2])[None, :],
        image, heads, WIDTH_V, CHUNK, GROUP, ALIGN, True, BLOCK_M, BLOCK_N)
    if terms[5] is not None:
        given = tl.where(keep_heads(stream(terms), image, i, start, threshold, BLOCK_N, sizes[1]), given * keep_scale, 0.0)
    given = tl.where((s != float("-inf")) & live[:, :, None], given, 0.0)
    after = times_factors(given, terms, strides, image, row, start, sizes, WEIGHT, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    before = mixed(mixtures[POST], after, heads, True, BLOCK_M, BLOCK_N)
    dp = times_early(before, s, terms, strides, image, row, start, sizes, EARLY_WEIGHT, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[16] is not None:
        share = token_numbers(terms[15], strides, 36, image, i, sizes[1], sizes[8], heads)
        mean = token_numbers(terms[16], strides, 39, image, j, sizes[2], sizes[9], heads)
        dp += share[:, :, None] * mean[:, None, :]
    return given, after, before, dp


@triton.jit
def score_gradients(p, s, dp, delta, live, NORM: tl.constexpr):
    """dS, 0 where hidden and in rows that are not live."""
    slope = p if NORM == SOFTMAX else slopes(s, p, NORM)
    return tl.where((s != float("-inf")) & live[:, :, None], slope * (dp - delta[:, :, None]), 0.0)
