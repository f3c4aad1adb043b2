"""window_attention in CUDA C++, emulated on the CPU: every case, dtype and schedule. test_cuda_emulated.py runs this file
under the sanitizers, in parts; without them (`pytest tests/cuda_emulator/window_attention.py`) it is for debugging.
"""

import pytest
import torch
from emulated import check_schedules, part
from emulated_window import CASES, check
from gpu_path import lowered, on_gpu

from vitkern import testing
from vitkern.ops import _window_gpu

SEEDS = range(8)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", part(CASES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cases_agree_with_the_oracle_under_every_schedule(build, name, dtype):
    check(build, CASES[name], dtype, SEEDS)


NAMES = ("window_attention", "window_attention_qkvpacked")
SMALL = [(testing.entries()[name], call) for name in NAMES for call in testing.entries()[name].small()]


@pytest.mark.parametrize("entry, call", part(SMALL), ids=lambda x: str(x) if isinstance(x, testing.Call) else x.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_calls_of_the_registry_match_under_every_schedule(build, entry, call, dtype):
    with build.active():
        if reasons := _window_gpu.cuda_refusals(lowered(call, call.leaves(dtype))):
            pytest.skip("; ".join(reasons))
        check_schedules(build, entry, on_gpu(call, ""), dtype, SEEDS)
