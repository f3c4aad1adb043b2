"""attention whose mask shows each query few keys, and others than its neighbours: on CPUs blocks of queries are then scattered."""

import math

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.bias import ContextualPosition, EuclideanDistance, KeyBias
from vitkern.mask import Causal, FromLogits
from vitkern.modulation import ElementwiseMask, Policy, SoftCausal
from vitkern.testing.registry import Call

ENTRY = testing.entries()["attention"]
QUERIES, KEYS = 150, 321  # more than one block, and a last tile of one key
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(heads=1):
    """Bool [2, heads, Q, K]: two stretches of up to 20 keys for each query, one query of none, all of one tile for another."""
    start = torch.rand(2, 2, heads, QUERIES, 1, generator=torch.Generator().manual_seed(1)) * (KEYS - 8)
    length = torch.rand(2, 2, heads, QUERIES, 1, generator=torch.Generator().manual_seed(2)) * 20
    key = torch.arange(KEYS)
    shown = ((key >= start) & (key < start + length)).any(0)
    shown[:, :, 7] = False
    shown[:, :, 9] = (key >= 16) & (key < 32)
    return shown


def logits():
    """The same keys, as a map of one row."""
    return FromLogits(torch.where(seen()[:, 0], 1.0, -1.0)[:, :, None], (1, KEYS), empty="none")


def call(dtype, mask, heads=2, kv_heads=2, d=24, dv=40, made=None, **options):
    """made(tensors): more options from tensors that are drawn under the names of `shapes`."""
    shapes, build = made or ({}, lambda t: {})
    shapes = {"q": (2, QUERIES, heads, d), "k": (2, KEYS, kv_heads, d), "v": (2, KEYS, kv_heads, dv)} | shapes
    tensors = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors = {name: (t.to(dtype) if name in "qkv" else t).requires_grad_() for name, t in tensors.items()}
    return Call(
        "scattered",
        vitkern.attention,
        lambda t: ((t["q"], t["k"], t["v"]), {"mask": mask, **options, **build(t)}),
        tensors,
    )


ADDED = {
    "bias": ({"bias": (1, 2, QUERIES, KEYS)}, lambda t: {"bias": t["bias"]}),
    "keys": ({"bias": (1, 2, KEYS)}, lambda t: {"bias": KeyBias(t["bias"])}),
    "distance": (
        {"slope": (2,), "q_xy": (2, QUERIES, 2), "k_xy": (2, KEYS, 2)},
        lambda t: {"bias": EuclideanDistance(t["slope"], t["q_xy"], t["k_xy"])},
    ),
    "positions": (
        {"t_q": (5, 2, 24), "t_k": (5, 1, 24)},
        lambda t: {
            "bias": ContextualPosition(t["t_q"], t["t_k"], None, torch.arange(QUERIES * KEYS).view(QUERIES, KEYS) % 5)
        },
    ),
    "values of positions": (
        {"t_v": (5, 1, 40)},
        lambda t: {
            "bias": ContextualPosition(None, None, t["t_v"], torch.arange(QUERIES * KEYS).view(QUERIES, KEYS) % 5)
        },
    ),
    "gain": ({"w": (2, QUERIES, KEYS)}, lambda t: {"modulation": ElementwiseMask(t["w"])}),
    "weight": ({"w": (2, QUERIES, KEYS)}, lambda t: {"modulation": ElementwiseMask(t["w"], "prob")}),
    "soft": ({"ratio": ()}, lambda t: {"modulation": SoftCausal(t["ratio"])}),
    "policy": ({"keep": (2, KEYS)}, lambda t: {"modulation": Policy(t["keep"].sigmoid(), 1e-3)}),
    "sink": ({"sink": (2,)}, lambda t: {"sink": t["sink"]}),
    "scale": ({"scale": (2,)}, lambda t: {"scale": t["scale"]}),
}
OPTIONS = {
    "grouped": {"heads": 4},
    "topk": {"topk": 5},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 5},
    "sigmoid": {"normalizer": "sigmoid"},
    "relu": {"normalizer": "relu"},
    "first key": {"normalizer": "argmax_k"},
    "first query": {"normalizer": "argmax_q"},
    "statistics": {"return_stats": ("lse", "key_mean")},
    "heads of 128": {"d": 128, "dv": 128},
    "heads of 8": {"d": 8, "dv": 8},
}
MASKS = {
    "tensor": lambda: seen(),
    "of heads": lambda: seen(2),
    "bits": logits,
    "bits and causal": lambda: [logits(), Causal(KEYS - QUERIES)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, dtype):
    testing.assert_matches(ENTRY, call(dtype, MASKS[mask]()), dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ADDED)
def test_modifiers_and_their_gradients(name, dtype):
    testing.assert_matches(ENTRY, call(dtype, logits(), made=ADDED[name]), dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, dtype):
    testing.assert_matches(ENTRY, call(dtype, logits(), **OPTIONS[name]), dtype, "cpu")


def test_what_is_not_finite_reaches_those_who_see_it():
    q, k, v = (drawn(2, n, 2, 16, seed=n) for n in (QUERIES, KEYS, KEYS))
    q[0, 3], k[0, 40], k[1, 0], v[0, 50, 1, 2], v[1, 320] = math.nan, math.inf, math.nan, math.inf, -math.inf
    found = []
    for backend in ("reference", "cpu"):
        leaves = [t.clone().requires_grad_() for t in (q, k)]
        out = vitkern.attention(*leaves, v, mask=seen(), backend=backend)
        found.append((out.isnan(), *(g.isnan() for g in torch.autograd.grad(out.nansum(), leaves))))
    for want, got in zip(*found, strict=True):
        assert torch.equal(got, want)
    assert found[0][0].any()


def test_every_run_is_the_same_with_any_number_of_threads():
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        leaves = [drawn(2, n, 2, 16, seed=n).requires_grad_() for n in (QUERIES, KEYS, KEYS)]
        out = vitkern.attention(*leaves, mask=seen(), backend="cpu")
        found.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
