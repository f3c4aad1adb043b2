"""attention: key_index, the keys that each query names: a map of how often it does."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops._attention_definition import padded


def named_keys(index: Tensor, q: Tensor, keys: int) -> Tensor:
    """How often each query names each key, [B|1, 1, Nq, Nk]; index [B|1, Nq, K], -1 names none."""
    places = torch.where(index < 0, keys, index.clamp(max=keys)).long()
    acc = torch.promote_types(q.dtype, torch.float32)
    found = q.new_zeros((len(index), q.shape[1], keys + 1), dtype=acc)
    return found.scatter_add(2, places, found.new_ones(()).expand(places.shape))[:, None, :, :keys]


def batch_of_named(found: dict[str, Any], index: Tensor, more: int) -> dict[str, Any]:
    """The arguments of packed sequences as those of a padded batch, whose queries see the keys that index [Tq, K] names among those
    of their sequence, and the `more` further ones in front of these."""
    batch, places = padded(found)
    sequences, most = batch["q"].shape[:2]
    of_batch = index.new_full((sequences * most, index.shape[1]), -1).index_copy(0, places["q"], index)
    named = named_keys(of_batch.unflatten(0, (sequences, most)), batch["q"], found["max_k"] - more)
    named = torch.nn.functional.pad(named, (more, 0), value=1.0)  # [S, 1, max_q, max_k]
    name, added, join = {"softmax": ("bias", named.log(), torch.add)}.get(
        found["normalizer"], ("weight", named, torch.mul)
    )
    batch["mask"] = batch["mask"] & (named > 0)
    if not found["normalizer"].startswith("argmax"):
        batch[name] = added if batch[name] is None else join(batch[name].to(added.dtype), added)
    return batch
