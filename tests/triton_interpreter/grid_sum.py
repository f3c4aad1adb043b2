"""grid_sum and grid_links in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.testing.grid_sum import make
from vitkern.triton_kernels import grid_links
from vitkern.triton_kernels import grid_sum as kernels

ENTRY = testing.entries()["grid_sum"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small()[3:], ids=lambda c: str(c.seed))
def test_small_calls(call):
    testing.assert_matches(ENTRY, call, (torch.float16, torch.float32)[call.seed % 2], "triton")


@pytest.mark.parametrize("turned", [False, True])
def test_strips_blocks_and_tiles(turned, monkeypatch):
    """Several of each, the last of them with places to spare; blocks of columns in the middle of a row."""
    for name, size in (("BLOCK_R", 2), ("BLOCK_X", 2), ("BLOCK_F", 2), ("BLOCK_C", 4)):
        monkeypatch.setattr(kernels, name, size)
    monkeypatch.setattr(grid_links, "BLOCK_X", 2)
    call = make(20, 1, (3, 5), 1, 3, 4, turned=turned, swapped=turned)
    testing.assert_matches(replace(ENTRY, gradient=not turned), call, torch.float32, "triton")


def test_a_map_of_several_strips_and_tiles():
    call = make(21, 1, (17, 3), 1, 34, 17)
    testing.assert_matches(replace(ENTRY, gradient=False), call, torch.float32, "triton")


def test_rates_that_leave_nothing_and_rates_above_0():
    """Where a link leaves little, the gradients of links are not differences of larger sums."""
    for rate in (-8.0, 0.5):
        call = make(22, 1, (3, 4), 1, 3, 4)
        call.tensors["row"].fill_(rate)
        call.tensors["col"][:, ::2] = rate
        testing.assert_matches(ENTRY, call, torch.float32, "triton")


@pytest.mark.parametrize("name", ["Retention", "Manhattan", "Polyline"])
def test_linear_attention_with_a_decay_runs_the_kernels(name):
    q, k, v = torch.randn(3, 1, 6, 2, 3).unbind(0)
    rate = torch.tensor([-0.5, -0.1])
    links = -torch.rand(2, 1, 2, 3, 2)
    decay = {
        "Retention": vitkern.decay.Retention(rate), "Manhattan": vitkern.decay.Manhattan(rate, (2, 3)),
        "Polyline": vitkern.decay.Polyline(*links, (2, 3)),
    }[name]  # fmt: skip
    found, want = (vitkern.linear_attention(q, k, v, decay=decay, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(found, want)


def test_refusals_are_sentences():
    x = torch.zeros(1, 2, 2, 1, 3, dtype=torch.float64)
    link = x[..., 0]
    why = kernels.supported(x, x, x, link, link, False)
    assert why == [
        f"{n} must be float32, bfloat16 or float16, got torch.float64" for n in ("a", "b", "c", "row", "col")
    ]
    assert grid_links.supported(x, x, x, x, link, link, False) == why
