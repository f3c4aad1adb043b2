"""linear_attention in CUDA C++, emulated on the CPU: calls of every kind, each in one of both dtypes, under several schedules.
test_cuda_emulated.py runs this file under the sanitizers, in parts; without them it is for debugging.
"""

import random

import pytest
import torch
from emulated import part
from emulated_linear import CALLS, check, draw

from vitkern.ops import _linear_gpu


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
