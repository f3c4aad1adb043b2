"""attention: the arguments of the op and its definition on them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import DecomposedRelativePosition, EuclideanDistance, PolylinePath
from vitkern.mask import BlockCausal, Causal, Segments, unpacked
from vitkern.modulation import ElementwiseMask, Policy, SoftCausal, TalkingHeads
from vitkern.ops import _attention_positions as positions
from vitkern.ops import _attention_tables as tables
from vitkern.reference.attention import attention as reference
from vitkern.stats import Stats

# A schema of PyTorch has at most 64 arguments, the backward of these 63: rel_y and rel_x are rows of every query, or tables.
TENSORS = (
    "q", "k", "v", "bias", "key_bias", "mask", "factor", "sink", "seed", "gain", "weight", "rel_y", "rel_x", "path_row",
    "path_col", "slope", "q_xy", "k_xy", "q_ids", "k_ids", "allow", "query_weight", "cu_q", "cu_k", "pre_weight",
    "pre_bias", "post_weight", "post_bias", "policy", "bias_table", "gain_table", "weight_table",
    "later_ratio", "position_index", "position_q", "position_k", "position_v", "early_gain",
    "early_weight",
)  # fmt: skip
OPTIONS = (
    "normalizer", "scale", "causal", "offset", "dropout_p", "topk", "rule", "path_width", "path_transposed", "max_q", "max_k",
    "policy_eps", "policy_diagonal", "grid_height", "grid_width", "grid_prefix", "grid_step",
)  # fmt: skip
WHOLE = ("mask", "seed", "q_ids", "k_ids", "allow", "cu_q", "cu_k", "position_index")  # of no gradient
REPEATED = {"bias": 4, "gain": 2, "weight": 2, "early_gain": 2, "early_weight": 2}  # kernels sum over these first axes
OF_TOKENS = {  # what packed sequences have packed
    "q": ("q", "rel_y", "rel_x", "q_xy", "q_ids", "query_weight", "position_q"),
    "k": ("k", "v", "k_xy", "k_ids", "key_bias", "policy", "position_k"),
}
MIXTURES = ("pre_weight", "pre_bias", "post_weight", "post_bias")


def definition(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``out [B, Nq, H, Dv]``; ``lse [B, Nq, H]``, of argmax_k the chosen key or -1, else 0 but for softmax; ``key_mean
    [B, Nk, H]``, the weights of each key times query_weight, of length 0 without. The arguments are TENSORS, OPTIONS and the
    back-end of a GPU."""
    found = dict(zip((*TENSORS, *OPTIONS), args, strict=False))
    if found["cu_q"] is None:
        return _one(found)
    batch, places = padded(found)
    out, lse, key_mean = _one(batch)
    key_mean = key_mean.flatten(0, 1)
    if found["query_weight"] is not None:
        key_mean = key_mean[places["k"]]
    return out.flatten(0, 1)[places["q"]][None], lse.flatten(0, 1)[places["q"]][None], key_mean[None]


def _empty(q: Tensor, v: Tensor, query_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(q.dtype, torch.float32)
    keys = v.shape[1] if query_weight is not None else 0
    return (
        v.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty(q.shape[:3], dtype=acc),
        q.new_empty((q.shape[0], keys, q.shape[2]), dtype=acc),
    )


def fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, v, rest[TENSORS.index("query_weight") - 3])


