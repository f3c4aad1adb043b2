"""bipartite_match in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.ops import bipartite_match as op
from vitkern.testing.bipartite_match import draw, make, small
from vitkern.triton_kernels import bipartite_match as kernels

ENTRY = testing.entries()["bipartite_match"]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Public calls with backend="cpu" run the Triton launch function on CPU tensors, in tiles of a size to be chosen."""

    def run(used, args, backend, *refusals):
        if backend == "reference":
            return used.definition(*args)
        assert kernels.supported(*args) == []
        return kernels.fwd(*args)

    def use(rows, columns, channels=32):
        tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_C": channels, "warps": 4, "stages": 1}
        monkeypatch.setattr(kernels, "TILES", {2: tile, 4: tile})

    monkeypatch.setattr(op._call, "run", run)
    use(16, 16)
    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("call", small(), ids=str)
def test_small_calls(call, dtype):
    testing.assert_matches(ENTRY, call, dtype, "cpu")


@pytest.mark.parametrize("seed", range(14))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, draw(random.Random(f"triton {seed}")), torch.float32, "cpu")


def test_widths_of_several_blocks_and_unequal_tiles(tiles):
    tiles(16, 64, 16)
    testing.assert_matches(ENTRY, make(1, 2, 70, 130, integers=True), torch.float32, "cpu")
    testing.assert_matches(ENTRY, make(2, 1, 70, 150, heads=2), torch.float16, "cpu")


def test_refusals_are_sentences():
    args = op._lower(torch.zeros(1, 4, 2, dtype=torch.float64))[0]
    assert kernels.supported(*args) == ["metric must be float32, bfloat16 or float16, got torch.float64"]
    assert vitkern.bipartite_match(torch.zeros(1, 4, 2)).dst.dtype == torch.int32
