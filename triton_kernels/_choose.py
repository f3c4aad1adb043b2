"""What the kernels that choose tokens share: keys of scores, the largest of them, places. One block holds a sample."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**31))


@triton.jit
def total(mask):
    return tl.sum(mask.to(tl.int32))


@triton.jit
def before(mask):
    """How many tokens of `mask` stand before each token, [BLOCK]."""
    one = mask.to(tl.int32)
    return tl.cumsum(one, 0) - one


@triton.jit
def ordered(x):
    """uint32, larger for larger x and never 0: -0 equals 0, NaN is -inf."""
    bits = tl.where(x == x, x, float("-inf")).to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST, 0, bits)
    return tl.where(bits < 0, ~bits, bits ^ LOWEST).to(tl.uint32, bitcast=True)


@triton.jit
def largest(key, count):
    """Which tokens have the `count` largest of the keys uint32 [BLOCK], ties by position; as many at least are not 0."""
    least = tl.full([], 0, tl.uint32)  # the largest number that `count` keys reach, found from its first bit on
    bit = tl.full([], 1 << 31, tl.uint32)
    for _ in range(32):
        larger = least | bit
        least = tl.where(tl.sum((key >= larger).to(tl.int32)) >= count, larger, least)
        bit = bit >> 1
    above = key > least
    tie = key == least
    return above | (tie & (before(tie) < count - total(above)))


@triton.jit
def ascending(x, BLOCK: tl.constexpr):
    """x [BLOCK], sorted: a bitonic network in loops, for tl.sort unrolls it and takes ten times as long to compile."""
    i = tl.arange(0, BLOCK)
    size = 2
    while size <= BLOCK:
        step = size // 2
        while step > 0:
            other = tl.gather(x, i ^ step, 0)
            smaller = ((i & step) == 0) == ((i & size) == 0)
            x = tl.where(smaller, tl.minimum(x, other), tl.maximum(x, other))
            step = step // 2
        size = size * 2
    return x


@triton.jit
def ranks(key, member, BLOCK: tl.constexpr):
    """The place of every member among the members, by descending key, ties by position, [BLOCK]."""
    i = tl.arange(0, BLOCK)
    item = tl.where(member, -1 - key.to(tl.int64), 0) * BLOCK + i                      # others last
    position = (ascending(item, BLOCK) & (BLOCK - 1)).to(tl.int32)                     # of the token at each place
    return ascending(position * BLOCK + i, BLOCK) & (BLOCK - 1)
