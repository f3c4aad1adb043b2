"""What a score of attention is made of, and where its parts lie.

What a score is made of stands in `terms`, each a pointer or None:
    0 bias, 1 key_bias, 2 mask, 3 factor, 4 sink, 5 seed, 6 gain, 7 weight, 8 rel_y, 9 rel_x, 10 q_ids, 11 k_ids, 12 allow,
    13 cu_q, 14 cu_k, 15 query_weight, 16 the gradient of key_mean (of a backward), 17 slope, 18 q_xy, 19 k_xy,
    20 and 21 the prefix sums of path_row and path_col, 22 policy, 23 the number that it adds to the exponentials of a row,
    24 the bits of the keys that survive top-k, [B, Nq, H, words] and contiguous, 25 bias_table, 26 gain_table, 27 weight_table,
    28 later_ratio, 29 position_index, 30 position_q, 31 position_k, 32 the products of dout and position_v (of a backward),
    33 early_gain, 34 early_weight, 35 and 36 of dropout: the number of head 0, and image 2^32 + token of the queries [B, Nq]
(a mask is bytes, or int32 words of 32 keys each, whose stride then stands for that of the keys),
and their strides in one tuple: (batch, head, query, key) of bias from 0, key_bias from 4, mask from 8, gain from 14 and
weight from 18; of factor 12 and sink 13; (batch, query, head, side) of rel_y from 22 and rel_x from 26; (batch, token) of
q_ids from 30 and k_ids from 32; of allow 34 and 35; (batch, token, head) of 15 from 36, of 16 from 39, of 20 and of 21 from
49; of slope 42; (batch, token, axis) of q_xy from 43 and k_xy from 46; (batch, token) of policy from 52; (head, entry) of the
tables from 54, 56 and 58; (batch, query, key) of 29 from 60; (batch, token, head, row) of 30, 31 and 32 from 63, 67 and 71;
(batch, head, query, key) of 33 from 75 and 34 from 79. AXES says whether bias, key_bias, mask, gain, weight and the early ones vary
with the query and with the key. `sizes` is (batch, queries, keys,
heads, offset, kw of rel_x, rows and columns of allow, queries and keys of all samples, width of the path's grid, whether it is
transposed, whether a policy keeps the diagonal, words of a row of bits; of the tables' grid height and width, tokens in front of
it, queries in a row and the step between them; rows of the tables of contextual positions). Of packed sequences these are the
greatest; `of_sample` makes those of one, whose eighth and ninth are the first of its queries and keys among all.
"""

import triton
import triton.language as tl

from ._attention_positions import position_term
from ._attention_tables import ratio_tile, table_term
from ._tiles import clean

NO_RULE = tl.constexpr(0)                                   # RULE
EQUAL = tl.constexpr(1)
TABLE = tl.constexpr(2)
UPTO = tl.constexpr(3)


@triton.jit
def stream(terms):
    """What dropout draws from, as `counted` takes it."""
    return terms[5], terms[35], terms[36]


@triton.jit
def _bounds(ptr, longest, total):
    """The first token of a sequence, the last of all where it has none, and how many it has."""
    first = tl.maximum(0, tl.load(ptr))
    count = tl.minimum(longest, tl.minimum(tl.load(ptr + 1), total) - first)
    return tl.minimum(first, total - 1), count


@triton.jit
def of_sample(terms, sizes, image):
    """The sizes of one sample; bounds that leave the tensors are cut."""
    queries = sizes[1]
    keys = sizes[2]
    first_q = 0
    first_k = 0
    if terms[13] is not None:
        first_q, queries = _bounds(terms[13] + image, queries, sizes[8])
        first_k, keys = _bounds(terms[14] + image, keys, sizes[9])
    return sizes[0], queries, keys, sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], first_q, first_k, \
        sizes[10], sizes[11], sizes[12], sizes[13], sizes[14], sizes[15], sizes[16], sizes[17], sizes[18], sizes[19]


