"""chain_sum and chain_links in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.chain_sum import make
from vitkern.triton_kernels import chain_sum as kernels

ENTRY = testing.entries()["chain_sum"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: str(c.seed))
def test_small_calls(call):
    testing.assert_matches(ENTRY, call, (torch.float32, torch.float16)[call.seed % 2], "triton")


@pytest.mark.parametrize("seed", range(4))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


@pytest.mark.parametrize("link", ["none", "shared", "rows", "columns", "deep"])
@pytest.mark.parametrize("reverse", [False, True])
def test_walks_of_several_steps(link, reverse, monkeypatch):
    """More visits than a step holds, blocks that end inside one, more columns than a program has; deep: visit by visit."""
    if link == "deep":
        monkeypatch.setattr(kernels, "MAX_STEP_DEPTH", 0)
    options = {"link": "shared" if link == "deep" else link, "state": True, "order": True}
    call = make(3, 1, 19, 1, 5, 35, reverse=reverse, block=11 if reverse else 0, **options)
    testing.assert_matches(ENTRY, call, torch.float32, "triton")


def test_refusals_are_sentences():
    x = torch.zeros(1, 4, 2, 300, dtype=torch.float64)
    why = kernels.supported(x, x, x, None, None, None, None, False, False, False, 0)
    assert why == [f"{n} must be float32, bfloat16 or float16, got torch.float64" for n in "abc"] + [
        "a state may have 257 rows and columns, it has 300 and 300"
    ]
