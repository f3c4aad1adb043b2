"""deformable_attention in CUDA C++, emulated on the CPU: the registry's calls, every dtype, under several schedules.
test_cuda_emulated.py runs this file under the sanitizers, in parts; without them it is for debugging.
"""

import random

import pytest
import torch
from emulated import check_schedules, part
from gpu_path import tokens_on_gpu

from vitkern import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENTRY = testing.entries()["deformable_attention"]


def contiguous(call):
    return "layout=channels" not in str(call)


SMALL = [(call, dtype) for call in ENTRY.small() for dtype in DTYPES if contiguous(call)]


@pytest.mark.parametrize("call, dtype", part(SMALL), ids=str)
def test_small_calls_of_the_registry(build, call, dtype):
    with build.active(), tokens_on_gpu("cuda"):
        check_schedules(build, ENTRY, call, dtype, range(3))


@pytest.mark.parametrize("seed", part(range(9)))
def test_sampled_calls(build, seed):
    call = ENTRY.draw(random.Random(f"cuda {seed}"))
    with build.active(), tokens_on_gpu("cuda"):
        check_schedules(build, ENTRY, call, DTYPES[seed % 3], (seed,))
