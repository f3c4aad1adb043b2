"""attention: the statistics that need no kernel, or make something of what a kernel returns."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern._constants import constant
from vitkern.ops import _attention_tables as tables
from vitkern.ops import _sharded
from vitkern.ops._attention_definition import axes_of, dense_call, padded, path_of, visible
from vitkern.ops._attention_slots import joined


def rows_of(found: dict[str, Any], rows: tuple[int, ...]) -> Tensor:
    """The weights of some queries, [B, H, R, Nk]; of packed sequences [1, S, R, H, max_k], from a padded batch."""
    if found["cu_q"] is not None:
        return rows_of(padded(found)[0], rows).transpose(1, 2)[None]
    count, keys = found["q"].shape[1], found["k"].shape[1]
    numbers = [i % count for i in rows]
    chosen = _sharded.like(constant(numbers, found["q"].device), found["q"])  # [R]
    if found["rel_y"] is not None and found["rel_y"].dim() == 2:
        by_row, by_column = axes_of(found).per_query(found["q"])
        found = found | {"rel_y": by_row, "rel_x": by_column}
    some = dict(found)
    for name in ("q", "rel_y", "rel_x", "q_xy", "q_ids", "position_index", "position_q"):
        some[name] = None if found[name] is None else found[name][:, chosen]
    for name in ("bias", "mask", "gain", "early_gain"):
        t = found[name]
        some[name] = t if t is None or t.shape[2] == 1 else t[:, :, chosen]
    if found["causal"]:
        past = torch.arange(keys, device=chosen.device) <= chosen[:, None] + found["offset"]  # [R, Nk]
        some |= {"causal": False, "mask": past[None, None] if some["mask"] is None else visible(some) & past}
    if found["path_row"] is not None:
        path = path_of(found).of_queries(numbers)
        some |= {"path_row": None, "bias": path if some["bias"] is None else some["bias"] + path}
    for name in ("bias", "gain"):
        if found[f"{name}_table"] is not None:
            of_offsets = tables.dense(found, f"{name}_table")[:, :, chosen]
            both = [t for t in (some[name], of_offsets) if t is not None]
            some |= {f"{name}_table": None, name: joined(both, torch.add if name == "bias" else torch.mul)}
    of_weights = ("weight", "weight_table", "early_weight", "later_ratio", "position_v", "query_weight")
    some |= dict.fromkeys(of_weights) | {"dropout_p": 0.0, "policy_rows": chosen}
    probs = dense_call(some, ("probs",))[1].probs
    assert probs is not None
    return probs


def rows_of_winners(winners: Tensor, found: dict[str, Any], rows: tuple[int, ...]) -> Tensor:
    """rows_of argmax_q, from the place from 1 on of the query that each key goes to, [B, Nk, H]: a constant of the scores."""
    cu = found["cu_k"]
    count = found["q"].shape[1] if cu is None else found["max_q"]
    if cu is not None:
        first, length = cu[:-1, None], cu.diff()[:, None]  # [S, 1]
        j = torch.arange(found["max_k"], device=cu.device)
        places = torch.where(j < length, first + j, winners.shape[1])  # [S, max_k], of the blank behind the last key
        winners = torch.cat((winners, torch.zeros_like(winners[:, :1])), 1)[0][places]
    weights = torch.stack([(winners == i % count + 1).to(winners.dtype) for i in rows], 1)  # [B, R, Nk, H]
    return weights.permute(0, 3, 1, 2) if cu is None else weights.transpose(2, 3)[None]


def mean_logits(found: dict[str, Any]) -> Tensor:
    """The head mean of the scaled products, [B, Nq, Nk]: one product of the concatenated heads."""
    q, k, factor = found["q"], found["k"], found["factor"]
    acc = torch.promote_types(q.dtype, torch.float32)
    a, b = (t.to(acc).masked_fill(~t.isfinite().all(-1, keepdim=True), 0.0) for t in (q, k))
    a = a * (found["scale"] if factor is None else _sharded.like(factor, q).to(acc)[:, None]) / q.shape[2]
    mean = a.flatten(2) @ b.repeat_interleave(q.shape[2] // k.shape[2], 2).flatten(2).mT
    whole = [t.isfinite().flatten(2).all(-1) for t in (q, k)]  # [B, N]: a head that is NaN makes the mean so
    return mean.masked_fill(~(whole[0][:, :, None] & whole[1][:, None]), math.nan)
