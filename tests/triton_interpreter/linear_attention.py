"""linear_attention in Triton, interpreted on the CPU, from the public function down. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.testing import linear_attention as registry
from vitkern.triton_kernels import linear_attention as kernels
from vitkern.triton_kernels import linear_pairs as pairs

ENTRY = testing.entries()["linear_attention"]
HALF, FULL = torch.float16, torch.float32  # the interpreter cannot multiply bfloat16
SMALL = registry.small()


def check(call, dtype=FULL):
    with tokens_on_gpu("triton"):
        testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("call", SMALL, ids=lambda c: str(c.seed))
def test_small_calls(call):
    check(call)


@pytest.mark.parametrize("call", [*SMALL[:4], *registry.by_pairs()[-4:]], ids=lambda c: str(c.seed))
def test_small_calls_in_float16(call):
    check(call, HALF)


@pytest.mark.parametrize("seed", range(6))
def test_sampled_calls(seed):
    check(registry.draw(random.Random(f"triton {seed}")))


def test_many_parts_and_tiles(monkeypatch):
    """Values of more than one tile; parts that hold one block, several or none."""
    for programs in (1, 6, 4096):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        check(
            registry.make(
                1, 1, (200,), (170,), heads=2, kv_heads=1, d=12, dv=70, masked=True, weight="heads", name="softmax"
            )
        )


def test_few_tokens_of_several_tiles(monkeypatch):
    """All pairs are taken of no call with wider heads in float32: that one makes a state."""
    seen = []
    launch = pairs.told
    monkeypatch.setattr(pairs, "told", lambda call, backward: seen.append(call.v.shape[6]) or launch(call, backward))
    for width in (64, 72):
        check(
            registry.make(
                2, 1, (40,), (38,), heads=2, kv_heads=1, d=64, dv=width, masked=True, weight="heads", name="elu1"
            )
        )
    assert set(seen) == {64}


def test_what_has_no_kernel_is_refused():
    q = torch.zeros(1, 1, 1, 1, 5, 2, 129)
    args = (q, q, q, *(None,) * 11, "relu", 0.0, "sum", 1e-6, 1.0, 0.0, False, False, False)
    assert kernels.supported(*args) == ["heads of float32 may have 128 channels, q has 129"]
    check(registry.make(1, 1, (5,), d=129, dv=3), HALF)


def test_each_gradient_alone():
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in "qkv")
    weight = torch.rand(1, 40, 2)
    tensors = [q, k, v, weight]

    def run(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        with tokens_on_gpu("triton"):
            out = vitkern.linear_attention(*leaves[:3], key_weight=leaves[3], feature_map="elu1")
        return torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted])

    every = run(range(4))
    for i in range(4):
        assert torch.equal(run([i])[0], every[i])
