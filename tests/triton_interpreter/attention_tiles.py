"""Which tiles attention in Triton visits, and how several programs share them out, interpreted on the CPU. Run by
tests/test_triton.py."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import HALF, arguments, check_op, mixtures, scores, small_tiles, wide

from vitkern import testing
from vitkern.ops.attention import OP
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """One tile for a small call, unless a test asks for other tiles."""
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def test_causal_tiles_beyond_the_diagonal_are_not_visited(tuned, monkeypatch):
    tuned(16, 16)
    visits, inner = [], kernels.scores
    monkeypatch.setattr(kernels, "scores", lambda *args: visits.append(int(args[7])) or inner(*args))
    kernels.fwd(*arguments(1, 40, 48, 1, causal=True, offset=-8))
    assert sorted(visits) == [0, 0, 0, 16, 16]


def test_tiles_that_are_wholly_hidden_are_not_visited(tuned, monkeypatch):
    """By a mask of two heads, by ids, forward and backward; a row and a column of tiles see nothing."""
    tuned(16, 16)
    seen = torch.rand(1, 2, 40, 70) < 0.5
    seen[:, 0, :16, 32:] = False
    seen[:, 0, 16:32] = False
    seen[:, 1, :, 16:64] = False
    ids = [torch.arange(n)[None].int() // 16 for n in (40, 70)]
    modules = sys.modules["vitkern.triton_kernels._attention_tiles"], kernels
    for change, tiles in (
        ({"mask": seen}, 2 + 5 + 3 * 2),
        ({"q_ids": ids[0], "k_ids": ids[1], "rule": "equal"}, 2 * 3),
    ):
        args = Call(*arguments(1, 40, 70, 2, d=16))._replace(**change)
        visits = []
        for module in modules:
            inner = module.scores
            monkeypatch.setattr(module, "scores", lambda *x, inner=inner: visits.append(1) or inner(*x))
        out, *saved = kernels.fwd(*args)
        assert len(visits) == tiles
        kernels.bwd(out, None, None, *saved, *args, 0b111)
        assert len(visits) == 4 * tiles  # forward, delta, dq, dk and dv
        monkeypatch.undo()
        tuned(16, 16)


def mixed_visits(monkeypatch):
    """A list that grows with every tile of scores of mixed heads."""
    visits = []
    for name in ("attention_heads", "_attention_heads_choice", "_attention_heads_bwd_tiles"):
        module = sys.modules[f"vitkern.triton_kernels.{name}"]
        monkeypatch.setattr(module, "mixed_scores", lambda *x, inner=module.mixed_scores: visits.append(1) or inner(*x))
    return visits


def of_two_heads():
    """Two heads see 3, 2 and all 5 tiles of keys together."""
    seen = torch.rand(1, 2, 40, 70) < 0.5
    seen[:, 0, :16, 32:] = seen[:, 0, 16:32] = seen[:, 1, :, 16:64] = False
    return {"mask": seen}


HIDDEN = {
    "masks of two heads": (of_two_heads, 3 + 2 + 5),
    "keys": (lambda: {"mask": (torch.arange(70) < 30)[None, None, None]}, 3 * 2),
    "ids": (lambda: {name: torch.arange(n)[None].int() // 16 for name, n in (("q_ids", 40), ("k_ids", 70))}
            | {"rule": "equal"}, 3),
    "levels and causal": (lambda: {name: torch.arange(n)[None].int() // 32 for name, n in (("q_ids", 40), ("k_ids", 70))}
                          | {"rule": "upto", "causal": True, "offset": -8}, 1 + 2 + 2),
}  # fmt: skip


@pytest.mark.parametrize("case", HIDDEN)
def test_tiles_that_are_hidden_from_all_heads_that_mix_are_not_visited(case, monkeypatch):
    """Walks of lse, out, lse again, delta, dq, dk and dv; the bias and the mean of keys; both choices, top-k."""
    change, tiles = HIDDEN[case]
    call = Call(*arguments(1, 40, 70, 2, d=16))._replace(**mixtures(2), **change())
    visits = mixed_visits(monkeypatch)

    def visited(args, need=None):
        visits.clear()
        out, *saved = kernels.fwd(*args)
        if need is not None:
            kernels.bwd(out, None, None, *saved, *args, need)
        return len(visits)

    assert visited(call) == 2 * tiles
    assert visited(call, 0b111) == 7 * tiles
    assert visited(call._replace(query_weight=torch.rand(1, 40, 2))) == 3 * tiles
    assert visited(call._replace(normalizer="argmax_k")) == visited(call._replace(normalizer="argmax_q")) == 2 * tiles
    assert visited(call._replace(normalizer="none", bias=scores((1, 2, 40, 70))), 0b1000) == 2 * tiles
    assert visited(call._replace(normalizer="relu", topk=3)) == (16 + 1 + 1) * tiles


def test_what_mixed_heads_make_of_the_tiles_that_they_visit():
    """All gradients, of hidden keys that are NaN too."""
    check_op([*Call(*arguments(2, 40, 70, 2, bias=scores((1, 2, 40, 70)), sink=torch.randn(2)))._replace(
        **mixtures(2), **of_two_heads(), query_weight=torch.rand(2, 40, 2))])  # fmt: skip
    call = Call(*arguments(1, 40, 70, 2, normalizer="sigmoid"))._replace(**mixtures(2), **HIDDEN["keys"][0]())
    call.k[:, 40:] = call.v[:, 36:] = math.nan
    check_op([*call])
    for normalizer in ("argmax_k", "argmax_q"):
        check_op([*call._replace(normalizer=normalizer, **HIDDEN["ids"][0]())])
    call = Call(*arguments(1, 40, 70, 3, mask=HIDDEN["masks of two heads"][0]()["mask"][:, :1]))._replace(
        **mixtures(3), **HIDDEN["levels and causal"][0](), gain=scores((1, 1, 40, 70)), weight=scores((1, 3, 40, 70)),
        early_gain=scores((1, 3, 40, 70)), topk=5)  # fmt: skip
    check_op([*call])


@pytest.mark.parametrize("normalizer", ["argmax_k", "argmax_q", "sigmoid"])
def test_hidden_tiles_neither_choose_nor_count_for_the_means_of_keys(normalizer, tuned, monkeypatch):
    """Of two samples; a sample's row of tiles and another's column see nothing."""
    tuned(16, 32)
    hard, means = (sys.modules[f"vitkern.triton_kernels._attention_{name}"] for name in ("hard", "key_means"))
    seen = torch.rand(2, 1, 40, 70) < 0.5
    seen[0, :, 16:32] = seen[1, :, :, 32:64] = False
    args = arguments(2, 40, 70, 1, mask=seen, normalizer=normalizer)
    args[Call._fields.index("query_weight")] = torch.rand(2, 40, 1)
    check_op(args)
    visits, module = [], hard if normalizer.startswith("argmax") else means
    monkeypatch.setattr(module, "scores", lambda *x, inner=module.scores: visits.append(1) or inner(*x))
    kernels.fwd(*args)
    assert len(visits) == 2 * 3 + 3 * 2
    args = arguments(1, 70, 40, 1, normalizer=normalizer)  # all visited, by tiles that are not square
    args[Call._fields.index("query_weight")] = torch.rand(1, 70, 1)
    check_op(args)


def test_hidden_tiles_of_a_bias_and_of_packed_sequences_are_not_visited(tuned, monkeypatch):
    """Two samples that share a bias; two sequences of 40 and 20 queries, in which ids part three tiles of queries."""
    tuned(16, 16)
    visits, module = [], sys.modules["vitkern.triton_kernels._attention_tiles"]
    inner = module.scores
    monkeypatch.setattr(module, "scores", lambda *x: visits.append(1) or inner(*x))
    seen = torch.rand(2, 2, 40, 70) < 0.5
    seen[0, 0, :16] = seen[1, :, :, 16:64] = False
    args = Call(*arguments(2, 40, 70, 2, bias=scores((1, 2, 40, 70)), mask=seen))
    out, *saved = kernels.fwd(*args)
    kernels.bwd(out, None, None, *saved, *args, 0b1000)
    assert len(visits) == 2 * (2 * 5 + 3 * 5 + 2 * 3 * 2)  # delta and the bias
    visits.clear()
    ids = [
        torch.cat([torch.arange(n)[:m] // 16 for m in lengths])[None].int()
        for n, lengths in ((40, (40, 20)), (70, (70, 33)))
    ]
    bounds = [torch.tensor(x).int() for x in ((0, 40, 60), (0, 70, 103))]
    args = Call(*arguments(1, 60, 103, 2, bias=scores((1, 1, 40, 70))))._replace(
        cu_q=bounds[0], cu_k=bounds[1], max_q=40, max_k=70, q_ids=ids[0], k_ids=ids[1], rule="equal"
    )
    out, *saved = kernels.fwd(*args)
    kernels.bwd(out, None, None, *saved, *args, 0b1111)
    assert len(visits) == 4 * 2 * (3 + 2)  # delta, dq, dk and dv, the bias
    check_op([*args])
    visits = mixed_visits(monkeypatch)
    args = args._replace(**mixtures(2))
    out, *saved = kernels.fwd(*args)
    kernels.bwd(out, None, None, *saved, *args, 0b1111)
    assert len(visits) == 8 * (3 + 2)
    check_op([*args])


@pytest.mark.parametrize("normalizer", ["softmax", "none"])
def test_few_queries_share_out_their_keys(normalizer, tuned):
    """Three parts of ten tiles, one of which a row does not see at all; a sink counts once, a NaN stays where it is seen."""
    tuned(16, 16)
    seen = torch.rand(1, 1, 5, 150) < 0.7
    seen[..., 0, 40:] = False
    seen[..., 1, :] = False
    given = {"sink": torch.randn(1)} if normalizer == "softmax" else {}
    args = arguments(
        1, 5, 150, 1, dv=20, mask=seen, normalizer=normalizer, seed=torch.tensor([3]), dropout_p=0.2, **given
    )
    whole = kernels.fwd(*args)
    tuned(16, 16, 3)
    for name, x, y, z in zip(
        OP.outputs,
        *(f(*a) for f, a in ((kernels.fwd, args), (OP.definition, wide(args)), (OP.definition, args))),
        strict=True,
    ):
        testing.assert_close_to_oracle(name, x, y, z)
    for value in (math.nan, math.inf):
        args[2] = args[2].clone()
        args[2][0, 141, 0, 18] = value
        (out, *_), (want, *_) = kernels.fwd(*args), OP.definition(*args)
        assert torch.equal(out.isfinite(), want.isfinite()) and not out.isinf().any()
    assert torch.equal(whole[1].isfinite(), kernels.fwd(*args)[1].isfinite())


SHARED_OUT = {
    "few queries": (5, 150, {"sink": torch.randn(2), "bias": scores((1, 2, 1, 150)), "factor": torch.rand(2)}, {}),
    "few keys": (150, 5, {"bias": scores((1, 1, 150, 1)), "key_bias": scores((1, 1, 1, 5)), "dtype": HALF}, {}),
    "sigmoid": (7, 140, {"normalizer": "sigmoid", "bias": scores((1, 2, 7, 1)), "kv_heads": 1},
                {"query_weight": torch.rand(1, 7, 2)}),
    "distances": (3, 140, {"dv": 20}, {"slope": torch.rand(2), "q_xy": torch.randn(1, 3, 2), "k_xy": torch.randn(1, 140, 2)}),
    "distances of keys": (140, 3, {}, {"slope": torch.rand(2), "q_xy": torch.randn(1, 140, 2), "k_xy": torch.randn(1, 3, 2)}),
    "policy": (4, 140, {"d": 20}, {"policy": torch.rand(1, 140), "policy_eps": 1e-2, "policy_diagonal": True}),
    "policy of few keys": (140, 4, {"kv_heads": 1}, {"policy": torch.rand(1, 4), "policy_eps": 1e-2}),
    "packed": (9, 290, {}, {"cu_q": torch.tensor([0, 4, 9]).int(), "cu_k": torch.tensor([0, 140, 290]).int(), "max_q": 5,
                            "max_k": 150, "query_weight": torch.rand(1, 9, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SHARED_OUT)
def test_the_backward_shares_out_what_few_queries_or_keys_visit(case, tuned, monkeypatch):
    """In three parts, and with the same bits again; one of ten tiles is seen by none."""
    queries, keys, given, more = SHARED_OUT[case]
    mask = torch.rand(1, 1, 5 if case == "packed" else queries, 150 if case == "packed" else keys) < 0.7
    mask[..., 32:48] = False if keys > 100 else mask[..., 32:48]
    call = Call(*arguments(1, queries, keys, mask=mask, **given))._replace(**more)
    found = []
    module = sys.modules["vitkern.triton_kernels.attention_bwd"]
    monkeypatch.setattr(module, "shares", lambda *x, inner=module.shares: found.append(inner(*x)) or found[-1])
    tuned(16, 16, 14 if case == "packed" else 6)
    check_op([*call])
    assert max(found) > 1