def padded(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of packed sequences as a batch of padded ones, and where the tokens of q and k lie in it."""
    one, places, real, counts = dict(found), {}, {}, {}
    for side, names in OF_TOKENS.items():
        cu, tokens, longest = found[f"cu_{side}"].long(), found[side].shape[1], found[f"max_{side}"]
        first, length = cu[:-1, None], cu.diff()[:, None]  # [S, 1]
        i = torch.arange(longest, device=cu.device)
        real[side] = i < length  # [S, max]
        index = torch.where(real[side], first + i, tokens)  # of the blank behind the last token
        places[side] = places_in_batch(cu, tokens, longest)
        for name in names:
            t = found[name]
            if t is not None:
                axis = 3 if name == "key_bias" else 1
                blank = t.new_zeros((*t.shape[:axis], 1, *t.shape[axis + 1 :]))
                t = torch.cat((t, blank), axis).squeeze(0)
                one[name] = t.movedim(axis - 1, 0)[index]  # [S, max, ...]
                if name == "key_bias":
                    one[name] = one[name].permute(0, 2, 3, 1)
        counts[side] = length[:, 0]
    if found["policy"] is not None:
        one["policy_keys"] = counts["k"]
    inside = real["q"][:, None, :, None] & real["k"][:, None, None, :]
    one["mask"] = inside if found["mask"] is None else found["mask"] & inside
    return one | {"cu_q": None, "cu_k": None}, places


def batch_of_alike(found: dict[str, Any]) -> dict[str, Any]:
    """The arguments of packed sequences of max_q tokens each as a batch of them."""
    one, longest = dict(found), found["max_q"]
    samples = found["q"].shape[1] // max(1, longest)
    for name in (name for names in OF_TOKENS.values() for name in names if found[name] is not None):
        axis = 3 if name == "key_bias" else 1
        t = found[name].squeeze(0).unflatten(axis - 1, (samples, longest))
        one[name] = t.movedim(axis - 1, 0)
    return one | {"cu_q": None, "cu_k": None, "max_q": 0, "max_k": 0}


def places_in_batch(cu: Tensor, tokens: int, longest: int) -> Tensor:
    """Where each token of packed sequences lies in a padded batch, whose samples lie one behind the other."""
    token = torch.arange(tokens, device=cu.device)
    s = torch.bucketize(token, cu[1:], right=True)
    return s * longest + token - cu[s]


def places_inside(cu: Tensor, tokens: int) -> Tensor:
    """Where each token of packed sequences lies in its own one."""
    token = torch.arange(tokens, device=cu.device)
    return token - cu[torch.bucketize(token, cu[1:], right=True).clamp(max=len(cu) - 2)]


def path_of(found: dict[str, Any]) -> PolylinePath:
    row, col = (found[name].unflatten(1, (-1, found["path_width"])) for name in ("path_row", "path_col"))
    return PolylinePath(row, col, found["path_transposed"])


def axes_of(found: dict[str, Any]) -> DecomposedRelativePosition:
    """Of tables in the slots of what each query adds."""
    grid = (found["grid_height"], found["grid_width"])
    return DecomposedRelativePosition(found["rel_y"], found["rel_x"], grid, grid)


def visible(found: dict[str, Any]) -> Tensor:
    """The mask in its slot as one of bool."""
    seen: Tensor = found["mask"]
    return seen if seen.dtype == torch.bool else unpacked(seen, found["k"].shape[1])


def _one(found: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    stats = {"softmax": ("lse",), "argmax_k": ("index",)}.get(found["normalizer"], ())
    weight = found["query_weight"]
    out, stat = dense_call(found, stats if weight is None else (*stats, "probs"))
    _, lse, key_mean = _empty(found["q"], found["v"], weight)
    if stat.lse is not None:
        lse = stat.lse.contiguous()
    elif stat.index is not None:
        lse = stat.index.to(lse.dtype)
    else:
        lse.zero_()
    if weight is not None:
        key_mean = torch.einsum("bih,bhij->bjh", weight.to(lse.dtype), stat.probs)
    assert out is not None
    return out, lse, key_mean.contiguous()


@dataclass(frozen=True, eq=False)
class PolicyOfSome(Policy):
    """Of some of the queries, whose places among the keys are `rows`; of samples with so many `keys` each, [B]."""

    rows: Tensor | None = None
    keys: Tensor | None = None

    def _diagonal(self, e: Tensor) -> Tensor:
        if self.rows is None:
            return super()._diagonal(e)
        return (self.rows[:, None] == torch.arange(e.shape[3], device=e.device)).to(e.dtype)

    def _share(self, e: Tensor) -> float | Tensor:
        return (
            super()._share(e)
            if self.keys is None
            else self.eps / self.keys.clamp(min=1).to(e.dtype)[:, None, None, None]
        )


def dense_call(found: dict[str, Any], stats: tuple[str, ...]) -> tuple[Tensor | None, Stats]:
    """The reference on slots, those of the typed modifiers in their dense form."""
    q, k, v = (found[name] for name in "qkv")
    biases = [found[name] for name in ("bias", "key_bias") if found[name] is not None]
    if found["rel_y"] is not None and found["rel_y"].dim() == 2:
        biases.append(axes_of(found))
    elif found["rel_y"] is not None:
        rows, columns = found["rel_y"], found["rel_x"]
        biases.append(DecomposedRelativePosition(rows, columns, None, (0, 0)).dense(q, k)[..., : k.shape[1]])
    if found["path_row"] is not None:
        biases.append(path_of(found))
    if found["slope"] is not None:
        biases.append(EuclideanDistance(found["slope"], found["q_xy"], found["k_xy"]))
    if found["bias_table"] is not None:
        biases.append(tables.dense(found, "bias_table"))
    biases += positions.dense(found)
    masks: list[Any] = [visible(found)] if found["mask"] is not None else []
    if found["causal"]:
        masks.append(Causal(found["offset"]))
    if found["rule"] == "upto":
        masks.append(BlockCausal(found["q_ids"], found["k_ids"]))
    elif found["rule"] != "none":
        masks.append(Segments(found["q_ids"], found["k_ids"], found["allow"]))
    places = (("gain", "logit"), ("weight", "prob"))
    factors: tuple[Any, ...] = tuple(
        ElementwiseMask(found[name], place) for name, place in places if found[name] is not None
    )
    if any(found[name] is not None for name in MIXTURES):
        early = (
            ElementwiseMask(found[f"early_{name}"], place)
            for name, place in places
            if found[f"early_{name}"] is not None
        )
        factors = (*early, TalkingHeads(*(found[name] for name in MIXTURES)), *factors)
    if found["later_ratio"] is not None:
        factors = (*factors, SoftCausal(found["later_ratio"]))
    factors += tuple(
        ElementwiseMask(tables.dense(found, f"{name}_table"), place)
        for name, place in places
        if found[f"{name}_table"] is not None
    )
    if found["policy"] is not None:
        policy = found["policy"], found["policy_eps"], found["policy_diagonal"]
        factors = (*factors, PolicyOfSome(*policy, found.get("policy_rows"), found.get("policy_keys")))
    scale = found["scale"] if found["factor"] is None else found["factor"]
    return reference(
        q, k, v, tuple(biases), tuple(masks), factors, found["normalizer"], None, None, scale, found["sink"], None,
        found["seed"], found["dropout_p"], found["topk"] or None, stats,
    )  # fmt: skip
