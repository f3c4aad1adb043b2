"""attention: masks in pairs, and what masks hide, under every kind of mask, in memory that is NaN all around."""

import math

import pytest
import torch
from hidden_cases import (
    HEADS_HIDE,
    HIDING,
    KEYS,
    LEARNED,
    PAIRS,
    QUERIES,
    check,
    framed,
    hidden,
    learned,
    masks_of,
    mixed_in_front,
    seen_in_front,
)
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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("place", ["logit", "prob"])
@pytest.mark.parametrize("kind", HEADS_HIDE)
def test_no_factor_that_a_head_hides_reaches_the_others(kind, place, backend):
    mixed_in_front(kind, place, backend)


@pytest.mark.parametrize("place", ["logit", "prob"])
def test_a_factor_that_a_head_sees_reaches_the_others(place):
    seen_in_front(place, "cpu")


def seen_in_runs():
    """[1, 3, 70, 90]: all heads together see three runs of keys, the last of them by one query of each block of 64."""
    seen = torch.zeros(1, 3, 70, 90, dtype=torch.bool)
    seen[:, 0, :, :30] = seen[:, 1, :40, 50:60] = True
    seen[:, 2, [63, 69], 66:74] = seen[:, 2, ::3, :12] = True
    return seen


@pytest.mark.parametrize("kind", ["finite", "keys", "queries", "factors"])
@pytest.mark.parametrize("places", ["scores", "weights", "both"])
def test_heads_that_mix_see_runs_of_keys(kind, places):
    """What is not finite in a seen run, between runs, in a query, or in a factor of what is hidden."""
    seen = seen_in_runs()
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, 3, 8, generator=g, dtype=torch.float64) for n in (70, 90, 90))
    mixtures = [torch.randn(*n, generator=g, dtype=torch.float64) for n in ((3, 3), (3,)) * 2]
    gain = torch.randn(1, 3, 70, 90, generator=g, dtype=torch.float64)
    if kind == "keys":
        k[0, [7, 40, 55, 70], 1] = k[0, 9, 0] = k[0, 80] = v[0, 44] = math.nan
    if kind == "queries":
        q[0, [5, 69], 0] = math.inf
    if kind == "factors":
        gain = gain.masked_fill(~seen.any(1, keepdim=True), math.nan)
    wanted = [t.requires_grad_() for t in (q, k, v, gain, *mixtures)]
    mixed = {"scores": (*mixtures[:2], None, None), "weights": (None, None, *mixtures[2:]), "both": mixtures}[places]
    heads = [vitkern.modulation.ElementwiseMask(gain), vitkern.modulation.TalkingHeads(*mixed)]
    found = []
    for backend in ("cpu", "reference"):
        out = vitkern.attention(q, k, v, mask=seen, modulation=heads, backend=backend)
        grads = torch.autograd.grad(out.nan_to_num().sin().sum(), wanted, allow_unused=True)
        found.append([out, *(torch.zeros(()) if t is None else t for t in grads)])
    assert found[0][0].isnan().any() == (kind in ("keys", "queries")) and not found[0][0].isnan().all()
    count = len(wanted) if kind in ("finite", "factors") else 0  # a NaN that is seen may be that of the gradients, too
    for a, b in zip(*(x[: 1 + count] for x in found), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