@triton.jit
def places(terms, image, n, count, first):
    """The tokens n of a sample of `count` among those of all samples, in 64 bits; `first` is its first if it is packed."""
    at = image.to(tl.int64) * count + n
    if terms[13] is not None:
        at = (first + n).to(tl.int64)
    return at


@triton.jit
def last_key(terms, sizes, row, keys, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Behind the last key that queries row.. may see."""
    last = keys
    if CAUSAL:
        last = tl.minimum(keys, tl.minimum(row + BLOCK_M, sizes[1]) + offset)
    if terms[13] is not None:
        last = tl.where(row < sizes[1], last, 0)                                       # a tile past a short sequence
    return last


@triton.jit
def listed(count_ptr, strides, image, head, tile, first, last, BLOCK: tl.constexpr):
    """The visits that a tile makes to tiles of BLOCK keys or queries, from and to, and where their list begins. Without lists
    those from `first` to `last`."""
    at = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + tile
    begin = first // BLOCK
    end = (last + BLOCK - 1) // BLOCK
    if count_ptr is not None:
        begin = 0
        end = tl.load(count_ptr + at)
    return begin, end, at * strides[2]


@triton.jit
def part_of(begin, end, part, parts):
    """The visits from `begin` to `end` that one of `parts` makes."""
    share = (end - begin + parts - 1) // parts
    begin += share * part
    return begin, tl.minimum(begin + share, end)


@triton.jit
def visited(visit_ptr, at, n, BLOCK: tl.constexpr):
    """The first token of visit n of a list that begins at `at`."""
    start = n * BLOCK
    if visit_ptr is not None:
        start = tl.load(visit_ptr + (at + n)) * BLOCK
    return start


@triton.jit
def score_term(
    ptr, strides, image, head, row, start, sizes, other,
    AT: tl.constexpr, ROW: tl.constexpr, COLUMN: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A score-shaped tensor at queries row.. and keys start.., `other` past the last key: what broadcasts to
    [BLOCK_M, BLOCK_N]. Offsets inside the tile have 32 bits unless FAR: there are many, and each holds registers."""
    base = ptr + (image.to(tl.int64) * strides[AT] + head.to(tl.int64) * strides[AT + 1])
    first = start
    if AT == 4:
        first = start + sizes[9]                                                       # key_bias belongs to tokens
    base += tl.cast(row, tl.int64) * strides[AT + 2] + tl.cast(first, tl.int64) * strides[AT + 3]
    m = tl.maximum(tl.minimum(tl.arange(0, BLOCK_M), sizes[1] - 1 - row), -row)
    n = tl.arange(0, BLOCK_N)
    inside = (start + n < sizes[2])[None, :]
    if FAR:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    down = m[:, None] * strides[AT + 2]
    along = n[None, :] * strides[AT + 3]
    if ROW and COLUMN:
        at = down + along
        value = tl.load(base + at, mask=inside, other=other) if CLIP else tl.load(base + at)
    elif COLUMN:
        value = tl.load(base + along, mask=inside, other=other) if CLIP else tl.load(base + along)
    elif ROW:
        value = tl.load(base + down)
    else:
        value = tl.load(base)
    return value


@triton.jit
def row_factor(terms, strides, head, scale):
    """What the product of q and k is multiplied by in this head."""
    factor = scale
    if terms[3] is not None:
        factor = tl.load(terms[3] + head.to(tl.int64) * strides[12]).to(tl.float32)
    return factor


@triton.jit
def relative_term(
    terms, strides, image, head, row, start, sizes, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rel_y[i, j // kw] + rel_x[i, j % kw] at queries row.. and keys start..: [BLOCK_M, BLOCK_N]."""
    m = tl.maximum(tl.minimum(tl.arange(0, BLOCK_M), sizes[1] - 1 - row), -row)
    j = start + tl.arange(0, BLOCK_N)
    inside = (j < sizes[2])[None, :]
    y = j // sizes[5]
    x = j % sizes[5]
    if FAR:
        m = m.to(tl.int64)
    first = tl.cast(row + sizes[8], tl.int64)
    by_y = terms[8] + (image.to(tl.int64) * strides[22] + first * strides[23] + head.to(tl.int64) * strides[24])
    by_x = terms[9] + (image.to(tl.int64) * strides[26] + first * strides[27] + head.to(tl.int64) * strides[28])
    value = tl.load(by_y + (m[:, None] * strides[23] + y[None, :] * strides[25]), mask=inside, other=0.0).to(tl.float32)
    more = tl.load(by_x + (m[:, None] * strides[27] + x[None, :] * strides[29]), mask=inside, other=0.0).to(tl.float32)
    return value + more


@triton.jit
def seen_by_ids(
    terms, strides, image, row, start, sizes, RULE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which keys start.. the ids or levels let the queries row.. see: [BLOCK_M, BLOCK_N]."""
    i = (tl.maximum(tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1), 0) + sizes[8]).to(tl.int64)
    j = (tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1), 0) + sizes[9]).to(tl.int64)
    a = tl.load(terms[10] + (image.to(tl.int64) * strides[30] + i * strides[31]))[:, None]
    b = tl.load(terms[11] + (image.to(tl.int64) * strides[32] + j * strides[33]))[None, :]
    if RULE == UPTO:
        seen = b <= a
    else:
        seen = (a >= 0) & (b >= 0)
        if RULE == EQUAL:
            seen = seen & (a == b)
        else:
            down = tl.minimum(tl.maximum(a, 0), sizes[6] - 1).to(tl.int64) * strides[34]
            along = tl.minimum(tl.maximum(b, 0), sizes[7] - 1).to(tl.int64) * strides[35]
            seen = seen & (tl.load(terms[12] + (down + along)) != 0)
    return seen


@triton.jit
def seen_bits(
    terms, strides, image, head, row, start, sizes, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A mask of words at queries row.. and keys start..: [BLOCK_M, BLOCK_N], not 0 where seen. Every row loads a word once; only a
    tile that begins inside a word needs one behind its last."""
    base = terms[2] + (image.to(tl.int64) * strides[8] + head.to(tl.int64) * strides[9])
    base += tl.cast(row, tl.int64) * strides[10]
    m = tl.arange(0, BLOCK_M)
    base += (m.to(tl.int64) if FAR else m) * strides[10]
    n = tl.arange(0, BLOCK_N)[None, :]
    word = start // 32
    shift = start % 32
    rows = tl.where(start < sizes[2], sizes[1], 0)                                     # that have the word
    own = tl.load(base + word * strides[11], mask=row + m < rows, other=0).to(tl.uint32, bitcast=True)
    bits = own[:, None]
    for part in tl.static_range(tl.cdiv(BLOCK_N, 32)):
        word += 1
        rows = tl.where(word * 32 < sizes[2], sizes[1], 0)
        if 32 * part + 32 >= BLOCK_N:
            rows = tl.where(shift > 0, rows, 0)
        behind = tl.load(base + word * strides[11], mask=row + m < rows, other=0).to(tl.uint32, bitcast=True)
        window = ((own >> shift) | (behind << 1 << (31 - shift)))[:, None]
        bits = tl.where(n < 32 * part, bits, window)
        own = behind
    return bits & (1 << n % 32).to(tl.uint32)


@triton.jit
def survives(terms, image, head, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which keys start.. are among the k largest of queries row..: [BLOCK_M, BLOCK_N]."""
    i = tl.maximum(tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1), 0)
    j = tl.maximum(tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1), 0)[None, :]
    flat = (places(terms, image, i, sizes[1], sizes[8]) * sizes[3] + head) * sizes[13]
    return (tl.load(terms[24] + (flat[:, None] + j // 32)) >> (j % 32)) & 1 != 0


@triton.jit
def coordinates(ptr, strides, AT: tl.constexpr, image, n, count, first):
    """Both coordinates of the tokens n, those of the last past it."""
    at = image.to(tl.int64) * strides[AT] + (tl.maximum(tl.minimum(n, count - 1), 0) + first).to(tl.int64) * strides[AT + 1]
    return tl.load(ptr + at).to(tl.float32), tl.load(ptr + (at + strides[AT + 2])).to(tl.float32)


@triton.jit
def distances(terms, strides, image, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The steps from keys start.. to queries row.. along both axes, and their length: [BLOCK_M, BLOCK_N] each."""
    q = coordinates(terms[18], strides, 43, image, row + tl.arange(0, BLOCK_M), sizes[1], sizes[8])
    k = coordinates(terms[19], strides, 46, image, start + tl.arange(0, BLOCK_N), sizes[2], sizes[9])
    y = q[0][:, None] - k[0][None, :]
    x = q[1][:, None] - k[1][None, :]
    return y, x, tl.sqrt(y * y + x * x)


@triton.jit
def finite_distances(terms, strides, image, row, start, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`distances` of pairs that have a gradient, 0 where a token stands nowhere: it is hidden, or the gradient is NaN anyway."""
    y, x, length = distances(terms, strides, image, row, start, sizes, BLOCK_M, BLOCK_N)
    return clean(y), clean(x), clean(length)


@triton.jit
def path_term(
    terms, strides, image, head, row, start, sizes, FAR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The decay along the row and then along the column from queries row.. to keys start..: [BLOCK_M, BLOCK_N]."""
    i = tl.minimum(row + tl.arange(0, BLOCK_M), sizes[1] - 1)[:, None]
    j = tl.minimum(start + tl.arange(0, BLOCK_N), sizes[2] - 1)[None, :]
    width = sizes[10]
    qy, qx, y, x = i // width, i % width, j // width, j % width
    first = tl.where(sizes[11] != 0, y, qy) * width                                    # of the row
    column = tl.where(sizes[11] != 0, qx, x)
    base = image.to(tl.int64) * strides[49] + head.to(tl.int64) * strides[51]
    return (_at(terms[20] + base, first + tl.maximum(x, qx), strides[50], FAR)
            - _at(terms[20] + base, first + tl.minimum(x, qx), strides[50], FAR)
            + _at(terms[21] + base, tl.maximum(y, qy) * width + column, strides[50], FAR)
            - _at(terms[21] + base, tl.minimum(y, qy) * width + column, strides[50], FAR))


@triton.jit
def _at(ptr, token, stride, FAR: tl.constexpr):
    if FAR:
        token = token.to(tl.int64)
    return tl.load(ptr + token * stride)


@triton.jit
def slope_of(terms, strides, head):
    return tl.load(terms[17] + head.to(tl.int64) * strides[42]).to(tl.float32)


@triton.jit
def scores(
    a, factor, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, CLIP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GAINED: tl.constexpr = True,
):  # fmt: skip
    """Scores of the products a of queries row.. and keys start.., times their gains if GAINED; what a row must not see becomes
    -inf, whatever its product is."""
    s = a * factor
    if GAINED and (terms[6] is not None or terms[26] is not None):
        s *= gains(terms, strides, image, head, row, start, sizes, AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
    if terms[8] is not None:
        s += relative_term(terms, strides, image, head, row, start, sizes, FAR, BLOCK_M, BLOCK_N)
    if terms[17] is not None:
        s -= slope_of(terms, strides, head) * distances(terms, strides, image, row, start, sizes, BLOCK_M, BLOCK_N)[2]
    if terms[20] is not None:
        s += path_term(terms, strides, image, head, row, start, sizes, FAR, BLOCK_M, BLOCK_N)
    if terms[30] is not None or terms[31] is not None:
        s += position_term(terms, strides, image, head, row, start, sizes, BLOCK_M, BLOCK_N)
    if terms[25] is not None:
        bias = table_term(terms[25], strides, head, row, start, sizes, 54, BLOCK_M, BLOCK_N)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[0] is not None:
        bias = score_term(terms[0], strides, image, head, row, start, sizes, float("-inf"),
                          0, AXES[0][0], AXES[0][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[1] is not None:
        bias = score_term(terms[1], strides, image, head, row, start, sizes, float("-inf"),
                          4, AXES[1][0], AXES[1][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if terms[2] is not None:
        if terms[2].dtype.element_ty == tl.int32:
            seen = seen_bits(terms, strides, image, head, row, start, sizes, FAR, BLOCK_M, BLOCK_N)
        else:
            seen = score_term(terms[2], strides, image, head, row, start, sizes, 0,
                              8, AXES[2][0], AXES[2][1], FAR, CLIP, BLOCK_M, BLOCK_N)
        s = tl.where(seen != 0, s, float("-inf"))
    if RULE != NO_RULE:
        s = tl.where(seen_by_ids(terms, strides, image, row, start, sizes, RULE, BLOCK_M, BLOCK_N), s, float("-inf"))
    if terms[24] is not None:
        s = tl.where(survives(terms, image, head, row, start, sizes, BLOCK_M, BLOCK_N), s, float("-inf"))
    j = start + tl.arange(0, BLOCK_N)
    if CAUSAL:
        i = row + tl.arange(0, BLOCK_M)
        s = tl.where(j[None, :] < tl.minimum(i + (sizes[4] + 1), sizes[2])[:, None], s, float("-inf"))
    elif CLIP:
        s = tl.where((j < sizes[2])[None, :], s, float("-inf"))
    return s


@triton.jit
def gains(
    terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BUT: tl.constexpr = -1,
):  # fmt: skip
    """What the scores are multiplied by before the biases, without the term BUT."""
    if terms[6] is not None and BUT != 6:
        g = score_term(terms[6], strides, image, head, row, start, sizes, 1.0,
                       14, AXES[3][0], AXES[3][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        if terms[26] is not None and BUT != 26:
            g *= table_term(terms[26], strides, head, row, start, sizes, 56, BLOCK_M, BLOCK_N)
    else:
        g = table_term(terms[26], strides, head, row, start, sizes, 56, BLOCK_M, BLOCK_N)
    return g


@triton.jit
def weighed(
    p, terms, strides, image, head, row, start, sizes,
    AXES: tl.constexpr, FAR: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BUT: tl.constexpr = -1,
):  # fmt: skip
    """p times the factors of the weights, without the term BUT; 0 stays 0."""
    if terms[7] is not None and BUT != 7:
        w = score_term(terms[7], strides, image, head, row, start, sizes, 1.0,
                       18, AXES[4][0], AXES[4][1], FAR, CLIP, BLOCK_M, BLOCK_N).to(tl.float32)
        p = tl.where(p == 0.0, 0.0, p * w)
    if terms[27] is not None and BUT != 27:
        w = table_term(terms[27], strides, head, row, start, sizes, 58, BLOCK_M, BLOCK_N)
        p = tl.where(p == 0.0, 0.0, p * w)
    if terms[28] is not None and BUT != 28:
        p = tl.where(p == 0.0, 0.0, p * ratio_tile(terms[28], row, start, BLOCK_M, BLOCK_N))
    return p


@triton.jit
def query_shares(terms, strides, image, head, row, sizes, BLOCK_M: tl.constexpr):
    """query_weight of queries row.., 0 past the last."""
    i = row + tl.arange(0, BLOCK_M)
    at = image.to(tl.int64) * strides[36] + (i + sizes[8]).to(tl.int64) * strides[37] + head.to(tl.int64) * strides[38]
    return tl.load(terms[15] + at, mask=i < sizes[1], other=0.0).to(tl.float32)


@triton.jit
def mean_gradient(terms, strides, image, head, start, sizes, BLOCK_N: tl.constexpr):
    """The gradient of key_mean at keys start.., 0 past the last."""
    j = start + tl.arange(0, BLOCK_N)
    at = image.to(tl.int64) * strides[39] + (j + sizes[9]).to(tl.int64) * strides[40] + head.to(tl.int64) * strides[41]
    return tl.load(terms[16] + at, mask=j < sizes[2], other=0.0).to(tl.float32)
