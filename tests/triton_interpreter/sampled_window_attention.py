"""sampled_window_attention in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.testing.sampled_window_attention import make
from vitkern.triton_kernels import _sampled_tiles
from vitkern.triton_kernels import sampled_window_attention as kernels
from vitkern.triton_kernels import sampled_window_attention_bwd as gradients

ENTRY = testing.entries()["sampled_window_attention"]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(_sampled_tiles, "CONFIGS", ((4, 256, 64, 64, 4),))  # a program costs milliseconds here
    monkeypatch.setattr(gradients, "BIAS_PROGRAMS", 4)
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("call", ENTRY.small(), ids=lambda c: f"number{c.seed}")
def test_small_calls(call):
    wide = max(t.shape[-1] for name, t in call.tensors.items() if name in "qkv") > 64
    dtype = (torch.float32, torch.float16)[call.seed % 2 or wide]  # the interpreter is slow
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", (0, 2, 3))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float16, "triton")


@pytest.mark.parametrize("bias", ["both", "index"])
def test_more_than_one_tile(bias, monkeypatch):
    monkeypatch.setattr(_sampled_tiles, "CONFIGS", ((4, 256, 16, 16, 4),))
    call = make(1, (9, 7), (7, 5), heads=2, kv_heads=1, groups=2, d=6, bias=bias, places="special", exact=True, batch=1)
    testing.assert_matches(ENTRY, call, torch.float32, "triton")


def test_what_is_not_finite_stays_with_those_who_see_it():
    """Query 2 does not see sample 0, the only one that reads the first cell."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 2, 1, 4, generator=g) for _ in range(3)]
    y, x = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    places, bias = torch.stack((x, y), -1).view(1, 1, 1, 4, 1, 2), torch.zeros(1, 4, 4)
    bias[0, 2, 0] = -torch.inf
    for at, cell in ((0, (0, 1, 0, 0, 1)), (1, (0, 0, 0, 0, 3)), (2, (0, 0, 0, 0, 3)), (None, (0, 1, 0, 0, 1))):
        leaves = [t.clone() for t in tensors]
        if at is not None:
            leaves[at][cell] = torch.nan
        leaves = [t.requires_grad_() for t in leaves]
        out = vitkern.sampled_window_attention(*leaves, 2, places, bias=bias, backend="triton")
        upstream = torch.ones_like(out)
        if at is None:
            upstream[cell] = torch.nan
        dk, dv = torch.autograd.grad(out, leaves[1:], upstream)
        if at in (0, None):  # a query or its gradient: the cell that it does not see knows nothing of it
            assert dk[0, 0, 0].isfinite().all() and dv[0, 0, 0].isfinite().all()
            assert dk[0, 0, 1].isnan().any() and dv[0, 0, 1].isnan().any()
        else:
            assert out[0, 1, 0].isfinite().all() and out[0, 0, :, 0, 3].isnan().all()


def test_refusals_are_sentences():
    x, c = torch.zeros(1, 1, 1, 1, 300, dtype=torch.float64), torch.zeros(1, 1, 1, 1, 1, 2, dtype=torch.float64)
    assert kernels.supported(x, x, x, c, None, None, c, None, [1, 1], 1.0, False) == [
        "q, k, v must share float32, bfloat16 or float16, got torch.float64, torch.float64, torch.float64",
        "the head size of q must lie in 1..256 in torch.float64, got 300",
        "the head size of v must lie in 1..256 in torch.float64, got 300",
        "coords must be float32, bfloat16 or float16, got torch.float64",
        "bias must be float32, bfloat16 or float16, got torch.float64",
    ]
    far = torch.zeros(()).expand(1, 2**24, 1, 1, 4)
    why = kernels.supported(far, far, far, c.float(), None, None, None, None, [1, 1], 1.0, False)
    assert why == ["a map must have sides below 2^24, and an image of k or v must span fewer than 2^31 elements"]
    wide = torch.zeros(1, 1, 1, 1, 65)
    why = kernels.supported(wide, wide, wide[..., :4], c.float(), None, None, None, None, [1, 1], 1.0, False)
    assert why == ["the head size of q must lie in 1..64 in torch.float32, got 65"]
