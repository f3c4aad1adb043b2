"""window_attention with further options in Triton, interpreted on the CPU, against the reference in float64: rows of windows, the
attention between them, and their sums. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.ops._window_places import Axis, places
from vitkern.ops.window_rows import window_rows, window_sum

ENTRY = testing.entries()["window_attention_options"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small(), ids=str)
def test_small_calls(call):
    testing.assert_matches(ENTRY, call, (torch.float32, torch.float16)[call.seed % 2], "triton")


@pytest.mark.parametrize("seed", range(3))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


@pytest.mark.parametrize("axis", [Axis(7, 3, 3, shift=1), Axis(7, 4, 2, grid=True), Axis(7, 4, 5, step=2, lead=1)])
@pytest.mark.parametrize("pads", [False, True])
def test_rows_and_sums_of_pads_and_of_several_owners(axis, pads):
    generator = torch.Generator().manual_seed(0)
    at = places((axis, Axis(4, 2, 2)), torch.device("cpu"))
    x, fill = torch.randn(2, 7, 4, 2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    rows = window_rows(x, at, fill, backend="triton")
    assert torch.equal(rows, window_rows(x, at, fill, backend="reference"))
    got, want = (window_sum(rows, at, (7, 4), pads=pads, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)
