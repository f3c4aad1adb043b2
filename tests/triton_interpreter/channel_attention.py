"""channel_attention in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.channel_attention import make
from vitkern.triton_kernels import channel_attention as kernels

ENTRY = testing.entries()["channel_attention"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: str(c.seed))
def test_small_calls(call):
    testing.assert_matches(ENTRY, call, (torch.float32, torch.float16)[call.seed % 2], "triton")


@pytest.mark.parametrize("seed", range(3))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


@pytest.mark.parametrize("programs", [1, 40, 1000])
def test_any_number_of_splits(programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    testing.assert_matches(ENTRY, make(1, 1, (900,), 1, 8, lengths=(600, 0, 300)), torch.float32, "triton")


def test_refusals_are_sentences():
    x = torch.zeros(1, 1, 4, 1, 2, dtype=torch.float64)
    why = kernels.supported(x, x, x, None, None, None, None, None, True, "softmax", [1] * 9, [], 1.0, 1e-12)
    assert why == [
        "q must be float32, bfloat16 or float16, got torch.float64",
        "at most 8 top-k softmaxes are mixed, there are 9",
    ]
