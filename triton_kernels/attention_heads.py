"""attention whose heads mix (talking heads): one mixture of the scores, one of the weights.

A tile of queries holds all heads at once, so that no score leaves its program: nothing of size [B, H, Nq, Nk] exists. A first walk
over the keys makes lse, a second one the weights and their sum with v, a few columns of v to a program. Heads are padded to 16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_heads_choice import head_choices, head_survivors
from ._attention_heads_tiles import (
    HEADS,
    keep_heads,
    key_visits,
    known_rows,
    load_heads,
    mixed_scores,
    mixed_weights,
    query_visits,
    row_places,
    store_heads,
    tile_weights,
    token_numbers,
    visited_tile,
)
from ._attention_host import HARD, MIXTURES, UNSPECIALIZED, Call, arguments
from ._attention_terms import of_sample, stream
from ._attention_tiles import ARGMAX_K, ARGMAX_Q
from ._attention_visits import lists
from ._host import power
from ._tiles import LN2, LOG2E, clean

TILE = 16                               # queries, and keys: sixteen heads of more do not fit into registers
CROWDED = (6, 7, 25, 26, 27, 30, 31, 33, 34)  # terms with which the compiler would rather spill than hold one program fewer
OF_VALUES = ("v_ptr", "v_strides", "threshold", "keep_scale")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _head_rows(
    q_ptr, k_ptr, lse_ptr, low_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides, d_strides,
    term_strides, sizes, scale,
    AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, ALIKE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse of BLOCK_M queries of all heads of a sample, and low, what it lacks in base 2.
    Grid: query tiles (fastest) x samples, on axis 0. Writes [B, Nq, H] twice.
    Any strides: q, k and the terms."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    row = pid % tiles * BLOCK_M
    image = pid // tiles
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    flat, real = row_places(terms, image, i, sizes[1], sizes[8], heads)
    begin, end, at = query_visits(count_ptr, visit_strides, terms, image, row, sizes, CAUSAL, BLOCK_M)
    top = tl.full([HEADS, BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([HEADS, BLOCK_M], tl.float32)
    if terms[4] is not None:
        h = tl.arange(0, HEADS)
        sink = tl.load(terms[4] + h.to(tl.int64) * term_strides[13], mask=h < heads, other=0.0).to(tl.float32)
        top = tl.zeros([HEADS, BLOCK_M], tl.float32) + sink[:, None]
        norm = tl.where(top == float("-inf"), 0.0, 1.0)
    for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        start = visited_tile(visit_ptr, at, n, BLOCK_N)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        higher = tl.maximum(top, tl.max(s, 2))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        norm = norm * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base[:, :, None]) * LOG2E), 2)
        top = higher
    full = tl.where(norm == 0.0, 1.0, norm)
    lse = top + tl.log2(full) * LN2
    tl.store(lse_ptr + flat, tl.where(norm == 0.0, float("-inf"), lse), mask=real)
    if low_ptr is not None:
        low = (top - lse) * LOG2E + tl.log2(full)
        tl.store(low_ptr + flat, tl.where(tl.abs(lse) < float("inf"), low, 0.0), mask=real)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _heads_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, low_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides,
    v_strides, d_strides, term_strides, sizes, scale, threshold, keep_scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr,
    ALIKE: tl.constexpr, CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """CHUNK_V columns of out, of BLOCK_M queries of all heads of a sample.
    Grid: query tiles (fastest) x samples on axis 0, columns on axis 1. Writes [B, Nq, H, Dv].
    Any strides: q, k, v and the terms. lse and low are contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[1] + BLOCK_M - 1) // BLOCK_M
    row = pid % tiles * BLOCK_M
    image = pid // tiles
    column = tl.program_id(1) * CHUNK_V
    sizes = of_sample(terms, sizes, image)
    i = row + tl.arange(0, BLOCK_M)
    begin, end, at = query_visits(count_ptr, visit_strides, terms, image, row, sizes, CAUSAL, BLOCK_M)
    lse, low, live, real, flat = known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM, BLOCK_M)
    acc = tl.zeros([HEADS, BLOCK_M, CHUNK_V], tl.float32)
    for n in tl.range(begin, end, BLOCK_N if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        start = visited_tile(visit_ptr, at, n, BLOCK_N)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        p = tile_weights(s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        p = mixed_weights(p, s, mixtures, terms, term_strides, image, row, start, sizes,
                          AXES, FAR, CLIP, BLOCK_M, BLOCK_N)
        if terms[5] is not None:
            p = tl.where(keep_heads(stream(terms), image, i, start, threshold, BLOCK_N, sizes[1]), p * keep_scale, 0.0)
        j = start + tl.arange(0, BLOCK_N)
        inside = (tl.arange(0, HEADS) < heads)[:, None] & (j < sizes[2])[None, :]
        v = load_heads(v_ptr, v_strides, d_strides[2], image, j + sizes[9], inside, column, heads, WIDTH_V, CHUNK_V, GROUP, ALIGN)
        acc = tl.dot(p.to(v.dtype), clean(v).to(v.dtype), acc, input_precision="ieee")
        bad = tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0.0, 1.0)
        if tl.max(tl.max(tl.max(bad, 2), 1), 0) > 0.0:
            seen = tl.where(s == float("-inf"), 0.0, 1.0)
            if NORM >= ARGMAX_K and NORM <= ARGMAX_Q:
                seen = tl.where(p == 0.0, 0.0, 1.0)
            acc = tl.where(tl.dot(seen.to(tl.float16), bad.to(tl.float16)) > 0.0, float("nan"), acc)
    store_heads(out_ptr, flat, real, column, acc, WIDTH_V, CHUNK_V)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _head_means(
    q_ptr, k_ptr, lse_ptr, low_ptr, mean_ptr, visit_ptr, count_ptr, mixtures, terms, visit_strides, q_strides, k_strides,
    d_strides, term_strides, sizes, scale,
    NORM: tl.constexpr, AXES: tl.constexpr, RULE: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ALIGN: tl.constexpr, CLIP: tl.constexpr, ALIKE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums over the queries of query_weight times the weights before their mixture, of BLOCK_N keys of all heads of a sample.
    Grid: key tiles (fastest) x samples, on axis 0. Writes [B, Nk, H].
    Any strides: q, k and the terms. lse and low are contiguous."""
    heads = sizes[3]
    pid = tl.program_id(0)
    tiles = (sizes[2] + BLOCK_N - 1) // BLOCK_N
    start = pid % tiles * BLOCK_N
    image = pid // tiles
    sizes = of_sample(terms, sizes, image)
    mean = tl.zeros([HEADS, BLOCK_N], tl.float32)
    begin, end, at = key_visits(count_ptr, visit_strides, image, start, sizes, CAUSAL, BLOCK_M, BLOCK_N)
    for n in tl.range(begin, end, BLOCK_M if visit_ptr is None else 1, num_stages=1, disable_licm=True):
        row = visited_tile(visit_ptr, at, n, BLOCK_M)
        i = row + tl.arange(0, BLOCK_M)
        lse, low, live, real, flat = known_rows(lse_ptr, low_ptr, terms, image, i, sizes, NORM, BLOCK_M)
        a, x, y, s = mixed_scores(
            q_ptr, k_ptr, mixtures, terms, q_strides, k_strides, d_strides, term_strides, image, row, start, sizes, scale,
            AXES, RULE, FAR, CAUSAL, CLIP, GROUP, WIDTH, ALIGN, ALIKE, CHUNK, BLOCK_M, BLOCK_N)
        share = token_numbers(terms[15], term_strides, 36, image, i, sizes[1], sizes[8], heads)
        p = tile_weights(s, lse, low, lse_ptr, terms, image, row, start, sizes, NORM, BLOCK_M, BLOCK_N)
        mean += tl.sum(tl.where(real[:, :, None], p * share[:, :, None], 0.0), 1)
    j = start + tl.arange(0, BLOCK_N)
    flat, real = row_places(terms, image, j, sizes[2], sizes[9], heads)
    tl.store(mean_ptr + flat, mean, mask=real)


def heads_arguments(call: Call, others=(), dkey_mean=None) -> dict:
    """The arguments that the kernels of mixed heads share, by name, and how they run."""
    shared = arguments(call, others, dkey_mean)
    terms, strides = shared["terms"], shared["term_strides"]
    keys = shared["sizes"][2]
    del shared["WIDTHS"], shared["WIDTHS_V"]
    mixtures = [getattr(call, name) for name in MIXTURES]
    crowded = any(terms[n] is not None for n in CROWDED)
    made = shared | ({"maxnreg": 255} if crowded else {}) | {
        "mixtures": tuple(None if x is None else x.float().contiguous() for x in mixtures),
        "ALIKE": not any(strides[n] for n in (1, 5, 9)) and all(terms[n] is None for n in (8, 17, 20, 25, 29)),
        "WIDTH": call.q.shape[3], "CHUNK": columns(call.q.shape[3], call.q.element_size())[0],
        "CLIP": keys % TILE != 0 or terms[13] is not None, "BLOCK_M": TILE, "BLOCK_N": TILE,
        "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    return head_survivors(made | lists(made, made, together=True), call.topk)


def columns(width: int, itemsize: int) -> tuple[int, int]:
    """How many columns of a tensor a program holds, and how many programs hold all."""
    block = min(16 if itemsize == 4 else 32, power(width))
    return block, -(-width // block)


def without(shared: dict, *names: str) -> dict:
    return {name: x for name, x in shared.items() if name not in names}


def head_rows(call: Call, shared: dict) -> tuple[Tensor | None, Tensor | None]:
    """lse [B, Nq, H] of a softmax, and what it lacks in base 2; of hard choices what is chosen; None for other normalisers."""
    if call.normalizer in HARD:
        return head_choices(shared, call.normalizer == "argmax_q"), None
    if call.normalizer != "softmax":
        return None, None
    lse, low = (torch.empty(call.q.shape[:3], dtype=torch.float32, device=call.q.device) for _ in range(2))
    _head_rows[(programs(shared, 1),)](**without(shared, "NORM", *OF_VALUES), lse_ptr=lse, low_ptr=low)
    return lse, low


def programs(shared: dict, side: int) -> int:
    """One for every tile of queries (side 1) or keys (side 2) of a sample."""
    return shared["sizes"][0] * -(-shared["sizes"][side] // TILE)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and key_mean."""
    q, k, v = call.q, call.k, call.v
    batch, queries, heads, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=v.dtype, device=q.device)
    lse = torch.zeros((batch, queries, heads), dtype=torch.float32, device=q.device)
    counts = call.query_weight is not None
    key_mean = torch.zeros((batch, k.shape[1] if counts else 0, heads), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse, key_mean
    shared = heads_arguments(call)
    found, low = head_rows(call, shared)
    chunk, count = columns(v.shape[3], v.element_size())
    _heads_forward[(programs(shared, 1), count)](
        **shared, out_ptr=out, lse_ptr=found, low_ptr=low, WIDTH_V=v.shape[3], CHUNK_V=chunk)
    if key_mean.numel():
        shared |= lists(shared, shared, of_keys=True, together=True)
        _head_means[(programs(shared, 2),)](**without(shared, *OF_VALUES), lse_ptr=found, low_ptr=low, mean_ptr=key_mean)
    if call.normalizer == "argmax_q":
        found = None
    return out, lse if found is None else found.float(), key_mean
