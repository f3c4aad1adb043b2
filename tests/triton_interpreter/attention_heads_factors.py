"""attention in Triton whose heads mix, with factors, tables and positions, interpreted on the CPU. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import HALF, arguments, check_op, mixtures, scores, small_tiles

from vitkern.triton_kernels import _attention_heads_maps, _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call

FACTORS = ("gain", "weight", "early_gain", "early_weight")


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def call(batch=1, queries=18, keys=21, heads=3, names=(), **given):
    """Arguments of the op whose heads mix before and after the normaliser, with the factors that are named."""
    c = Call(*arguments(batch, queries, keys, heads, **given))
    return c._replace(**mixtures(heads), **{name: scores((1, heads, queries, keys)) for name in names})


def tables(c, height, width, prefix=0, step=1, heads=None, names=("bias_table", "gain_table", "weight_table")):
    heads = heads or c.q.shape[2]
    entries = (2 * height - 1) * (2 * width - 1) + (3 if prefix else 0)
    drawn = {name: torch.randn(1, heads, 1, entries) for name in names}
    return c._replace(**drawn, grid_height=height, grid_width=width, grid_prefix=prefix, grid_step=step)


@pytest.mark.parametrize("name", FACTORS)
def test_one_factor(name):
    both = {"normalizer": "sigmoid"} if "early" in name else {}
    c = call(names=(name,), mask=torch.rand(1, 3, 18, 21) < 0.8, **both)
    check_op([*c])


@pytest.mark.parametrize("normalizer", ["softmax", "relu", "none"])
def test_all_factors_and_what_stands_beside_them(normalizer):
    c = call(2, 17, 19, 4, FACTORS, kv_heads=2, normalizer=normalizer, seed=torch.tensor([5]), dropout_p=0.3, causal=True, offset=4)
    c = c._replace(
        weight=scores((2, 1, 17, 19)), early_gain=scores((2, 1, 17, 19)), factor=torch.rand(4), query_weight=torch.rand(2, 17, 4),
        bias=scores((1, 4, 17, 1)), key_bias=scores((2, 1, 1, 19)), sink=torch.randn(4) if normalizer == "softmax" else None,
    )  # fmt: skip
    check_op([*c])


@pytest.mark.parametrize("grid, prefix, step", [((3, 7), 0, 1), ((3, 5), 2, 2), ((5, 4), 1, 1)], ids=str)
def test_tables(grid, prefix, step):
    height, width = grid
    queries = -(-height // step) * -(-width // step) + prefix
    c = call(3, queries, height * width + prefix, 2, ("gain", "weight"))
    check_op([*tables(c, *grid, prefix, step)])
    check_op([*tables(c._replace(gain=None, weight=None), *grid, prefix, step, heads=1)])


@pytest.mark.parametrize("samples", [1, 2, 99])
@pytest.mark.parametrize("transposed", [False, True])
def test_positions(samples, transposed, monkeypatch):
    """Maps of dS of one sample at a time, of two, and of all."""
    monkeypatch.setattr(_attention_heads_maps, "MOST", samples * 4 * 2 * 20 * 20)
    c = call(3, 20, 20, 2, ("gain",))._replace(
        rel_y=torch.randn(3, 20, 1, 4), rel_x=torch.randn(1, 20, 2, 5), slope=torch.rand(2), q_xy=torch.randn(3, 20, 2),
        k_xy=torch.randn(1, 20, 2), path_row=torch.randn(3, 20, 2), path_col=torch.randn(3, 20, 2), path_width=5,
        path_transposed=transposed, position_index=torch.randint(0, 9, (3, 20, 20)).int(), position_q=torch.randn(3, 20, 2, 9),
        position_k=torch.randn(3, 20, 2, 9),
    )  # fmt: skip
    check_op([*c])


def test_packed_factors_and_tables():
    bounds = {"cu_q": torch.tensor([0, 5, 5, 20]).int(), "cu_k": torch.tensor([0, 3, 18, 20]).int(), "max_q": 20, "max_k": 20}
    c = tables(call(1, 20, 20, 2, FACTORS, dtype=HALF), 4, 5)._replace(**bounds)
    check_op([*c])
    why = " ".join(kernels.supported(*c._replace(slope=torch.rand(2), policy=torch.rand(1, 20), early_gain=scores((1, 1, 20, 1)))))
    assert "slope" in why and "policy" in why and "early_gain must have all queries" in why
