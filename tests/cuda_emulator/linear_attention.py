"""linear_attention in CUDA C++, emulated on the CPU: calls of every kind, each in one of both dtypes, under several schedules.
test_cuda_emulated.py runs this file under the sanitizers, in parts; without them it is for debugging.
"""

import os
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from emulated import emulated
from emulated_linear import CALLS, check, draw

from vitkern.ops import _linear_gpu

PART, PARTS = map(int, os.environ.get("VITKERN_PART", "0/1").split("/"))
torch.set_num_threads(1)


def part(items):
    return list(items)[PART::PARTS]


@pytest.fixture(scope="module")
def build():
    return emulated(sanitize="libasan" in os.environ.get("LD_PRELOAD", ""))


@pytest.mark.parametrize("name", part(CALLS))
def test_calls(build, name):
    check(build, CALLS[name], (torch.bfloat16, torch.float16)[len(name) % 2], range(2))


@pytest.mark.parametrize("name", part(("tiles", "weights", "a wide head", "packed")))
def test_all_tiles_of_a_sequence_in_one_run(build, name, monkeypatch):
    monkeypatch.setattr(_linear_gpu, "WAVE", 1)
    check(build, CALLS[name], torch.float16, range(2))


@pytest.mark.parametrize("seed", part(range(4)))
def test_sampled_calls(build, seed):
    check(build, draw(build, random.Random(f"cuda {seed}")), (torch.bfloat16, torch.float16)[seed % 2], (seed,))
