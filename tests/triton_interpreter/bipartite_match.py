"""bipartite_match in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.ops import bipartite_match as op
from vitkern.testing.bipartite_match import draw, make, small
from vitkern.triton_kernels import bipartite_match as kernels

ENTRY = testing.entries()["bipartite_match"]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Tiles of a size to be chosen."""

    def use(rows, columns, channels=32):
        tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_C": channels, "warps": 4, "stages": 1}
        monkeypatch.setattr(kernels, "TILES", {2: tile, 4: tile})

    use(16, 16)
    with tokens_on_gpu("triton"):
        yield use


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("call", small(), ids=str)
def test_small_calls(call, dtype):
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", range(6))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, draw(random.Random(f"triton {seed}")), torch.float32, "triton")


def test_widths_of_several_blocks_and_unequal_tiles(tiles):
    tiles(16, 64, 16)
    testing.assert_matches(ENTRY, make(1, 2, 70, 130, integers=True), torch.float32, "triton")
    testing.assert_matches(ENTRY, make(2, 1, 70, 150, heads=2), torch.float16, "triton")


def test_refusals_are_sentences():
    args = op._lower(torch.zeros(1, 4, 2, dtype=torch.float64))[0]
    assert kernels.supported(*args) == ["metric must be float32, bfloat16 or float16, got torch.float64"]
    assert vitkern.bipartite_match(torch.zeros(1, 4, 2)).dst.dtype == torch.int32
