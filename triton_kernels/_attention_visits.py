"""Which tiles of keys a tile of queries visits, and the other way round, where a mask or ids hide whole tiles: lists made on
the device, which the host never reads."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_host import UNSPECIALIZED
from ._attention_terms import of_sample, scores

FEWEST = 8                              # tiles to choose among: fewer are all visited


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _visible(
    seen_ptr, terms, term_strides, sizes, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    CLIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile of scores holds one that is seen; of `terms` all but the mask, the ids and bounds are None.
    Grid: key tiles (fastest) x query tiles x heads x samples, on axis 0. Writes [B, H, query tiles, key tiles] int8.
    Any strides: the terms."""
    heads = sizes[3]
    pid = tl.program_id(0)
    m_tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    n_tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    start = pid % n_tiles * BLOCK_N
    row = pid // n_tiles % m_tiles * BLOCK_M
    head = pid // n_tiles // m_tiles % heads
    image = pid // n_tiles // m_tiles // heads
    own = of_sample(terms, sizes, image)
    s = scores(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), 1.0, terms, term_strides, image, head, row, start, own,
               AXES, RULE, FAR, CAUSAL, CLIP, BLOCK_M, BLOCK_N)
    real = row + tl.arange(0, BLOCK_M) < own[1]
    seen = tl.where(real[:, None] & (s == 0.0), 1, 0)
    tl.store(seen_ptr + pid, tl.max(tl.max(seen, 1), 0).to(tl.int8))


def seen_tiles(shared: dict, blocks: dict, of_keys: bool = False, together: bool = False) -> Tensor | None:
    """Which tiles hold a score that is seen, [B|1, H|1, query tiles, key tiles] int8, by any head if `together`; None where all
    are to be visited."""
    terms, strides = shared["terms"], shared["term_strides"]
    batch, queries, keys, heads = shared["sizes"][:4]
    hides = terms[2] is not None and shared["AXES"][2][1] and (together or shared["AXES"][2][0])
    packed = terms[13] is not None
    tiles = -(-queries // blocks["BLOCK_M"]), -(-keys // blocks["BLOCK_N"])
    if not (hides or shared["RULE"]) or tiles[not of_keys] < FEWEST:
        return None
    batch = batch if packed or (hides and strides[8]) or strides[30] or strides[32] else 1
    heads = heads if hides and strides[9] else 1
    seen = torch.empty((batch, heads, *tiles), dtype=torch.int8, device=shared["q_ptr"].device)
    hiding = tuple(x if n in (10, 11, 12, 13, 14) or (n == 2 and hides) else None for n, x in enumerate(terms))
    _visible[(seen.numel(),)](
        seen, hiding, strides, (batch, queries, keys, heads, *shared["sizes"][4:]), AXES=shared["AXES"], RULE=shared["RULE"],
        FAR=shared["FAR"], CAUSAL=shared["CAUSAL"], CLIP=blocks["CLIP"], BLOCK_M=blocks["BLOCK_M"], BLOCK_N=blocks["BLOCK_N"],
        num_warps=4, num_stages=1, enable_fp_fusion=True)
    return seen.amax(1, keepdim=True) if together else seen


def shared_strides(seen: Tensor | None) -> tuple[int, int]:
    """The strides (sample, head) of a contiguous tensor, 0 where shared."""
    return (0, 0) if seen is None else tuple(0 if seen.shape[n] == 1 else seen.stride(n) for n in (0, 1))


def lists(shared: dict, blocks: dict, of_keys: bool = False, together: bool = False) -> dict:
    """The lists of visits [B|1, H|1, tiles, visits] of the query tiles (`of_keys`: of the key tiles), how many of each hold,
    and their strides (sample, head, tile), 0 where shared; None where every tile is visited."""
    seen = seen_tiles(shared, blocks, of_keys, together)
    if seen is None:
        return {"visit_ptr": None, "count_ptr": None, "visit_strides": (0, 0, 0)}
    seen = seen.mT if of_keys else seen
    visits = seen.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    count = seen.sum(-1, dtype=torch.int32)
    return {"visit_ptr": visits.contiguous(), "count_ptr": count, "visit_strides": (*shared_strides(count), seen.shape[3])}
