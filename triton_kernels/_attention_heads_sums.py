"""The gradients of factors that lack an axis of queries or of keys, where heads mix: sums over that axis."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_heads_bwd_tiles import target_gradient
from ._attention_heads_tiles import HEADS, key_visits, query_visits, row_places, visited_tile
from ._attention_host import UNSPECIALIZED
from ._attention_terms import of_sample
from ._attention_visits import lists


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_sums(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, sum_ptr,
    visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, v_strides, dout_strides, d_strides, term_strides,
    sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TARGET: tl.constexpr, BY_KEYS: tl.constexpr,
):  # fmt: skip
    """What all pairs of BLOCK_M queries, or BLOCK_N keys, of all heads of a sample give to the factor TARGET, a place in `terms`.
    Grid: tiles (fastest) x samples, on axis 0. Writes [B, N, H].
    Any strides: q, k, v, dout and the terms. The rest is contiguous."""
    OWN: tl.constexpr = BLOCK_N if BY_KEYS else BLOCK_M
    OTHER: tl.constexpr = BLOCK_M if BY_KEYS else BLOCK_N
    pid = tl.program_id(0)
    tiles = ((sizes[2] if BY_KEYS else sizes[1]) + OWN - 1) // OWN
    own = pid % tiles * OWN
    image = pid // tiles
    sizes = of_sample(terms, sizes, image)
    acc = tl.zeros([HEADS, OWN], tl.float32)
    if BY_KEYS:
        begin, end, at = key_visits(count_ptr, visit_strides, image, own, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    else:
        begin, end, at = query_visits(count_ptr, visit_strides, terms, image, own, sizes, CAUSAL, BLOCK_M)
    for n in tl.range(begin, end, OTHER if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        other = visited_tile(visit_ptr, at, n, OTHER)
        row = other if BY_KEYS else own
        start = own if BY_KEYS else other
        x = target_gradient(
            q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, low_ptr, delta_ptr, mixtures, terms, q_strides, k_strides, v_strides,
            dout_strides, d_strides, term_strides, image, row, start, sizes, scale, threshold, keep_scale,
            NORM, AXES, RULE, FAR, CAUSAL, GROUP, WIDTH, WIDTH_V, ALIGN, CLIP, ALIKE, CHUNK, CHUNK_V, BLOCK_M, BLOCK_N, TARGET)
        acc += tl.sum(x, 1 if BY_KEYS else 2)
    flat, real = row_places(
        terms, image, own + tl.arange(0, OWN), sizes[2] if BY_KEYS else sizes[1], sizes[9] if BY_KEYS else sizes[8], sizes[3])
    tl.store(sum_ptr + flat, acc, mask=real)


def token_sums(shared: dict, target: int, by_keys: bool) -> Tensor:
    """What all pairs of every query, or of every key, give to a factor, whose place in `terms` is `target`: [B, N, H]."""
    rows = shared["k_ptr" if by_keys else "q_ptr"].shape[:2]
    sums = torch.zeros((*rows, shared["sizes"][3]), dtype=torch.float32, device=shared["q_ptr"].device)
    given = shared | lists(shared, shared, of_keys=by_keys, together=True)
    tiles = -(-shared["sizes"][2 if by_keys else 1] // shared["BLOCK_M"])
    _heads_sums[(shared["sizes"][0] * tiles,)](**given, sum_ptr=sums, TARGET=target, BY_KEYS=by_keys)
    return sums
