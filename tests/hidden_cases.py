"""attention with masks of every kind, alone and in pairs, in memory that is NaN all around."""

import itertools
import math

import torch
from masked_systems import normal, qkv

import vitkern
from vitkern import testing
from vitkern.bias import ContextualPosition, DecomposedRelativePosition, EuclideanDistance, KeyBias, RelativePosition
from vitkern.mask import BlockCausal, Causal, FromLogits, NoSelf, Segments
from vitkern.modulation import ElementwiseMask, Policy, TalkingHeads
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


def check(name, tensors, options, dtype, parameters=(), backend="cpu"):
    """A call with every tensor in its frame, by the oracle rule."""

    def build(t):
        t = {n: framed(x) for n, x in t.items()}
        return (t["q"], t["k"], t["v"]), options(t)

    call = Call(name, vitkern.attention, build, tensors, frozenset(parameters), seed=len(name))
    testing.assert_matches(ENTRY, call, dtype, backend)


PAIRS = [*itertools.combinations(KINDS, 2), ("causal", "causal"), ("levels", "levels"), ("segments", "segments")]
OTHERS = {
    "causal": Causal(3),
    "segments": Segments(*(t.flip(1) for t in IDS)),
    "levels": BlockCausal(*(t.flip(1) for t in LEVELS)),
}


def masks_of(pair):
    masks = [KINDS[name] for name in pair]
    if pair[0] == pair[1]:
        masks[1] = OTHERS[pair[0]]
    return masks


HIDING = {
    **{name: (lambda t, m=m: {"mask": m}) for name, m in KINDS.items() if name not in ("no self", "tensor", "logits")},
    "tensor": lambda t: {"mask": t["seen"]},
    "tensor of keys": lambda t: {"mask": t["seen"][:, :, :1].expand(2, 4, QUERIES, KEYS)},
    "logits": lambda t: {"mask": [KINDS["logits"], t["seen"]]},
    "logits alone": lambda t: {"mask": FromLogits(t["seen"][:, 0, :, None].float() - 0.5, (1, KEYS), empty="none")},
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


def hidden(kind, dtype, backend="cpu"):
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
    check(kind, tensors, HIDING[kind], dtype, {"bias", "rows", "sink", "weight"}, backend)


def axes_tables(q_grid, k_grid):
    return {f"rel_{n}": normal(2 * max(a, b) - 1, 8, seed=5) for n, a, b in zip("hw", q_grid, k_grid, strict=True)}


CELLS = (2, 3)
LEARNED = {  # what learns beside q, k and v: its tensors, and the options that they make
    "rope": (
        {"cos": normal(1, 6, 1, 4, seed=5), "sin": normal(1, 6, 1, 4, seed=6)},
        lambda t: {"rope": vitkern.Rope(t["cos"], t["sin"])},
    ),
    "half of the channels turned": (
        {"cos": normal(1, 6, 1, 2, seed=5), "sin": normal(1, 6, 1, 2, seed=6)},
        lambda t: {"rope": vitkern.Rope(t["cos"], t["sin"], "half")},
    ),
    "contextual": (
        {f"{n}_table": normal(4, 1, 8, seed=i) for i, n in enumerate("qkv")},
        lambda t: {"bias": ContextualPosition(*(t[f"{n}_table"] for n in "qkv"), torch.arange(36).view(6, 6) % 4)},
    ),
    "axes": (
        axes_tables(CELLS, CELLS),
        lambda t: {"bias": DecomposedRelativePosition(t["rel_h"], t["rel_w"], CELLS, CELLS)},
    ),
    "axes of another grid": (
        axes_tables((6, 1), CELLS),
        lambda t: {"bias": DecomposedRelativePosition(t["rel_h"], t["rel_w"], (6, 1), CELLS)},
    ),
    "scale": ({"scale": normal(2, seed=5).abs()}, lambda t: {"scale": t["scale"]}),
    "cosine": ({"tau": normal(2, seed=5).abs()}, lambda t: {"cosine": vitkern.CosineScore(t["tau"])}),
    "distance": (
        {"slope": normal(2, seed=5).abs(), "q_xy": normal(1, 6, 2, seed=6), "k_xy": normal(1, 6, 2, seed=7)},
        lambda t: {"bias": EuclideanDistance(t["slope"], t["q_xy"], t["k_xy"])},
    ),
    "factor": ({"factor": normal(1, 1, 6, 6, seed=5)}, lambda t: {"modulation": ElementwiseMask(t["factor"])}),
    "factor of weights": (
        {"factor": normal(1, 1, 6, 6, seed=5)},
        lambda t: {"modulation": ElementwiseMask(t["factor"], "prob")},
    ),
    "factor in front of heads that talk": (
        {"factor": normal(1, 2, 6, 6, seed=5), "pre": normal(2, 2, seed=6), "post": normal(2, 2, seed=7)},
        lambda t: {"modulation": [ElementwiseMask(t["factor"]), TalkingHeads(t["pre"], None, t["post"])]},
    ),
    "policy": ({"keep": normal(1, 6, seed=5).sigmoid()}, lambda t: {"modulation": Policy(t["keep"])}),
}
OF_TOKENS = {"q_xy": ("query", 1), "k_xy": ("key", 1), "keep": ("key", 1)}


def learned(kind, backend, dtype=torch.float64):
    """Every gradient where token 3 is hidden and query 2 sees nothing, both NaN with all that is theirs, against zeros there."""
    parameters, options = LEARNED[kind]
    seen = torch.ones(6, 6, dtype=torch.bool)
    seen[:, 3], seen[2] = False, False
    found = []
    for blank in (math.nan, 0.0):
        t = {n: x.to(dtype).clone() for n, x in (qkv(6, 6) | parameters).items()}
        t["q"][:, 2], t["k"][:, 3], t["v"][:, 3] = blank, blank, blank
        for name, (of, axis) in OF_TOKENS.items():
            if name in t:
                t[name].select(axis, 2 if of == "query" else 3).fill_(blank)
        if "factor" in t:
            t["factor"].masked_fill_(~seen, blank)
        t = {n: framed(x).detach().requires_grad_() for n, x in t.items()}
        out = vitkern.attention(t["q"], t["k"], t["v"], mask=seen, **options(t), backend=backend)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [*t.values()])])
    for name, got, want in zip(["out", *t], *found, strict=True):
        assert got.isfinite().all(), f"{kind}: {name} is not finite"
        torch.testing.assert_close(got, want, msg=f"{kind}: {name}")


