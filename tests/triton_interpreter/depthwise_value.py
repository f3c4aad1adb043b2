"""depthwise_value in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.depthwise_value import make
from vitkern.triton_kernels import depthwise_value as kernels

ENTRY = testing.entries()["depthwise_value"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: str(c.seed))
def test_small_calls(call, dtype):
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", range(3))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


def test_more_cells_and_channels_than_a_tile_holds():
    testing.assert_matches(ENTRY, make(1, 3, (5, 9), 2, 40), torch.float32, "triton")


def test_chunks_of_several_tiles(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNKS", 2)
    testing.assert_matches(ENTRY, make(2, 5, (5, 7), 1, 3, sides=(3, 5)), torch.float32, "triton")


def test_what_has_no_kernel_is_refused():
    v, weight = torch.zeros(1, 4, 1, 2, dtype=torch.float64), torch.zeros(2, 1, 17, 3)
    assert kernels.supported(v, weight, None, (2, 2)) == [
        "v must be float32, bfloat16 or float16, got torch.float64",
        "the sides of weight may be 15, they are [17, 3]",
    ]
