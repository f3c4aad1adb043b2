"""selective_scan in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.selective_scan import make, make_2d
from vitkern.triton_kernels import selective_scan as kernels
from vitkern.triton_kernels import selective_scan_bwd

ENTRY = testing.entries()["selective_scan"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 4)
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", [c for c in ENTRY.small() if c.seed != 8], ids=lambda c: str(c.seed))
def test_small_calls(call):
    testing.assert_matches(ENTRY, call, (torch.float32, torch.float16)[call.seed % 2], "triton")


BLOCKS = [
    make(1, 1, 6, 5, 2, given="D z delta_bias", first=True, return_state=True),
    make(
        2,
        1,
        1,
        6,
        2,
        2,
        route="both",
        routed=True,
        own="uz",
        given="D z",
        lengths=(5, 0, 1),
        first=True,
        return_state=True,
    ),
    make_2d(3, 1, (2, 2), 6, 3, 3, routes=("col", "row_reverse"), rank=3, given="D z delta_bias", reduce="mean"),
]


@pytest.mark.parametrize("call", BLOCKS, ids=lambda c: str(c.seed))
def test_several_blocks_of_channels(call, monkeypatch):
    monkeypatch.setattr(kernels, "shared", few := lambda call, delta, _, whole=kernels.shared: whole(call, delta, 8))
    monkeypatch.setattr(selective_scan_bwd, "shared", few)
    testing.assert_matches(ENTRY, call, torch.float32, "triton")


def test_refusals_are_sentences():
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    why = kernels.supported(x, x.float(), x[0].float(), x.float(), x, *[None] * 5, None, None, True, "sum")
    assert why == ["u must be float32, bfloat16 or float16, got torch.float64"]
