"""attention in Triton, interpreted on the CPU: tables of offsets on a grid, a ratio of later keys. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import EVERYTHING, FULL, HALF, arguments, check_op, scores, small_tiles
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.bias import ManhattanDecay, RelativePosition
from vitkern.modulation import GaussianMixture, SoftCausal
from vitkern.ops import _attention_slots as slots
from vitkern.ops.attention import lower
from vitkern.testing import attention as registry
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call

TABLES = ("bias_table", "gain_table", "weight_table")


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def call(grid=(3, 18), prefix=2, step=2, heads=2, batch=2, names=TABLES, shared=(), dtype=FULL, ratio=True, **given):
    """Arguments of the op with tables of a grid, which the heads share where named; queries at every step-th place."""
    height, width = grid
    queries = -(-height // step) * -(-width // step) + prefix
    count = (2 * height - 1) * (2 * width - 1) + (3 if prefix else 0)
    drawn = {name: torch.randn(1, 1 if name in shared else heads, 1, count) for name in names}
    found = Call(*arguments(batch, queries, height * width + prefix, heads, dtype=dtype, **given))
    geometry = {"grid_height": height, "grid_width": width, "grid_prefix": prefix, "grid_step": step}
    return found._replace(**drawn, **geometry, later_ratio=torch.rand(()) if ratio else None)


def checked(c, **more):
    return check_op([*c._replace(**more)])


@pytest.mark.parametrize(
    "grid, prefix, step", [((5, 7), 0, 1), ((3, 18), 2, 2), ((1, 20), 1, 1), ((20, 1), 0, 3), ((4, 5), 3, 1)], ids=str
)
def test_geometries(grid, prefix, step, tuned):
    tuned(16, 16)
    checked(call(grid, prefix, step, kv_heads=1))


@pytest.mark.parametrize("name", TABLES)
def test_one_table_alone_and_one_that_heads_share(name, tuned):
    tuned(16, 16, 20)
    for shared in ((), (name,)):
        checked(call((4, 5), 1, 1, names=(name,), shared=shared, ratio=False), normalizer="sigmoid")
    checked(call((4, 5), 0, 1, names=(), batch=1))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "none", "argmax_k", "argmax_q", "policy"])
def test_beside_the_dense_terms_masks_and_dropout(normalizer, tuned):
    tuned(16, 32)
    policy = normalizer == "policy"
    c = call((3, 9), 2, 1, batch=2, kv_heads=1, normalizer="softmax" if policy else normalizer, shared=TABLES[2:])
    n = c.q.shape[1]
    dense = {"bias": scores((1, 2, n, n)), "gain": scores((2, 1, n, n)), "weight": scores((1, 2, n, n))}
    more = {"mask": torch.rand(2, 1, n, n) < 0.8, "seed": torch.tensor([3]), "dropout_p": 0.3}
    more |= {"query_weight": torch.rand(2, n, 2)}
    if policy:
        more |= {"policy": torch.rand(2, n), "policy_eps": 1e-3, "policy_diagonal": True}
    checked(c, **dense, **more)


@pytest.mark.parametrize(
    "given", [{"topk": 5}, {"causal": True, "offset": 1}, {"topk": 4, "normalizer": "argmax_k"}], ids=str
)
def test_largest_and_causal(given, tuned):
    tuned(16, 16)
    checked(call((3, 8), 1, 1, batch=1, dtype=HALF), **given)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "argmax_k", "argmax_q"])
def test_packed_sequences_have_the_table_of_the_longest(normalizer, tuned):
    tuned(16, 16)
    c = call((3, 8), 1, 1, batch=1, kv_heads=1)
    bounds = {"cu_q": torch.tensor([0, 0, 5, 25]).int(), "cu_k": torch.tensor([0, 3, 20, 25]).int()}
    n, most = 25, {"max_q": 25, "max_k": 25}
    weight = scores((1, 1, n, n)) if normalizer.startswith("argmax") else None
    checked(c, **bounds, **most, normalizer=normalizer, weight=weight, query_weight=torch.rand(1, n, 2))


def test_lists_of_tiles_and_shared_keys(tuned):
    """A mask that hides whole tiles, and so few queries that several programs share their keys."""
    tuned(16, 16, 99)
    c = call((4, 18), 0, 1, batch=1)
    n = c.q.shape[1]
    checked(c, mask=(torch.arange(n)[:, None] - torch.arange(n) > 20)[None, None])
    checked(call((6, 24), 0, 6, batch=1, heads=1))


def test_entries_that_hide(tuned):
    """-inf in a table hides, and gives no gradient whatever the factors are there."""
    tuned(16, 16)
    c = call((3, 5), 1, 1)
    hidden = torch.rand(c.bias_table.shape) < 0.3
    c = c._replace(bias_table=c.bias_table.masked_fill(hidden, -torch.inf))
    checked(c)
    dirty = c._replace(weight_table=c.weight_table.masked_fill(hidden, torch.nan))
    dout = None
    for x, y in zip(kernels.fwd(*c), kernels.fwd(*dirty), strict=True):
        dout = torch.ones_like(x) if dout is None else dout
        assert torch.equal(x, y)
    saved = kernels.fwd(*c)[1:]
    for x, y in zip(*(kernels.bwd(dout, None, None, *saved, *a, EVERYTHING) for a in (c, dirty)), strict=True):
        assert x is None or torch.equal(x, y)


def test_no_map_stands_where_a_table_has_a_slot():
    grid, heads = (4, 5), 2
    q, k, v = torch.randn(3, 1, 20, heads, 8).unbind(0)
    table = RelativePosition(torch.randn(63, heads), grid=grid)
    decay = ManhattanDecay(-torch.rand(heads), grid, "prob")
    factors = [GaussianMixture(torch.rand(2, heads) + 1, torch.randn(2, heads), grid), SoftCausal(0.3)]
    found, notes = slots.notes(lower(q, k, v, bias=[table, decay], modulation=factors), None, "triton")
    assert notes == [] and all(found[name] is None for name in ("bias", "gain", "weight"))
    assert all(found[name].shape == (1, heads, 1, 63) for name in TABLES) and found["later_ratio"] is not None


@pytest.mark.parametrize("n", [23, 24, 25, 26, 29, 30])
def test_calls_of_the_registry_in_several_tiles(n, tuned):
    tuned(16, 16)
    (found,) = (c for c in registry.small() if c.seed == n)
    with tokens_on_gpu("triton"):
        testing.assert_matches(testing.entries()["attention"], found, HALF, "triton")


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("tiles", [(16, 16), (16, 64), (64, 16, 99)], ids=str)
@pytest.mark.parametrize("scale", [1000.0, 100.0])
def test_scores_in_the_thousands(scale, tiles, dtype, tuned):
    """What is left of dP - delta where one key has it all must be 0 in every kernel, and where a few share, lse is too coarse for
    what is summed in float32."""
    tuned(*tiles)
    c = call((4, 36), 1, 4, dtype=dtype, scale=scale, names=TABLES[:1], ratio=False)
    checked(c, bias=scores((1, 2, c.q.shape[1], 145)), query_weight=torch.rand(2, c.q.shape[1], 2))
