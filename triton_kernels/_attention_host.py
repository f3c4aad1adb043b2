"""What both launch functions of attention do on the host: limits, strides, configuration."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._host import DTYPES, config, device_reasons, family, power, stream

MAX_WIDTH = 256                         # D and Dv
MAX_TOKENS = 2**30                      # of a sample: kernels count them in 32 bits
MAX_BLOCK = 128                         # queries, keys or columns in a tile
RULES = ("none", "equal", "table", "upto")                  # RULE
NORMALIZERS = ("softmax", "sigmoid", "relu", "none", "argmax_k", "argmax_q", "policy")  # their places are NORM in the kernels
HARD = ("argmax_k", "argmax_q")


class Call(NamedTuple):
    """The arguments of the op, whose meaning is that of vitkern/ops/_attention_definition.py, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_bias: Tensor | None
    mask: Tensor | None
    factor: Tensor | None
    sink: Tensor | None
    seed: Tensor | None
    gain: Tensor | None
    weight: Tensor | None
    rel_y: Tensor | None
    rel_x: Tensor | None
    path_row: Tensor | None
    path_col: Tensor | None
    slope: Tensor | None
    q_xy: Tensor | None
    k_xy: Tensor | None
    q_ids: Tensor | None
    k_ids: Tensor | None
    allow: Tensor | None
    query_weight: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    post_weight: Tensor | None
    post_bias: Tensor | None
    policy: Tensor | None
    bias_table: Tensor | None
    gain_table: Tensor | None
    weight_table: Tensor | None
    later_ratio: Tensor | None
    position_index: Tensor | None
    position_q: Tensor | None
    position_k: Tensor | None
    position_v: Tensor | None
    early_gain: Tensor | None
    early_weight: Tensor | None
    normalizer: str
    scale: float
    causal: bool
    offset: int
    dropout_p: float
    topk: int
    rule: str
    path_width: int
    path_transposed: bool
    max_q: int
    max_k: int
    policy_eps: float
    policy_diagonal: bool
    grid_height: int
    grid_width: int
    grid_prefix: int
    grid_step: int


DIFFERENTIABLE = (
    "q", "k", "v", "bias", "key_bias", "factor", "sink", "gain", "weight", "rel_y", "rel_x", "path_row", "path_col", "slope",
    "q_xy", "k_xy", "query_weight", "pre_weight", "pre_bias", "post_weight", "post_bias", "policy",
    "bias_table", "gain_table", "weight_table", "later_ratio", "position_q", "position_k", "position_v", "early_gain",
    "early_weight",
)  # fmt: skip
MIXTURES = ("pre_weight", "pre_bias", "post_weight", "post_bias")
MIXED_HEADS = 16
TABLES = ("bias_table", "gain_table", "weight_table")
BESIDE_MIXTURES = ("policy", "later_ratio", "position_v")    # what no kernel has together with them
PADDED_MIXTURES = ("path_row",)                             # and of packed sequences


def mixes(call: Call) -> bool:
    """Whether heads mix."""
    return any(getattr(call, name) is not None for name in MIXTURES)


