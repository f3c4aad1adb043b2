"""attention in Triton, interpreted on the CPU: factors and biases that lack an axis of queries or of keys. Run by
tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import FULL, HALF, arguments, check_op, mixtures, scores, small_tiles
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing import attention as registry
from vitkern.triton_kernels import _host
from vitkern.triton_kernels._attention_host import Call

AXES = [(0, 1), (1, 0)]  # of queries and of keys
PACKED = {
    "cu_q": torch.tensor([0, 0, 5, 25]).int(),
    "cu_k": torch.tensor([0, 3, 20, 25]).int(),
    "max_q": 22,
    "max_k": 18,
}


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def narrow(axes, queries, keys, heads=1, batch=1):
    return scores([n if has else 1 for n, has in zip((batch, heads, queries, keys), (1, 1, *axes), strict=True)])


def call(queries, keys, heads=2, batch=2, dtype=FULL, **given):
    return Call(*arguments(batch, queries, keys, heads, dtype=dtype, **given))


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "policy", "argmax_k", "argmax_q"])
def test_factors_of_each_place(normalizer, axes, tuned):
    """Their gradients are sums over what they lack."""
    tuned(16, 16, 1)
    policy = normalizer == "policy"
    c = call(20, 37, kv_heads=1, normalizer="softmax" if policy else normalizer, dropout_p=0.3, seed=torch.tensor([3]))
    c = c._replace(
        mask=torch.rand(2, 1, 20, 37) < 0.8, **({"policy": torch.rand(2, 37), "policy_eps": 1e-3} if policy else {})
    )
    check_op([*c._replace(gain=narrow(axes, 20, 37, 2, 2), weight=narrow(axes, 20, 37))])
    check_op(
        [*c._replace(gain=narrow(axes, 20, 37), weight=narrow((1, 1), 20, 37, 2), bias=narrow(axes, 20, 37, 1, 2))]
    )
    check_op([*c._replace(gain=narrow((1, 1), 20, 37, 2), weight=narrow(axes, 20, 37, 2, 2))])


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "argmax_k", "argmax_q"])
@pytest.mark.parametrize("modulation", ["gain", "weight", "heads+gain+weight", "gain+weight+heads"])
def test_a_number_of_each_head(modulation, normalizer, tuned):
    tuned(16, 16, 99)
    c = registry.make(1, 2, 20, 70, heads=3, factor=(0, 0), modulation=modulation, masks="dense", normalizer=normalizer)
    with tokens_on_gpu("triton"):
        testing.assert_matches(testing.entries()["attention"], c, FULL, "triton")


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("queries, keys", [(5, 150), (150, 5)], ids=str)
def test_several_programs_share_out_what_is_summed(queries, keys, axes, tuned):
    tuned(16, 16, 99)
    for normalizer in ("softmax", "sigmoid"):
        c = call(queries, keys, 1, 1, dtype=HALF, normalizer=normalizer)
        check_op([*c._replace(gain=narrow(axes, queries, keys), weight=narrow(axes, queries, keys))])


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "argmax_k", "argmax_q"])
def test_packed_sequences(normalizer, axes, tuned):
    """A factor or bias has places in a sequence, which are not those of tokens."""
    tuned(16, 16, 1)
    c = call(25, 25, batch=1, kv_heads=1, normalizer=normalizer)._replace(**PACKED)
    for batch in (1, 3):
        given = {name: narrow(axes, 22, 18, heads, batch) for name, heads in (("gain", 2), ("weight", 1), ("bias", 2))}
        check_op([*c._replace(**given)])


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_beside_tables_that_multiply_too_and_queries_that_see_nothing(axes, tuned):
    tuned(16, 16, 1)
    tables = {name: torch.randn(1, 2, 1, 63) for name in ("gain_table", "weight_table")}
    c = call(20, 20)._replace(**tables, grid_height=4, grid_width=5, grid_step=1, later_ratio=torch.rand(()))
    hidden = torch.rand(2, 1, 20, 20) < 0.7
    hidden[:, :, 3] = False
    check_op([*c._replace(gain=narrow(axes, 20, 20, 2), weight=narrow(axes, 20, 20, 1, 2), mask=hidden)])
    check_op([*c._replace(gain=narrow(axes, 20, 20), weight=narrow((1, 1), 20, 20), causal=True)])


MIXED = ("gain", "weight", "early_gain", "early_weight")


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "argmax_k", "argmax_q"])
def test_factors_around_a_mixture_of_heads(normalizer, axes):
    c = call(18, 37, 3, kv_heads=1, normalizer=normalizer, causal=True, offset=9)._replace(**mixtures(3))
    check_op([*c._replace(**{name: narrow(axes, 18, 37, 3, 2) for name in MIXED})])
    c = c._replace(seed=torch.tensor([3]), dropout_p=0.3, mask=torch.rand(2, 1, 18, 37) < 0.8, causal=False)
    check_op([*c._replace(**{name: narrow(axes, 18, 37) for name in MIXED}, bias=narrow(axes, 18, 37, 3))])


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_mixture_of_heads_in_packed_sequences(axes):
    c = call(25, 25, batch=1, dtype=HALF)._replace(**PACKED, **mixtures(2))
    for batch in (1, 3):
        check_op([*c._replace(**{name: narrow(axes, 22, 18, 2, batch) for name in (*MIXED, "bias")})])


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_a_mixture_of_heads_passes_over_hidden_tiles(axes):
    """Two tiles of three are hidden from all heads."""
    c = call(40, 70, batch=1)._replace(**mixtures(2))
    seen = (torch.arange(40)[:, None] // 16 == torch.arange(70) // 16 % 3)[None, None]
    check_op([*c._replace(**{name: narrow(axes, 40, 70, 2) for name in MIXED}, mask=seen)])
