"""What chooses among keys or queries when heads mix: the mixed scores of all heads of a tile. The k largest of a row become bits,
as those of heads by themselves; a hard choice is the place of the first best key, or query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_hard import _better
from ._attention_heads_tiles import HEADS, key_visits, mixed_scores, query_visits, row_places, visited_tile
from ._attention_host import UNSPECIALIZED
from ._attention_terms import of_sample
from ._attention_topk import _ranked
from ._attention_visits import lists

OF_SCORES = (
    "q_ptr", "k_ptr", "visit_ptr", "count_ptr", "visit_strides", "mixtures", "terms", "q_strides", "k_strides", "d_strides",
    "term_strides", "sizes", "scale", "AXES", "RULE", "FAR", "CAUSAL", "GROUP", "WIDTH", "ALIGN", "CLIP", "ALIKE", "CHUNK",
    "BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "enable_fp_fusion", "maxnreg",
)  # fmt: skip


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "topk"))
def _head_survivors(
    q_ptr, k_ptr, half_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, d_strides, term_strides,
    sizes, scale, topk, words,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, ALIKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which keys survive for BLOCK_M queries of all heads of a sample, BLOCK_N = 16 keys to half a word. The k-th largest score of
    every row is found two bits at a time.
    Grid: query tiles (fastest) x samples, on axis 0. Writes [B, Nq, H, 2 words] int16, which are 0 before.
    Any strides: q, k and the terms."""
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    row = pid % tiles * BLOCK_M
    image = pid // tiles
    heads = sizes[3]
    sizes = of_sample(terms, sizes, image)
    begin, end, at = query_visits(count_ptr, visit_strides, terms, image, row, sizes, CAUSAL, BLOCK_M)
    least = tl.zeros([HEADS, BLOCK_M], tl.uint32)                                      # the k-th key, from its first bits on
    left = tl.zeros([HEADS, BLOCK_M], tl.int32) + topk                                 # how many of its equals survive
    shift = tl.full([], 32, tl.uint32)
    for _ in tl.range(0, 16, num_stages=1, disable_licm=True):
        shift -= 2
        of_three = tl.zeros([HEADS, BLOCK_M], tl.int32)
        of_two = of_three
        of_one = of_three
        of_none = of_three
        for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
            start = visited_tile(visit_ptr, at, n, BLOCK_N)
            a, x, y, s = mixed_scores(
                q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
                AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
            key = _ranked(s)
            tail = key >> shift
            alike = (key != 0) & ((tail >> 2) == (least >> shift >> 2)[:, :, None])
            digit = tl.where(alike, (tail & 3).to(tl.int32), -1)
            of_three += tl.sum((digit == 3).to(tl.int32), 2)
            of_two += tl.sum((digit == 2).to(tl.int32), 2)
            of_one += tl.sum((digit == 1).to(tl.int32), 2)
            of_none += tl.sum((digit == 0).to(tl.int32), 2)
        two = of_three + of_two
        one = two + of_one
        found = tl.where(of_three >= left, 3, tl.where(two >= left, 2, tl.where(one >= left, 1, 0)))
        enough = one + of_none >= left                                                 # not if fewer than k are visible
        above = tl.where(found == 3, 0, tl.where(found == 2, of_three, tl.where(found == 1, two, one)))
        least = least | (tl.where(enough, found, 0).to(tl.uint32) << shift)
        left -= tl.where(enough, above, 0)
    flat, real = row_places(terms, image, row + tl.arange(0, BLOCK_M), sizes[1], sizes[8], heads)
    for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        start = visited_tile(visit_ptr, at, n, BLOCK_N)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        key = _ranked(s)
        tie = ((key == least[:, :, None]) & (key != 0)).to(tl.int32)
        stays = (key > least[:, :, None]) | ((tie != 0) & (tl.cumsum(tie, 2) <= left[:, :, None]))
        left -= tl.sum(tie, 2)
        bits = tl.sum(tl.where(stays, 1 << tl.arange(0, BLOCK_N)[None, None, :], 0), 2)
        tl.store(half_ptr + (flat * (2 * words) + start // BLOCK_N), bits.to(tl.int16), mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _head_choices(
    q_ptr, k_ptr, chosen_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, d_strides,
    term_strides, sizes, scale,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, ALIKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """The key of each of BLOCK_M queries of all heads of a sample, or the query of each of BLOCK_N keys; -1 for none.
    Grid: tiles of what chooses (fastest) x samples, on axis 0. Writes [B, N, H] int32.
    Any strides: q, k and the terms."""
    NOBODY: tl.constexpr = 2147483647
    OWN: tl.constexpr = BLOCK_N if BY_KEYS else BLOCK_M
    OTHER: tl.constexpr = BLOCK_M if BY_KEYS else BLOCK_N
    pid = tl.program_id(0)
    tiles = ((sizes[2] if BY_KEYS else sizes[1]) + OWN - 1) // OWN
    own = pid % tiles * OWN
    image = pid // tiles
    heads = sizes[3]
    sizes = of_sample(terms, sizes, image)
    queries, keys = sizes[1], sizes[2]
    top = tl.full([HEADS, OWN], float("-inf"), tl.float32)
    best = tl.full([HEADS, OWN], -1, tl.int32)
    if BY_KEYS:
        begin, end, at = key_visits(count_ptr, visit_strides, image, own, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    else:
        begin, end, at = query_visits(count_ptr, visit_strides, terms, image, own, sizes, CAUSAL, BLOCK_M)
    for n in tl.range(begin, end, OTHER if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        other = visited_tile(visit_ptr, at, n, OTHER)
        row = other if BY_KEYS else own
        start = own if BY_KEYS else other
        i = (row + tl.arange(0, BLOCK_M))[None, :, None]
        j = (start + tl.arange(0, BLOCK_N))[None, None, :]
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        s = tl.where((i < queries) & (j < keys), s, float("-inf"))
        if BY_KEYS:
            top, best = _better(s, i, top, best, 1, NOBODY)
        else:
            top, best = _better(s, j, top, best, 2, NOBODY)
    flat, real = row_places(
        terms, image, own + tl.arange(0, OWN), keys if BY_KEYS else queries, sizes[9] if BY_KEYS else sizes[8], heads)
    tl.store(chosen_ptr + flat, best, mask=real)


def _tiles(shared: dict, side: int) -> int:
    return shared["sizes"][0] * -(-shared["sizes"][side] // shared["BLOCK_M"])


def head_survivors(shared: dict, topk: int) -> dict:
    """The arguments of the kernels with the bits of the k largest mixed scores of each row; unchanged if all survive."""
    keys, q = shared["sizes"][2], shared["q_ptr"]
    if not 0 < topk < keys or not q.numel():
        return shared
    words = -(-keys // 32)
    bits = torch.zeros((*q.shape[:3], words), dtype=torch.int32, device=q.device)
    given = {name: shared[name] for name in OF_SCORES if name in shared}
    _head_survivors[(_tiles(shared, 1),)](**given, half_ptr=bits.view(torch.int16), topk=topk, words=words)
    sizes, terms = shared["sizes"], shared["terms"]
    return shared | {
        "sizes": (*sizes[:13], words, *sizes[14:]), "terms": (*terms[:24], bits, *terms[25:]), "ALIKE": False}


def head_choices(shared: dict, by_keys: bool) -> Tensor:
    """The key of every query, or the query of every key, [B, N, H] int32."""
    q = shared["q_ptr"]
    rows = shared["k_ptr" if by_keys else "q_ptr"].shape[:2]
    chosen = torch.full((*rows, q.shape[2]), -1, dtype=torch.int32, device=q.device)
    given = {name: shared[name] for name in OF_SCORES if name in shared}
    if by_keys:
        given |= lists(shared, shared, of_keys=True, together=True)
    if chosen.numel():
        _head_choices[(_tiles(shared, 2 if by_keys else 1),)](**given, chosen_ptr=chosen, BY_KEYS=by_keys)
    return chosen
