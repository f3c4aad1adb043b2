"""merge_tokens, unmerge_tokens and restore_tokens in Triton, interpreted on the CPU, against the reference in float64. Run
by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.triton_kernels import merge_tokens, restore_tokens

ENTRIES = testing.entries()
NAMES = ("merge_tokens", "unmerge_tokens", "restore_tokens")


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_small_calls(name):
    for call in ENTRIES[name].small():
        dtype = (torch.float32, torch.float16)[call.seed % 2]  # the interpreter is slow
        testing.assert_matches(ENTRIES[name], call, dtype, "triton")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_sampled_calls(name, seed):
    call = ENTRIES[name].draw(random.Random(f"triton {seed}"))
    testing.assert_matches(ENTRIES[name], call, torch.float32, "triton")


def test_refusals_are_sentences():
    x, plan = torch.zeros(1, 2, 9000, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int32)
    why = merge_tokens.supported(x, plan, plan, plan, None, "mean", True)
    assert why == [
        "x must be float32, bfloat16 or float16, got torch.float64",
        "a token may have 8192 channels, it has 9000",
    ]
    why = restore_tokens.supported(x[..., :4].float(), plan, x, None, 2, 0.0)
    assert why == ["fill must be float32, bfloat16 or float16, got torch.float64"]
