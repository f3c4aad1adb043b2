"""select_tokens in Triton, interpreted on the CPU, against the reference: what it chooses bit for bit, and the functions
that move what it chooses. Run by tests/test_triton.py."""

import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.reference.select_tokens import select_tokens as definition
from vitkern.triton_kernels import select_tokens as kernels

ENTRIES = testing.entries()
NAMES = ("select_tokens", "drop_tokens")
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0, 1e-45, -1e-45)


def check(score, threshold=None, protect=0, most=0, slots=None, by_score=False, fuse=False):
    """The kernel and the reference give the same tensors."""
    slots = min(most + protect, score.shape[1]) if slots is None else slots
    args = (score, threshold, protect, most, slots, by_score, fuse)
    assert kernels.supported(*args) == []
    with testing.poisoned():
        found = kernels.fwd(*args)
    for name, got, want in zip(("token_map", "perm", "offsets", "lengths"), found, definition(*args), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, want), f"{name}: {got.tolist()}, not {want.tolist()}"


@pytest.mark.parametrize("name", NAMES)
def test_small_calls(name):
    with tokens_on_gpu("triton"):
        for call in ENTRIES[name].small():
            testing.assert_matches(ENTRIES[name], call, torch.float32, "triton", grad=False)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", NAMES)
def test_sampled_calls(name, seed):
    call = ENTRIES[name].draw(random.Random(f"triton {seed}"))
    with tokens_on_gpu("triton"):
        testing.assert_matches(ENTRIES[name], call, torch.float32, "triton")


@pytest.mark.parametrize("by_score, fuse", [(False, True), (True, False)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
def test_ties_and_special_scores(tokens, by_score, fuse):
    g = torch.Generator().manual_seed(tokens)
    score = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (3, tokens), generator=g)]
    score[1] = torch.randint(-2, 3, (tokens,), generator=g).float()
    score[2] = 0.25
    protect = min(2, tokens // 2)
    check(score, None, protect, (tokens - protect) // 2, None, by_score, fuse)


def test_0_and_minus_0_are_one_score():
    score = torch.tensor([[-0.0, 0.0, -0.0, 1.0, 0.0, -1.0]])
    for most in (1, 2, 4, 5):
        check(score, most=most, by_score=True)
        check(score, most=most)


def test_nan_is_kept_among_minus_infinity_by_position():
    score = torch.tensor([[math.nan, -math.inf, 1.0, -math.inf, -math.nan, -3e38]])
    for most in (0, 1, 2, 4, 6):
        check(score, most=most, by_score=True, fuse=True)


def test_thresholds_of_each_sample():
    score = torch.tensor(SPECIAL + (0.5, 0.5)).repeat(7, 1)
    least = torch.tensor([-math.inf, math.inf, math.nan, 0.0, -0.0, 0.5, 2.0])
    check(score, least, 0, 11, 11, True, True)
    check(score, least, 1, 10, 11)
    check(score, least, 2, 3, 9)
    check(score[:2], least[:2], 11, 0, 11)


def test_protected_tokens_come_before_infinite_scores():
    score = torch.tensor([[-1.0, math.nan, math.inf, 2.0, math.inf]])
    for most in range(4):
        check(score, protect=2, most=most, by_score=True)


def test_all_tokens_are_chosen_where_more_are_asked_for():
    score = torch.randn(2, 9)
    check(score, protect=3, most=100)
    check(score, protect=3, most=6, by_score=True)


def test_scores_of_any_strides():
    check(torch.randn(20, 3).T, torch.zeros(1).expand(3), 1, 7, 9, True)


def test_empty_batches_and_samples():
    check(torch.zeros(0, 5), most=3)
    check(torch.zeros(2, 0))
    check(torch.zeros(2, 0), torch.zeros(2), by_score=True)


def test_refusals_are_sentences():
    score = torch.zeros(1, 5000, dtype=torch.float64)
    assert kernels.supported(score, None, 1, 5, 6, False, False) == [
        "score must be float32, got torch.float64",
        "a sample may hold 4096 tokens, it has 5000",
    ]
