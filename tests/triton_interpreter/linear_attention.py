"""linear_attention in Triton, interpreted on the CPU, from the public function down. Run by tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import feature_map, testing
from vitkern.ops import linear_attention as linear_file
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


MAPS = (*registry.LEARNED, *registry.STEPS)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=["float32", "float16"])
@pytest.mark.parametrize("name", MAPS)
def test_maps_with_parameters(name, dtype, monkeypatch):
    """Masks and weights over more than one part; then sequences of which one has no key."""
    signed = name in registry.STEPS
    monkeypatch.setattr(kernels, "PROGRAMS", 6)
    check(
        registry.make(
            1, 1, (70,), (40,), d=5, dv=20, name=name, masked=True, weight="heads", offset=0.5,
            normalizer="abs_max" if signed else "mean",
        ),
        dtype,
    )  # fmt: skip
    lengths = ((3, 3), (40, 2), (5, 50), (0, 1), *(() if name == "hash" else ((1, 0),)))
    check(
        registry.make(
            2, 1, (), heads=3, d=17, dv=8, lengths=lengths, name=name, masked=name != "hash", layout="channels",
            normalizer="subtract",
        ),
        dtype,
    )  # fmt: skip


@pytest.mark.parametrize("programs", [1, 4096])
@pytest.mark.parametrize("name", ["focused", "polar", "hedgehog_joint", "favor", "hash"])
def test_many_sequences_and_parts_of_maps(name, programs, monkeypatch):
    """Programs that walk several sequences, or a part of one."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(registry.make(3, 1, (6, 4), window_size=(2, 2), d=4, dv=6, name=name, masked=True, normalizer="subtract"))
    check(registry.make(4, 1, (70,), (40,), d=4, dv=40, name=name, normalizer="none"))


@pytest.mark.parametrize("name", ["focused", "focused_head", "hedgehog_split", "hedgehog_exp", "favor", "sign"])
def test_turned_features_of_maps(name):
    check(registry.make(5, 2, (40,), d=6, name=name, rope="half after", normalizer="none", masked=True))
    check(registry.make(6, 1, (9,), d=6, name=name, rope="interleaved after", normalizer="subtract"))


@pytest.mark.parametrize("name", ["hedgehog_joint", "favor", "hash"])
def test_matrices_of_more_channels_than_a_tile(name):
    check(registry.make(8, 1, (20,), (9,), d=40, dv=3, name=name, normalizer="none"))


@pytest.mark.parametrize("name", ["favor", "favor_relu", "sign"])
def test_grouped_heads_of_maps(name):
    check(registry.make(7, 1, (40,), (33,), heads=4, kv_heads=2, name=name, normalizer="none", weight="shared"))


def test_what_has_no_kernel_is_refused():
    q = torch.zeros(1, 1, 1, 1, 5, 2, 8)
    wide, omega = torch.zeros(1, 1, 1, 1, 5, 2, 257), torch.zeros(129, 8)
    rest = (0.0, "sum", 1e-6, 1.0, 0.0, False, False, False)
    assert kernels.supported(wide, wide, q, *(None,) * 11, "relu", *rest) == ["D must lie in 1..256, got 257"]
    assert kernels.supported(q, q, q, *(None,) * 8, omega, None, None, "favor", *rest) == [
        "a map may make 256 features by a matrix of 128 rows, it makes 129 by 129"
    ]
    anchors, matrix = torch.zeros(2, 33, 8), torch.zeros(2, 33, 65)
    assert kernels.supported(q, q, q, *(None,) * 8, anchors, matrix, anchors[..., 0], "hash", *rest) == [
        "64 anchors of a hash may have 64 channels and bits, 32 may have 128; 33 have 65"
    ]


def test_maps_beyond_the_kernels_stay_in_front():
    """Off the CPU the op makes the features that Triton makes, but for the CUDA C++ kernels."""
    q = torch.zeros(1, 5, 2, 8, device="meta")
    for rows, backend, wanted in ((128, None, True), (129, None, False), (129, "reference", True), (8, "cuda", False)):
        custom = feature_map.Favor(torch.zeros(rows, 8, device="meta"))
        lowered, custom = linear_file.lower(q, q, q, custom)
        assert linear_file._fused(lowered, custom, None, backend) == wanted
        assert lowered.feature_map == ("favor" if wanted else "identity")
    linear_file.features_in_front(lowered, custom)
    assert lowered.q.shape == lowered.k.shape == (1, 1, 1, 1, 5, 2, 8)


@pytest.mark.parametrize("rope", ["none", "half after"])
def test_wide_heads(rope):
    check(registry.make(1, 1, (5,), d=129, dv=3, rope=rope, name="elu1"))
    check(registry.make(1, 1, (20,), heads=1, d=200, dv=3, rope=rope, name="elu1", normalizer="mean"), HALF)


@pytest.mark.parametrize("name", ["focused", "polar", "hedgehog_joint", "hash"])
def test_each_gradient_of_a_map_alone(name):
    call = registry.make(8, 1, (20,), d=4, dv=6, name=name, normalizer="none", return_state=name != "polar")
    tensors = call.leaves(FULL, True)

    def run(wanted):
        leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in tensors.items()}
        with tokens_on_gpu("triton"):
            out = call.run(leaves, "triton")
        return torch.autograd.grad(sum(o.square().sum() for o in out), [leaves[n] for n in wanted])

    every = run(list(tensors))
    for i, name in enumerate(tensors):
        assert torch.equal(run([name])[0], every[i])


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
