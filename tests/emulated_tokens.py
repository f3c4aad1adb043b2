"""The token operators on the emulated CUDA kernels: one call against the oracle, under several schedules."""

import torch
from emulated import check_schedules
from gpu_path import tokens_on_gpu

from vitkern import testing

SEEDS = range(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("bipartite_match", "merge_plan", "merge_tokens", "unmerge_tokens")
ENTRIES = testing.entries()


def check(build, name, call, dtype, seeds=SEEDS):
    with build.active(), tokens_on_gpu("cuda"):
        check_schedules(build, ENTRIES[name], call, dtype, seeds)
