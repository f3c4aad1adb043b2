"""merge_plan in Triton, interpreted on the CPU, against the reference, bit for bit. Run by tests/test_triton.py."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import reference, testing
from vitkern.testing.merge_plan import draw, small
from vitkern.triton_kernels import merge_plan as kernels

ENTRY = testing.entries()["merge_plan"]
ORDERS = ("split", "score", "position")
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-45, -1e-45)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Values are not looked at: a sample may keep more tokens than there are slots."""
    monkeypatch.setattr(reference.merge_plan, "refuse_too_many", lambda lengths, n_out: None)


def check(score, dst, role, r=None, threshold=None, most=None, n_out=None, order="split"):
    """The kernel and the reference give the same tensors."""
    tokens = score.shape[1]
    args = (score, dst, role, r, threshold, tokens if most is None else most, tokens if n_out is None else n_out, order)
    assert kernels.supported(*args) == []
    with testing.poisoned():
        found = kernels.fwd(*args)
    wanted = reference.merge_plan.merge_plan(*args)
    for name, got, want in zip(("token_map", "perm", "offsets", "lengths"), found, wanted, strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, want), f"{name}: {got.tolist()}, not {want.tolist()}"


def drawn(seed, batch, tokens, values, roles=(0, 0, 0, 1, 2, 3, 4)):
    """score out of `values`, dst, role: every source with a partner; the last token is a destination."""
    g = torch.Generator().manual_seed(seed)
    role = torch.tensor(roles, dtype=torch.int8)[torch.randint(0, len(roles), (batch, tokens), generator=g)]
    role[:, -1:] = 1
    score = torch.tensor(values)[torch.randint(0, len(values), (batch, tokens), generator=g)]
    among = (role == 1).float() + 1e-9 * (role != 1) if batch else torch.ones(batch, tokens)
    dst = torch.multinomial(among, tokens, True, generator=g) if batch else torch.zeros(batch, tokens)
    dst = torch.where(role.gather(1, dst.long()) == 1, dst, tokens - 1)
    return score, dst.to(torch.int32), role


@pytest.mark.parametrize("call", small(), ids=str)
def test_small_calls(call):
    with tokens_on_gpu("triton"):
        testing.assert_matches(ENTRY, call, torch.float32, "triton")


@pytest.mark.parametrize("seed", range(3))
def test_sampled_calls(seed):
    with tokens_on_gpu("triton"):
        testing.assert_matches(ENTRY, draw(random.Random(f"triton {seed}")), torch.float32, "triton")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
def test_ties_and_special_scores(tokens, order):
    for seed, values in enumerate((SPECIAL, (0.25,))):
        check(*drawn(seed, 1, tokens, values), most=max(1, tokens // 4), order=order)


def test_0_and_minus_0_are_one_score():
    score = torch.tensor([[-0.0, 0.0, -0.0, 1.0, 0.0, -1.0, 9.0]])
    dst, role = torch.full((1, 7), 6, dtype=torch.int32), torch.tensor([[0, 0, 0, 0, 0, 0, 1]], dtype=torch.int8)
    for most in (1, 2, 4, 5):
        check(score, dst, role, most=most, order="score")


def test_numbers_and_thresholds_of_each_sample():
    match = drawn(5, 7, 20, SPECIAL, (0, 0, 1, 4))
    least = torch.tensor([-math.inf, math.inf, math.nan, 0.0, -0.0, 0.5, 2.0])
    r = torch.tensor([-3, 0, 1, 2, 3, 20, 2**31 - 1], dtype=torch.int32)
    check(*match, r=r, most=4)
    check(*match, threshold=least, order="score")
    check(*match, r=r.flip(0), threshold=least, order="position")


@pytest.mark.parametrize("order", ORDERS)
def test_more_merge_where_there_are_fewer_slots(order):
    match = drawn(6, 2, 24, (-1.0, 0.0, 1.0, math.nan))
    r = torch.tensor([1, 9], dtype=torch.int32)
    for n_out in (18, 6, 0):  # the last ones are too few
        check(*match, r=r, n_out=n_out, order=order)


@pytest.mark.parametrize("role, order", [(0, "score"), (1, "split"), (2, "score"), (3, "score"), (4, "position")])
def test_one_role_alone(role, order):
    score, dst, _ = drawn(7, 1, 18, (1.0, 2.0, -math.inf))
    roles = torch.full((1, 18), role, dtype=torch.int8)
    check(torch.full_like(score, -math.inf) if role == 0 else score, dst, roles, order=order)


def test_a_source_whose_partner_merges_too_has_no_slot_and_a_partner_outside_stays_inside():
    score, role = torch.tensor([[3.0, 2.0, -math.inf]]), torch.tensor([[0, 0, 1]], dtype=torch.int8)
    token_map, perm, _, lengths = kernels.fwd(score, torch.tensor([[1, 2, 2]]), role, None, None, 2, 3, "split")
    assert token_map.tolist() == [[3, 0, 0]] and perm.tolist() == [[2, 1, 0]] and lengths.tolist() == [1]
    token_map = kernels.fwd(score, torch.tensor([[99, -99, 2]]), role, None, None, 2, 3, "split")[0]
    assert token_map.tolist() == [[0, 3, 0]]


def test_tensors_of_any_strides():
    match = [t.T.contiguous().T for t in drawn(8, 3, 20, (-1.0, 0.0, 1.0))]
    check(*match, r=torch.full((1,), 2, dtype=torch.int32).expand(3), order="score")


def test_empty_batches_and_samples():
    for batch, tokens in ((0, 5), (2, 0)):
        score, role = torch.zeros(batch, tokens), torch.zeros(batch, tokens, dtype=torch.int8)
        check(score, torch.zeros(batch, tokens, dtype=torch.int32), role, order="score")


def test_refusals_are_sentences():
    score, none = torch.zeros(1, 5000, dtype=torch.float64), torch.zeros(1, 5000, dtype=torch.int32)
    assert kernels.supported(score, none, none, None, None, 1, 4999, "split") == [
        "score must be float32, got torch.float64",
        "a sample may hold 4096 tokens, it has 5000",
    ]
