"""neighborhood_attention and its halves in Triton, interpreted on the CPU, against the reference in float64. Run by
tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.testing.neighborhood_attention import make
from vitkern.triton_kernels import _neighborhood_host
from vitkern.triton_kernels import neighborhood_attention as kernels
from vitkern.triton_kernels import neighborhood_attention_bwd as gradients

ENTRIES = [testing.entries()[name] for name in ("neighborhood_attention", "neighborhood_qk", "neighborhood_av")]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(gradients, "RPB_PROGRAMS", 1)  # a program costs milliseconds here
    monkeypatch.setattr(_neighborhood_host, "CONFIGS", ((4, 256, 64, 32, 4, 1),))
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize(
    "entry, call", [(e, c) for e in ENTRIES for c in e.small()], ids=lambda x: getattr(x, "name", None) or str(x.seed)
)
def test_small_calls(entry, call):
    testing.assert_matches(entry, call, (torch.float32, torch.float16)[call.seed % 2], "triton")


@pytest.mark.parametrize("seed", (0, 1, 3))
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_sampled_calls(entry, seed):
    testing.assert_matches(entry, entry.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


def test_any_number_of_chunks_of_rpb(monkeypatch):
    monkeypatch.setattr(gradients, "RPB_PROGRAMS", 100)
    testing.assert_matches(ENTRIES[0], make(1, (5, 6), (2, 3), heads=1, d=4), torch.float32, "triton")


@pytest.mark.parametrize(
    "call",
    [
        make(
            1, (150,), (40,), heads=1, stride=7, d=4
        ),  # several tiles, boxes of several blocks, several blocks of offsets
        make(2, (12, 18), (3, 5), heads=1, d=4, batch=1, extra=20, masked=True),
        make(3, (20, 9), (5, 4), heads=2, kv_heads=1, d=4, batch=1, border="zero", dilation=(2, 1)),
    ],
    ids=str,
)
def test_more_than_one_tile(call, monkeypatch):
    monkeypatch.setattr(_neighborhood_host, "CONFIGS", ((4, 256, 32, 16, 4, 1),))
    testing.assert_matches(ENTRIES[0], call, torch.float32, "triton")


def test_refusals_are_sentences():
    x = torch.zeros(1, 1, 1, 4, 1, 300, dtype=torch.float64)
    why = kernels.supported(x, x, x, x, None, None, None, [1, 1, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0], False, 1.0)
    assert why == [
        "q, k, v must share float32, bfloat16 or float16, got torch.float64, torch.float64, torch.float64",
        *(f"the head size of {name} must lie in 1..256, got 300" for name in "qkv"),
        "rpb must be float32, bfloat16 or float16, got torch.float64",
    ]
