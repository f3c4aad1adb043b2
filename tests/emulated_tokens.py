"""The token operators on the emulated CUDA kernels: one call against the oracle, under several schedules."""

import torch
from gpu_path import tokens_on_gpu

from vitkern import testing

SEEDS = range(8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("bipartite_match", "merge_plan", "merge_tokens", "unmerge_tokens")
ENTRIES = testing.entries()


def check(build, name, call, dtype, seeds=SEEDS):
    """Against the oracle, and the same bits under every schedule."""
    first = None
    with build.active(), tokens_on_gpu("cuda"):
        for seed in seeds:
            with build.schedule(seed):
                if first is None:
                    testing.assert_matches(ENTRIES[name], call, dtype, "cuda")
                with testing.poisoned():
                    found = call.run(call.leaves(dtype), "cuda")
                first = first or found
                for a, b in zip(found, first, strict=True):
                    assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), f"seed {seed} differs from the first"
