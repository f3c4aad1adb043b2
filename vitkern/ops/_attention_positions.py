"""attention: ContextualPosition as products of queries and keys with its tables, in place of maps of scores."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.bias import ContextualPosition, finite


def chosen(biases: tuple[Any, ...]) -> ContextualPosition | None:
    """The one that has the slots: the first with a table of values, else the first with any."""
    found = [
        b for b in biases if isinstance(b, ContextualPosition) and (b.q_table, b.k_table, b.v_table) != (None,) * 3
    ]
    return next((b for b in found if b.v_table is not None), found[0] if found else None)


def place(
    found: dict[str, Any], b: ContextualPosition, q: Tensor, k: Tensor, values: bool, more: int, packed: bool
) -> None:
    """Fills the slots. `values`: whether there are any; `more`: further keys, which have a row of zeros, in front of the own ones
    of packed sequences."""
    heads, acc = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    rows = min([t.shape[0] for t in (b.q_table, b.k_table, b.v_table) if t is not None])
    tables = {
        name: None if t is None else t[:rows] for name, t in (("q", b.q_table), ("k", b.k_table), ("v", b.v_table))
    }
    index, keys = b.index.to(torch.int32), k.repeat_interleave(heads // k.shape[2], 2)
    if more:
        index = F.pad(index, (more, 0) if packed else (0, more), value=rows)
        keys = F.pad(keys, (0, 0, 0, 0, 0, more))
        tables = {name: t if t is None else F.pad(t, (0, 0, 0, 0, 0, 1)) for name, t in tables.items()}
    found["position_index"] = index[(None,) * (3 - index.dim())]
    for name, x in (("q", q), ("k", keys)):
        own = tables[name]
        if own is not None:
            table = own.to(acc).expand(-1, heads, -1)
            found[f"position_{name}"] = torch.einsum("bihd,nhd->bihn", finite(x.to(acc), table.requires_grad), table)
    if tables["v"] is not None and values:
        found["position_v"] = tables["v"].transpose(0, 1)[None]  # [1, H|1, n, Dv]


def dense(found: dict[str, Any]) -> list[Any]:
    """What the slots stand for: a map of scores, and a table of values."""
    index, of_queries, of_keys, values = (found[f"position_{name}"] for name in ("index", "q", "k", "v"))
    if index is None:
        return []
    parts: list[Any] = []
    batch, heads = found["q"].shape[0], found["q"].shape[2]
    at = index.long()[:, None].expand(batch, heads, -1, -1)  # [B, H, Nq, Nk]
    if of_queries is not None:
        parts.append(of_queries.transpose(1, 2).gather(3, at))
    if of_keys is not None:
        parts.append(of_keys.transpose(1, 2).gather(3, at.mT).mT)
    if values is not None:
        parts.append(ContextualPosition(None, None, values[0].transpose(0, 1), index))
    return parts
