"""attention in Triton whose heads mix, with factors, tables and positions, interpreted on the CPU. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import HALF, arguments, check_op, mixtures, scores, small_tiles

from vitkern.ops.attention import OP
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
    c = call(
        2,
        17,
        19,
        4,
        FACTORS,
        kv_heads=2,
        normalizer=normalizer,
        seed=torch.tensor([5]),
        dropout_p=0.3,
        causal=True,
        offset=4,
    )
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
    bounds = {
        "cu_q": torch.tensor([0, 5, 5, 20]).int(),
        "cu_k": torch.tensor([0, 3, 18, 20]).int(),
        "max_q": 20,
        "max_k": 20,
    }
    c = tables(call(1, 20, 20, 2, FACTORS, dtype=HALF), 4, 5)._replace(**bounds)
    check_op([*c])
    why = " ".join(kernels.supported(*c._replace(path_row=torch.rand(1, 20, 2), policy=torch.rand(1, 20))))
    assert "path_row" in why and "policy" in why


@pytest.mark.parametrize(
    "topk, normalizer", [(1, "softmax"), (5, "softmax"), (20, "sigmoid"), (3, "argmax_k")], ids=str
)
def test_largest_mixed_scores(topk, normalizer):
    c = call(2, 17, 37, 3, ("gain", "weight"), normalizer=normalizer, mask=torch.rand(2, 1, 17, 37) < 0.7)
    check_op([*c._replace(topk=topk, bias=scores((1, 3, 17, 37)))])
    check_op([*call(1, 18, 35, 2, causal=True, offset=9, dtype=HALF)._replace(topk=topk, normalizer=normalizer)])


def test_ties_of_mixed_scores_go_to_the_lower_key():
    """Whole numbers, equal to the bit; -0 ties with 0, rows with fewer visible keys keep them all."""
    c = call(1, 9, 37, 2, mask=torch.rand(1, 2, 9, 37) < 0.8)._replace(topk=6, scale=1.0)
    c.mask[:, :, 3, 4:] = c.mask[:, :, 5] = False
    mix = torch.tensor([[1.0, -1.0], [0.0, 2.0]])
    whole = [torch.randint(-1, 2, t.shape).float() for t in (c.q, c.k)]
    whole[0][:, 0] = 0.0
    eye = torch.eye(37)[None, :, None].expand(1, 37, 2, 37)
    c = c._replace(q=whole[0], k=whole[1], v=eye, pre_weight=mix, pre_bias=None, post_weight=None, post_bias=None)
    for normalizer in ("softmax", "argmax_k", "argmax_q"):
        args = [*c._replace(normalizer=normalizer)]
        out, want = kernels.fwd(*args)[0], OP.definition(*args)[0]
        assert torch.equal(out != 0, want != 0)
        if normalizer == "softmax":
            assert torch.equal((out != 0).sum(-1).transpose(1, 2), c.mask.sum(-1).clamp(max=6))


@pytest.mark.parametrize("normalizer", ["argmax_k", "argmax_q"])
def test_hard_choices(normalizer):
    c = call(
        2,
        17,
        19,
        4,
        FACTORS,
        kv_heads=2,
        normalizer=normalizer,
        seed=torch.tensor([5]),
        dropout_p=0.3,
        causal=True,
        offset=4,
    )
    check_op([*c._replace(bias=scores((1, 4, 17, 19)), query_weight=torch.rand(2, 17, 4))])
    check_op([*tables(call(2, 20, 20, 2, normalizer=normalizer), 4, 5)])
    bounds = {
        "cu_q": torch.tensor([0, 5, 5, 20]).int(),
        "cu_k": torch.tensor([0, 3, 18, 20]).int(),
        "max_q": 15,
        "max_k": 15,
    }
    c = call(1, 20, 20, 2, normalizer=normalizer)._replace(**bounds, topk=4 * (normalizer == "argmax_k"))
    check_op([*c._replace(query_weight=torch.rand(1, 20, 2))])


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "argmax_q"])
def test_packed_positions(normalizer):
    """Rows of every query, decomposed or of a bias, and distances; sequences without a query, without a key, and the longest."""
    bounds = {
        "cu_q": torch.tensor([0, 5, 5, 7, 30]).int(),
        "cu_k": torch.tensor([0, 3, 18, 18, 30]).int(),
        "max_q": 23,
        "max_k": 20,
    }
    c = call(1, 30, 30, 3, ("weight",), kv_heads=1, normalizer=normalizer)._replace(**bounds)
    spots = {name: torch.randn(1, 30, 2) for name in ("q_xy", "k_xy")}
    c = c._replace(weight=scores((1, 3, 23, 20)))
    for rel_x in (torch.randn(1, 30, 1, 5), torch.zeros(1, 30, 3, 5)):
        check_op([*c._replace(rel_y=torch.randn(1, 30, 3, 4), rel_x=rel_x)])
    check_op([*c._replace(slope=torch.rand(3), **spots, causal=True)])
    rows = {"rel_y": torch.randn(1, 30, 3, 20), "rel_x": torch.zeros(1, 30, 3, 1)}
    check_op([*c._replace(slope=torch.rand(3), **spots, **rows)])
