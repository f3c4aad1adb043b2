"""feature_rows in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.feature_rows import make
from vitkern.triton_kernels import feature_rows as kernels

ENTRY = testing.entries()["feature_rows"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: str(c.seed))
def test_small_calls(call, dtype):
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", range(4))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


def test_more_tokens_than_a_tile_holds():
    testing.assert_matches(
        ENTRY, make(1, 1, 40, 1, 300, name="silu_norm", masked=True, weight="heads"), torch.float32, "triton"
    )


def test_what_has_no_kernel_is_refused():
    x = torch.zeros(1, 2, 1, 513)
    assert kernels.supported(x, None, None, "hash", 0.0, 1.0) == [
        "the feature map must be one of relu, elu1, identity, leaky_relu, exp, softmax, silu_norm, got hash",
        "x may have 512 channels, it has 513",
    ]
