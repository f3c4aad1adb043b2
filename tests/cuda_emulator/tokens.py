"""The token operators in CUDA C++, emulated on the CPU: the registry's calls, every dtype, under several schedules.
test_cuda_emulated.py runs this file under the sanitizers, in parts; without them it is for debugging.
"""

import random

import pytest
import torch
from emulated import part
from emulated_tokens import DTYPES, ENTRIES, NAMES, check

from vitkern.testing import bipartite_match, merge_plan, merge_tokens

SMALL = [
    (name, call, dtype)
    for name in NAMES
    for call in ENTRIES[name].small()
    for dtype in (DTYPES if name != "merge_plan" else DTYPES[:1])  # scores are float32
]


@pytest.mark.parametrize("name, call, dtype", part(SMALL), ids=str)
def test_small_calls_of_the_registry(build, name, call, dtype):
    check(build, name, call, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", part(range(12)))
def test_sampled_calls(build, name, seed):
    rng = random.Random(f"cuda {name} {seed}")
    check(build, name, ENTRIES[name].draw(rng), DTYPES[seed % 3], seeds=(seed,))


LARGER = [
    ("bipartite_match", bipartite_match.make(1, 1, 300, 300, integers=True)),  # sources that do not stay; two blocks
    ("bipartite_match", bipartite_match.make(2, 1, 260, 8, partition="random2d", grid=(16, 16), integers=True)),
    ("merge_plan", merge_plan.make(1, 2, 1100, r=300, roles=(0, 0, 1, 2, 3), values=3)),  # several tiles of the scan
    ("merge_plan", merge_plan.make(2, 1, 700, r=200, order="score", roles=(0, 1, 2, 4))),
    ("merge_tokens", merge_tokens.make(1, 1, 40, 12, 1100, weight="sizes")),  # a block per row
    ("merge_tokens", merge_tokens.make(2, 1, 40, 12, 131, weight="zeros", reduce="sum")),
    ("merge_tokens", merge_tokens.make(3, 1, 40, 12, 1100, weight="zeros", reduce="mlerp")),
    ("merge_tokens", merge_tokens.make(4, 1, 40, 12, 131, weight="sizes", reduce="mlerp")),
]


@pytest.mark.parametrize("name, call", part(LARGER), ids=str)
def test_more_than_one_tile(build, name, call):
    check(build, name, call, torch.bfloat16, seeds=(0, 1))
