"""attention: masks in pairs, and what masks hide, under every kind of mask, in memory that is NaN all around."""

import itertools
import math

import pytest
import torch
from masked_systems import normal, qkv

import vitkern
from vitkern import testing
from vitkern.bias import KeyBias, RelativePosition
from vitkern.mask import BlockCausal, Causal, FromLogits, NoSelf, Segments
from vitkern.testing.registry import Call

ENTRY = testing.entries()["attention"]
QUERIES, KEYS = 18, 37
GENERATOR = torch.Generator().manual_seed(0)
IDS = [torch.randint(-1, 3, (2, n), generator=GENERATOR) for n in (QUERIES, KEYS)]
LEVELS = [torch.randint(0, most, (1, n), generator=GENERATOR) for most, n in ((4, QUERIES), (6, KEYS))]
ALLOW = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
LOGITS = torch.randn(2, QUERIES, 3, 4, generator=GENERATOR)
SEEN = torch.rand(2, 1, QUERIES, KEYS, generator=GENERATOR) < 0.7
KINDS = {
    "causal": Causal(9),
    "segments": Segments(*IDS),
    "table": Segments(*IDS, ALLOW),
    "levels": BlockCausal(*LEVELS),
    "no self": NoSelf(),
    "logits": FromLogits(LOGITS, (1, KEYS), empty="none"),
    "tensor": SEEN,
}


def framed(t):
    """The tensor inside a larger one that holds NaN (the greatest number, of integers)."""
    blank = math.nan if t.is_floating_point() else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    whole = torch.nn.functional.pad(t, (3, 5) * t.dim(), value=blank)
    return whole[tuple(slice(3, 3 + n) for n in t.shape)]


def check(name, tensors, options, dtype, parameters=()):
    """A call with every tensor in its frame, by the oracle rule."""

    def build(t):
        t = {n: framed(x) for n, x in t.items()}
        return (t["q"], t["k"], t["v"]), options(t)

    call = Call(name, vitkern.attention, build, tensors, frozenset(parameters), seed=len(name))
    testing.assert_matches(ENTRY, call, dtype, "cpu")


PAIRS = [*itertools.combinations(KINDS, 2), ("causal", "causal"), ("levels", "levels"), ("segments", "segments")]
OTHERS = {
    "causal": Causal(3),
    "segments": Segments(*(t.flip(1) for t in IDS)),
    "levels": BlockCausal(*(t.flip(1) for t in LEVELS)),
}


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_masks_in_a_list_are_their_intersection(pair):
    """The oracle takes the dense form of each; the same as one tensor."""
    masks = [KINDS[name] for name in pair]
    number = PAIRS.index(pair)
    if pair[0] == pair[1]:
        masks[1] = OTHERS[pair[0]]
    tensors = qkv(QUERIES, KEYS, heads=4, kv=2)
    check("pair", tensors, lambda t: {"mask": masks}, (torch.float32, torch.bfloat16)[number % 2])
    q, k, v = tensors.values()
    both = torch.ones((), dtype=torch.bool)
    for m in masks:
        both = both & (m if isinstance(m, torch.Tensor) else m.dense(q, k))
    assert not both.all() and both.any()
    torch.testing.assert_close(vitkern.attention(q, k, v, mask=masks), vitkern.attention(q, k, v, mask=both))


HIDING = {
    **{name: (lambda t, m=m: {"mask": m}) for name, m in KINDS.items() if name not in ("no self", "tensor", "logits")},
    "tensor": lambda t: {"mask": t["seen"]},
    "tensor of keys": lambda t: {"mask": t["seen"][:, :, :1].expand(2, 4, QUERIES, KEYS)},
    "logits": lambda t: {"mask": [KINDS["logits"], t["seen"]]},
    "no self": lambda t: {"mask": [NoSelf(), t["seen"]]},
    "bias": lambda t: {"bias": t["bias"]},
    "bias of keys": lambda t: {"bias": KeyBias(t["bias"][:, :, 0])},
    "table of offsets": lambda t: {"bias": RelativePosition(t["rows"], t["index"])},
    "keys of its own": lambda t: {"key_index": t["named"]},
    "further keys": lambda t: {"mask": t["seen"], "extra_kv": (t["more_k"], t["more_v"])},
    "topk": lambda t: {"mask": t["seen"], "topk": 4},
    "sink": lambda t: {"mask": t["seen"], "sink": t["sink"]},
    "sigmoid": lambda t: {"mask": t["seen"], "normalizer": "sigmoid"},
    "argmax": lambda t: {"mask": t["seen"], "normalizer": "argmax_k"},
    "statistics": lambda t: {"mask": t["seen"], "return_stats": ("lse", "key_mean"), "query_weight": t["weight"]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", HIDING)
def test_nothing_around_the_inputs_nor_behind_a_mask_is_seen(kind, dtype):
    """Keys that nobody sees are NaN, their values infinite, queries that see nothing NaN."""
    tensors, generator = qkv(QUERIES, KEYS, heads=4, kv=2), torch.Generator().manual_seed(1)
    seen = SEEN.clone()
    seen[:, :, 0] = torch.arange(KEYS) % 3 > 0  # what "tensor of keys" takes
    seen[..., 20], seen[:, :, 5] = False, False
    if kind == "bias of keys":
        seen[:] = seen[:, :, :1]
    tensors |= {"seen": seen, "bias": normal(2, 1, QUERIES, KEYS, seed=7).masked_fill(~seen, -math.inf)}
    tensors |= {"rows": normal(6, 4, seed=8), "index": torch.randint(1, 6, (QUERIES, KEYS), generator=generator).int()}
    tensors["index"][:, 20], tensors["index"][5], tensors["rows"][0] = 0, 0, -math.inf
    tensors["named"] = torch.randint(-1, 20, (2, QUERIES, 6), generator=generator)
    tensors["named"][:, 5] = -1
    tensors |= {f"more_{n}": normal(1, 3, 2, 8, seed=9) for n in "kv"} | {
        "sink": normal(4),
        "weight": normal(2, QUERIES).abs(),
    }
    found = HIDING[kind](tensors)
    q, k = tensors["q"], tensors["k"]
    if kind == "table of offsets":
        hides = tensors["index"] > 0
    elif "bias" in found:
        hides = tensors["bias"] > -math.inf
    elif "key_index" in found:
        hides = (tensors["named"][..., None] == torch.arange(KEYS)).any(2)[:, None]
    else:
        masks = found["mask"] if isinstance(found["mask"], list) else [found["mask"]]
        hides = torch.ones((), dtype=torch.bool)
        for m in masks:
            hides = hides & (m if isinstance(m, torch.Tensor) else m.dense(q, k))
    hides = hides.expand(2, 1, QUERIES, KEYS) if hides.shape[1:2] != (4,) else hides[:, :1]
    never, blind = ~hides.any(2)[:, 0], ~hides.any(3)[:, 0]  # [B, Nk], [B, Nq]
    assert never.any()
    tensors["k"][never], tensors["v"][never] = math.nan, math.inf
    if "extra_kv" not in found:
        tensors["q"][blind] = math.nan
    check(kind, tensors, HIDING[kind], dtype, {"bias", "rows", "sink", "weight"})


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
