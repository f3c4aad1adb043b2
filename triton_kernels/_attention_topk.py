"""The keys of a row that survive top-k: the k largest of its visible scores, ties towards the lower key. They are found once in
each pass and kept as bits, which all kernels read as one more mask: scores that two kernels round apart cannot part them.
"""

import torch
import triton
import triton.language as tl

from ._attention_host import UNSPECIALIZED, Call, alignment, programs
from ._attention_terms import last_key, listed, of_sample, places, row_factor, scores, visited
from ._attention_tiles import load_parts, offsets, row_products
from ._attention_visits import lists
from ._choose import LOWEST

WORD = tl.constexpr(32)                                     # keys in a word of bits
DIGITS = tl.constexpr(16)                                   # a pass finds four bits of the k-th score
BLOCKS = {"BLOCK_M": 16, "BLOCK_N": 32}


@triton.jit
def _ranked(s):
    """uint32 in the order of the scores, NaN above all, -0 with 0; 0 where hidden."""
    bits = s.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST, 0, bits)
    key = tl.where(bits < 0, ~bits, bits ^ LOWEST)
    key = tl.where(s != s, -1, key)
    return tl.where(s == float("-inf"), 0, key).to(tl.uint32, bitcast=True)


@triton.jit
def _tile_keys(
    q, k_ptr, k_strides, d_strides, factor, terms, term_strides, image, head, row, start, sizes,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    j = start + tl.arange(0, BLOCK_N)
    at = offsets(image, head // GROUP, j + sizes[9], k_strides, ALIGN)
    k = load_parts(k_ptr, at, j < sizes[2], d_strides[1], WIDTHS)
    a = row_products(q, k, WIDTHS)
    a += a * 0.0                                                                       # an infinity becomes NaN
    return _ranked(scores(a, factor, terms, term_strides, image, head, row, start, sizes,
                          AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N))


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "topk"))
def _survivors(
    q_ptr, k_ptr, word_ptr, visit_ptr, count_ptr,
    terms, q_strides, k_strides, d_strides, term_strides, visit_strides, sizes, scale, topk,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTHS: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which keys survive for BLOCK_M queries of one head and sample, BLOCK_N = WORD keys to a word.
    Grid: heads (fastest) x query tiles x samples, on axis 0. Writes [B, Nq, H, words], which are 0 before.
    Any strides: q, k and the terms."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    head = pid % heads
    row = pid // heads % tiles * BLOCK_M
    image = pid // heads // tiles
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    real = i < sizes[1]
    last = last_key(terms, sizes, row, sizes[2], sizes[4], CAUSAL, BLOCK_M)
    begin, end, visits = listed(count_ptr, visit_strides, image, head, row // BLOCK_M, 0, last, BLOCK_N)
    factor = row_factor(terms, term_strides, head, scale)
    q = load_parts(q_ptr, offsets(image, head, i + sizes[8], q_strides, ALIGN), real, d_strides[0], WIDTHS)
    digit = tl.arange(0, DIGITS)[None, :]
    least = tl.zeros([BLOCK_M], tl.uint32)                                             # the k-th key, from its first bits on
    left = tl.zeros([BLOCK_M], tl.int32) + topk                                        # how many of its equals survive
    shift = tl.full([], 32, tl.uint32)
    for _ in tl.range(0, 8, num_stages=1):
        shift -= 4
        counts = tl.zeros([BLOCK_M, DIGITS], tl.int32)
        for n in tl.range(begin, end, num_stages=1):
            start = visited(visit_ptr, visits, n, BLOCK_N)
            key = _tile_keys(q, k_ptr, k_strides, d_strides, factor, terms, term_strides, image, head, row, start, sizes,
                             AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, ALIGN, CLIP, BLOCK_M, BLOCK_N)
            tail = key >> shift
            alike = (key != 0) & ((tail >> 4) == (least >> shift >> 4)[:, None])
            own = tl.where(alike, (tail & 15).to(tl.int32), -1)
            counts += tl.sum((own[:, :, None] == digit[None, :, :]).to(tl.int32), 1)
        above = tl.sum(counts, 1)[:, None] - tl.cumsum(counts, 1)                      # with a larger digit
        chosen = (above < left[:, None]) & (above + counts >= left[:, None])           # nowhere if fewer than k are visible
        least = least | (tl.sum(tl.where(chosen, digit, 0), 1).to(tl.uint32) << shift)
        left -= tl.sum(tl.where(chosen, above, 0), 1)
    flat = (places(terms, image, i, sizes[1], sizes[8]) * heads + head) * sizes[13]
    for n in tl.range(begin, end, num_stages=1):
        start = visited(visit_ptr, visits, n, BLOCK_N)
        key = _tile_keys(q, k_ptr, k_strides, d_strides, factor, terms, term_strides, image, head, row, start, sizes,
                         AXES, RULE, FAR, CAUSAL, GROUP, WIDTHS, ALIGN, CLIP, BLOCK_M, BLOCK_N)
        tie = ((key == least[:, None]) & (key != 0)).to(tl.int32)
        stays = (key > least[:, None]) | ((tie != 0) & (tl.cumsum(tie, 1) <= left[:, None]))
        left -= tl.sum(tie, 1)
        bits = tl.where(stays, 1 << tl.arange(0, BLOCK_N)[None, :], 0)
        tl.store(word_ptr + (flat + start // WORD), tl.sum(bits, 1), mask=real)


def surviving(call: Call, shared: dict) -> dict:
    """The arguments of the kernels with the bits of those that survive; unchanged if all do."""
    queries, keys = shared["sizes"][1:3]
    if not 0 < call.topk < keys or not call.q.numel():
        return shared
    words = -(-keys // WORD.value)
    bits = torch.zeros((*call.q.shape[:3], words), dtype=torch.int32, device=call.q.device)
    shared = shared | {"sizes": (*shared["sizes"][:13], words, *shared["sizes"][14:])}
    names = ("q_ptr", "k_ptr", "terms", "q_strides", "k_strides", "term_strides", "sizes", "scale", "AXES", "RULE", "FAR", "CAUSAL",
             "GROUP", "WIDTHS")  # fmt: skip
    made = {"CLIP": keys % WORD.value != 0 or shared["terms"][13] is not None, **BLOCKS}
    _survivors[(programs(shared, -(-queries // BLOCKS["BLOCK_M"])),)](
        **{n: shared[n] for n in names}, **made, **lists(shared, made), word_ptr=bits, topk=call.topk,
        d_strides=shared["d_strides"][:2], ALIGN=alignment([call.q, call.k]), num_warps=8, num_stages=1, enable_fp_fusion=True)
    return shared | {"terms": (*shared["terms"][:24], bits, *shared["terms"][25:])}
