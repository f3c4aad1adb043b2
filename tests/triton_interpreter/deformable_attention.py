"""deformable_attention in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.triton_kernels import deformable_attention as kernels

ENTRY = testing.entries()["deformable_attention"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: f"number{c.seed}")
def test_small_calls(call):
    dtype = (torch.float32, torch.float16)[call.seed % 2]  # the interpreter is slow
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", (0, 2, 3))
def test_sampled_calls(seed):
    call = ENTRY.draw(random.Random(f"triton {seed}"))
    testing.assert_matches(ENTRY, call, torch.float32, "triton")


def test_refusals_are_sentences():
    x = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    assert kernels.supported(x, x.float(), x.float(), [1, 2], [1], False, False) == [
        "value must be float32, bfloat16 or float16, got torch.float64"
    ]
    why = kernels.supported(x.half(), x.half(), x.half(), [1, 2**24], [1], False, False)
    assert why == [f"a level must have sides below 2^24 and all fewer than 2^31 cells, got {[1, 2**24]}"]