def reasons(call: Call, interpreted: bool) -> list[str]:
    """Why the kernels cannot run these arguments, one sentence each; empty if they can."""
    q, k, v = call.q, call.k, call.v
    why = device_reasons("q", q, interpreted)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        why.append(f"q, k and v must share float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, width in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if not 1 <= width <= MAX_WIDTH:
            why.append(f"{name} must lie in 1..{MAX_WIDTH}, got {width}")
    for name, tokens in (("queries", q.shape[1]), ("keys", k.shape[1])):
        if tokens >= MAX_TOKENS:
            why.append(f"a sample may hold fewer than 2^30 {name}, got {tokens}")
    if mixes(call):
        if q.shape[2] > MIXED_HEADS:
            why.append(f"modulation.TalkingHeads has a Triton kernel of at most {MIXED_HEADS} heads, got {q.shape[2]}")
        names = BESIDE_MIXTURES if call.cu_q is None else (*BESIDE_MIXTURES, *PADDED_MIXTURES)
        beside = [name for name in names if getattr(call, name) is not None]
        why += [f"modulation.TalkingHeads has no Triton kernel together with {name}" for name in beside]
    if call.position_index is not None and call.cu_q is not None:
        why.append("bias.ContextualPosition has no kernel of packed sequences")
    if not 0.0 <= call.dropout_p < 1.0:
        why.append(f"dropout_p must lie in [0, 1), got {call.dropout_p}")
    if call.rel_y is not None and call.rel_y.dim() == 2:
        why.append("no Triton kernel multiplies tables of decomposed positions")
    return why


def widths(d: int) -> tuple[int, int, int]:
    """(d, its blocks): one power of two up to 128, or two where they are narrower together."""
    whole = power(d)
    if whole > 16:
        rest = power(d - whole // 2)
        if rest < whole // 2 or whole > MAX_BLOCK:
            return d, whole // 2, rest
    return d, whole, 0


def row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(batch, token, head) of [B, N, H, D] or [B, N, H]; axes of length 1 count as stride 0."""
    if x is None:
        return 0, 0, 0
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False))


def score_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    return (0,) * 4 if x is None else tuple(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))


def alignment(maps: list[Tensor]) -> int:
    """The largest of 8, 4, 2, 1 that divides the row strides of all maps, whose last strides must then be 1."""
    unit = all(x.stride(-1) == 1 for x in maps)
    return math.gcd(8, *(s for x in maps for s in row_strides(x))) if unit else 1


def arguments(call: Call, others=(), dkey_mean=None) -> dict:
    """The arguments that all kernels share, by name; `others` are further maps whose strides count for ALIGN."""
    q, k, v, bias, key_bias, mask, factor, sink, seed = call[:9]
    batch, queries, heads = q.shape[:3]
    keys = k.shape[1]
    total = batch * queries, batch * keys
    if call.cu_q is not None:
        batch, queries, keys = len(call.cu_q) - 1, call.max_q, call.max_k
    drawn = stream(seed if call.dropout_p > 0.0 else None)
    terms = [score_strides(x) for x in (bias, key_bias, mask, call.gain, call.weight, call.early_gain, call.early_weight)]
    relative = [(0,) * 4 if x is None else score_strides(x) for x in (call.rel_y, call.rel_x)]  # (batch, query, head, side)
    ids = [(0, 0) if x is None else score_strides(x) for x in (call.q_ids, call.k_ids, call.allow)]
    tokens = [row_strides(x) for x in (call.query_weight, dkey_mean)]
    spots = [(0, 0, 0) if x is None else (*row_strides(x)[:2], x.stride(2)) for x in (call.q_xy, call.k_xy)]
    path = () if call.path_row is None else tuple(
        x.float().unflatten(1, (-1, call.path_width)).cumsum(axis).flatten(1, 2)
        for x, axis in ((call.path_row, 2), (call.path_col, 1)))
    far = keys * heads >= 2**31 or any(
        MAX_BLOCK * (abs(s[2]) + abs(s[3])) >= 2**31 for s in (*terms, *((*s[:2], s[1], s[3]) for s in relative)))
    by_offset = [getattr(call, name) for name in TABLES]
    grid = call.grid_height, call.grid_width, call.grid_prefix
    step = max(1, call.grid_step)
    positions = call.position_index, call.position_q, call.position_k
    tables = (call.position_q, 3), (call.position_k, 3), (call.position_v, 2)
    rows = next((x.shape[axis] for x, axis in tables if x is not None), 0)
    parameters = tuple(0 if x is None or heads == 1 else x.stride(0) for x in (factor, sink, call.slope))
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "terms": (bias, key_bias, mask if mask is None or mask.dtype == torch.int32 else mask.view(torch.int8), factor, sink,
                  drawn[0], call.gain, call.weight, call.rel_y, call.rel_x,
                  call.q_ids, call.k_ids, None if call.allow is None else call.allow.view(torch.int8),
                  call.cu_q, call.cu_k, call.query_weight, dkey_mean, call.slope, call.q_xy, call.k_xy, *(path or (None, None)),
                  call.policy, None if call.policy is None else call.policy_eps, None,
                  *by_offset, call.later_ratio, *positions, None, call.early_gain, call.early_weight,
                  *drawn[1:]),
        "q_strides": row_strides(q), "k_strides": row_strides(k), "v_strides": row_strides(v),
        "d_strides": (q.stride(-1), k.stride(-1), v.stride(-1)),
        "term_strides": (*terms[0], *terms[1], *terms[2], *parameters[:2], *terms[3], *terms[4], *relative[0], *relative[1],
                         *(s for x in (*ids, *tokens) for s in x), parameters[2], *spots[0], *spots[1],
                         *(row_strides(path[0]) if path else (0, 0, 0)), *score_strides(call.policy)[:2],
                         *(s for x in by_offset for s in score_strides(x)[1::2]),
                         *(score_strides(positions[0])[:3]), *(s for x in positions[1:] for s in score_strides(x)), *[0] * 4,
                         *terms[5], *terms[6]),
        "sizes": (batch, queries, keys, heads, max(-queries, min(call.offset, keys)) if call.causal else 0,
                  1 if call.rel_x is None else call.rel_x.shape[3],
                  *((1, 1) if call.allow is None else call.allow.shape), *total, call.path_width, int(call.path_transposed),
                  int(call.policy_diagonal), 0, *grid, -(-call.grid_width // step), step, rows),
        "scale": float(call.scale),
        "threshold": math.ceil(call.dropout_p * 2.0**32), "keep_scale": 1.0 / (1.0 - call.dropout_p),
        "NORM": NORMALIZERS.index("policy" if call.policy is not None else call.normalizer),
        "AXES": tuple((s[2] != 0, s[3] != 0) for s in terms),
        "RULE": RULES.index(call.rule), "FAR": far, "CAUSAL": bool(call.causal), "GROUP": heads // k.shape[2],
        "WIDTHS": widths(q.shape[-1]), "WIDTHS_V": widths(v.shape[-1]), "ALIGN": alignment([q, k, v, *others]),
    }  # fmt: skip


def row(kernel: str, shared: dict) -> dict:
    """The row of a kernel's table for these arguments. Dropout, two score-shaped terms, or positions hold as many registers as
    heads of twice the width, four terms, distances and paths as heads of four times, more than eight as heads of eight times."""
    q, keys = shared["q_ptr"], shared["sizes"][2]
    terms = shared["terms"]                                 # bias, mask, seed, gain, weight, rel_y, q_ids, dkey_mean, tables
    many = sum(terms[n] is not None for n in (0, 2, 5, 6, 7, 8, 10, 16, 25, 26, 27))
    many += 4 * (terms[17] is not None or terms[20] is not None)  # slope, path
    many += 2 * (terms[29] is not None)  # their rows, and what is looked up
    many += any(terms[n] is not None for n in (25, 26, 27))  # the tile of their entries
    many += terms[36] is not None  # the places of dropout
    width = max(sum(shared[x][1:]) for x in ("WIDTHS", "WIDTHS_V"))
    width *= 8 if many > 8 else 4 if many > 3 else 2 if many > 1 or terms[5] is not None else 1
    return config("attention", family(q.device), kernel, keys, width, q.element_size())


def tuned(kernel: str, shared: dict) -> dict:
    """How a kernel runs these arguments: blocks, warps, stages, and whether the last block of keys is not full."""
    found = row(kernel, shared)
    queries, keys = shared["sizes"][1:3]
    block_n = min(found["block_n"], power(keys))
    return {
        "BLOCK_M": min(found["block_m"], power(queries)), "BLOCK_N": block_n,
        "CLIP": keys % block_n != 0 or shared["terms"][13] is not None,
        "STAGES": found["stages"], "num_warps": found["warps"], "num_stages": found["stages"], "enable_fp_fusion": True,
    }  # fmt: skip


def shares(shared: dict, count: int, tiles: int) -> int:
    """In how many parts the `tiles` that each of `count` programs visits are shared out: of four tiles at least."""
    return 1 if shared["CAUSAL"] else max(1, min(row("forward", shared)["programs"] // count, tiles // 4))


def programs(shared: dict, tiles: int) -> int:
    """One per head, sample or packed sequence, and tile of the greatest."""
    return shared["sizes"][0] * shared["sizes"][3] * tiles


def summed(term: Tensor | None, over: str | None) -> bool:
    """Whether a term's gradient sums over the "keys" of every query, over the "queries" of every key, or over neither (None)."""
    return term is not None and over == ("keys" if term.shape[3] == 1 else "queries" if term.shape[2] == 1 else None)


def of_samples(x: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Packed tokens [1, N, C] as samples [samples, longest, C], 0 past the end of each."""
    total, first = x.shape[1], cu[:-1, None].clamp(min=0)
    place = torch.arange(longest, device=cu.device)
    inside = place < (cu[1:, None].clamp(max=total) - first).clamp(max=longest)            # [samples, longest]
    return torch.where(inside[..., None], x[0][(first + place).clamp(max=total - 1)], 0.0)


def packed(x: Tensor, cu: Tensor, tokens: int) -> Tensor:
    """Samples [samples, longest, ...] as packed tokens [1, N, ...], 0 where a token is of no sample."""
    token = torch.arange(tokens, device=cu.device, dtype=cu.dtype)
    sample = (torch.searchsorted(cu, token, right=True) - 1).clamp(0, len(x) - 1)
    place = token - cu[sample]
    inside = (place >= 0) & (place < x.shape[1]) & (token < cu[sample + 1])
    found = x[sample, place.clamp(0, x.shape[1] - 1)]
    return found.masked_fill(~inside.view(-1, *[1] * (x.dim() - 2)), 0.0)[None]


def of_tokens(call: Call, sums: Tensor, like: Tensor) -> Tensor:
    """The gradient of a bias or factor from sums over the keys of every query, or over the queries of every key, [B, N, H]."""
    by_keys = summed(like, "queries")
    if call.cu_q is not None:                               # a term has places in a sample
        sums = of_samples(sums, *((call.cu_k, call.max_k) if by_keys else (call.cu_q, call.max_q)))
    sums = sums.transpose(1, 2)
    return folded(sums[:, :, None] if by_keys else sums[..., None], like)


def folded(sums: Tensor, like: Tensor) -> Tensor:
    """Sums over the axes that `like` does not have, in float32, rounded once to its dtype."""
    return sums.sum_to_size(like.shape).to(like.dtype)


UNSPECIALIZED = (
    "q_strides", "k_strides", "v_strides", "dout_strides", "dlse_strides", "dq_strides", "dk_strides", "dv_strides",
    "sizes", "threshold", "members", "chunks", "sides", "visit_strides", "seen_strides", "parts",
)  # fmt: skip