OWN = torch.rand(1, 3, QUERIES, KEYS, generator=GENERATOR) < 0.7
HEADS_HIDE = {  # what hides a pair: its options, and what it shows; the first three from each head others
    "tensor": lambda t: ({"mask": OWN}, OWN),
    "bias": lambda t: ({"bias": t["low"], "mask": KINDS["causal"]}, OWN & KINDS["causal"].dense(t["q"], t["k"])),
    "topk": lambda t: ({"mask": OWN, "topk": 5}, OWN),
    **{
        name: (lambda t, m=KINDS[name]: ({"mask": m}, m.dense(t["q"], t["k"]) & torch.ones(1, 3, 1, 1).bool()))
        for name in ("causal", "segments", "levels", "logits")
    },
    "alike": lambda t: ({"mask": OWN[:, :, :1]}, OWN[:, :, :1].expand_as(OWN)),  # the same row for all queries
}


def mixed_in_front(kind, place, backend, dtype=torch.float64):
    """A factor of NaN in front of heads that mix, where its own head sees nothing, against one of 1; only the latter learns."""
    t = qkv(QUERIES, KEYS, heads=3, kv=1) | {"low": torch.zeros(()).masked_fill(~OWN, -math.inf)}
    t |= {"factor": normal(2, 3, QUERIES, KEYS, seed=5), "pre": normal(3, 3, seed=6), "post": normal(3, 3, seed=7)}
    t = {n: x.to(dtype) for n, x in t.items()}
    low = t.pop("low")
    options, seen = HEADS_HIDE[kind](t | {"low": low})
    heads = TalkingHeads(t["pre"], None, t["post"])
    if kind == "topk" and place == "prob":
        given = {"modulation": heads, "return_stats": ("probs",), "backend": "reference"}
        seen = vitkern.attention(t["q"], t["k"], t["v"], **options, **given)[1].probs > 0
    found = []
    for blank in (math.nan, 1.0):
        x = t | {"factor": t["factor"].masked_fill(~seen, blank)}
        x = {n: framed(a).detach().requires_grad_() for n, a in x.items()}
        mixed = [ElementwiseMask(x["factor"], place), TalkingHeads(x["pre"], None, x["post"])]
        out, stats = vitkern.attention(
            x["q"], x["k"], x["v"], modulation=mixed, **options, return_stats=("key_mean",), backend=backend
        )
        loss = out.sin().sum() + stats.key_mean.sin().sum()
        found.append([out, stats.key_mean, *torch.autograd.grad(loss, [*x.values()])])
    assert not found[0][2 + [*x].index("factor")].masked_fill(seen, 0).any(), "what is hidden learns"
    for name, got, want in zip(["out", "key_mean", *x], *found, strict=True):
        if name == "factor":
            want = want.masked_fill(~seen, 0)
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{kind}: {name}: {text}")


def seen_in_front(place, backend, dtype=torch.float64):
    """A factor of NaN in front of heads that mix, seen by its own head: what every head gives, by the definition too."""
    t = {n: x.to(dtype) for n, x in qkv(QUERIES, KEYS, heads=3, kv=1).items()}
    factor, pre, post = (normal(*n, seed=5).to(dtype) for n in ((1, 3, QUERIES, KEYS), (3, 3), (3, 3)))
    factor[0, 1, 4] = factor[0, 1, 4].masked_fill(OWN[0, 1, 4], math.nan)
    mixed = [ElementwiseMask(factor, place), TalkingHeads(pre, None, post)]
    got, want = (
        vitkern.attention(t["q"], t["k"], t["v"], mask=OWN, modulation=mixed, backend=b) for b in (backend, "reference")
    )
    assert want[:, 4].isnan().all() and not want[:, :4].isnan().any()
    torch.testing.assert_close(got, want, equal_nan=True)
