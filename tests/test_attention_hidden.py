"""attention: masks in pairs, and what masks hide, under every kind of mask, in memory that is NaN all around."""

import math

import pytest
import torch
from hidden_cases import HIDING, KEYS, LEARNED, PAIRS, QUERIES, check, framed, hidden, learned, masks_of
from masked_systems import qkv

import vitkern
from vitkern import testing
from vitkern.bias import KeyBias
from vitkern.mask import Causal, Segments
from vitkern.testing.registry import Call


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_masks_in_a_list_are_their_intersection(pair):
    """The oracle takes the dense form of each; the same as one tensor."""
    masks, number = masks_of(pair), PAIRS.index(pair)
    tensors = qkv(QUERIES, KEYS, heads=4, kv=2)
    check("pair", tensors, lambda t: {"mask": masks}, (torch.float32, torch.bfloat16)[number % 2])
    q, k, v = tensors.values()
    both = torch.ones((), dtype=torch.bool)
    for m in masks:
        both = both & (m if isinstance(m, torch.Tensor) else m.dense(q, k))
    assert not both.all() and both.any()
    torch.testing.assert_close(vitkern.attention(q, k, v, mask=masks), vitkern.attention(q, k, v, mask=both))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", HIDING)
def test_nothing_around_the_inputs_nor_behind_a_mask_is_seen(kind, dtype):
    hidden(kind, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["segments", "causal", "tensor", "bias of keys"])
def test_packed_sequences_see_nothing_hidden_nor_of_each_other(kind, dtype):
    """A sequence of nothing but NaN between two others; a key that a mask hides from its own sequence."""
    lengths = ((7, 9), (5, 5), (1, 33), (6, 2))
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths, strict=True)]
    tensors = {n: t[0] for n, t in qkv(19, 49, heads=4, kv=2, batch=1).items()}
    q_ids, k_ids = torch.zeros(1, 19, dtype=torch.long), torch.zeros(1, 49, dtype=torch.long)
    k_ids[:, [8, 9, 10, 11, 12, 13, 20, 46]] = -1  # the last of the first, all of the second, two more
    never = k_ids[0] < 0
    seen = torch.ones(7, 33, dtype=torch.bool)
    if kind in ("causal", "tensor"):
        seen = seen.tril(1) if kind == "causal" else torch.arange(33).expand(7, 33) < 2
        never = torch.cat([~seen[:n, :m].any(0) for n, m in lengths])
    tensors["low"] = torch.zeros(1, 1, 49, dtype=torch.float64).masked_fill(never, -math.inf)
    tensors["k"][never], tensors["v"][never] = math.nan, math.inf
    assert never.any() and not never.all()

    def build(t):
        t = {n: framed(x) for n, x in t.items()}
        masks = {"segments": Segments(q_ids, k_ids), "causal": Causal(1), "tensor": seen}
        options = {"bias": KeyBias(t["low"])} if kind == "bias of keys" else {"mask": masks[kind]}
        return (t["q"], t["k"], t["v"], *bounds, 7, 33), options | {"return_stats": ("lse",)}

    call = Call(kind, vitkern.attention_varlen, build, tensors, frozenset({"low"}), seed=3)
    testing.assert_matches(testing.entries()["attention_varlen"], call, dtype, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", LEARNED)
def test_nothing_hidden_reaches_the_gradient_of_what_learns(kind, backend):
    learned(kind, backend)
