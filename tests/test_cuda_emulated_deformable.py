"""The CUDA kernels of deformable attention on the emulator: launches, refusals, planted faults. Cases and schedules are in
cuda_emulator/deformable_attention.py, which test_cuda_emulated.py runs under the sanitizers."""

import pytest
import torch
from emulated import Edit, check_schedules, emulated
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.ops import _deformable_cuda
from vitkern.testing.deformable_attention import TWO, make

pytestmark = pytest.mark.compile
ENTRY = testing.entries()["deformable_attention"]


@pytest.fixture(scope="module")
def kernels():
    return emulated()


def check(build, call, seeds=(0,)):
    with build.active(), tokens_on_gpu("cuda"):
        check_schedules(build, ENTRY, call, torch.float32, seeds)


@pytest.mark.parametrize("wanted", ["value", "where"])
def test_what_is_not_asked_for_is_not_launched(kernels, wanted):
    given = {"value": torch.randn(1, 30, 2, 8), "where": torch.rand(1, 5, 2, 2, 4, 2)}
    given[wanted].requires_grad_()
    with kernels.active(), tokens_on_gpu("cuda"):
        out = vitkern.deformable_attention(given["value"], TWO, given["where"], torch.rand(1, 5, 2, 2, 4))
        assert kernels.launched()[-1:] == ["deformable_attention"]
        out.sum().backward()
        assert kernels.launched() == ["deformable_places"] + ["deformable_cells"] * (wanted == "value")


def test_refusals_are_sentences(kernels):
    value, where = torch.zeros(1, 30, 2, 8), torch.zeros(1, 5, 2, 2, 4, 2)
    args = (value, where, where[..., 0], [6, 4, 3, 2], [4, 4])
    with kernels.active():
        assert _deformable_cuda.refusals(args) == []
        assert _deformable_cuda.refusals((value.double(), *args[1:])) == [
            "value must be float32, bfloat16 or float16, it is torch.float64"
        ]
        assert _deformable_cuda.refusals((value.mT.contiguous().mT, *args[1:])) == [
            "the channels of value must be contiguous, their stride is 2"
        ]
        assert _deformable_cuda.refusals((*args[:3], [1, 1] * 9, [4] * 9)) == [
            "spatial_shapes may hold 8 levels, it holds 9"
        ]


PLAIN = make(1, 2, 9, 2, 8, TWO, 4)
OWN = make(2, 2, 9, 2, 12, ((2, 5), (3, 1)), (3, 1))
NEAR = make(3, 2, 9, 2, 8, TWO, 4, method="nearest")
ODD = make(4, 2, 30, 1, 8, TWO, 4, places="special", exact=True)
ODD_NEAR = make(5, 1, 9, 1, 8, TWO, places="special", method="nearest")
FAULTS = {
    "half a cell": ("u = x * width - 0.5f", "u = x * width", PLAIN),
    "truncation": ("found.column = int(floorf(u))", "found.column = int(u)", PLAIN),
    "a corner outside": ("&& column < level.width;", "&& column <= level.width;", PLAIN),
    "the right border": ("u > -1.0f && u < width && v", "u > -1.0f && v", PLAIN),
    "shares of the other side": ("c & 2 ? at.fy : 1.0f - at.fy", "c & 2 ? 1.0f - at.fy : at.fy", PLAIN),
    "a place of no number": ("fabsf(x) < INFINITY && fabsf(y) < INFINITY", "true", ODD_NEAR),
    "the level's first cell": ("r.image, level.start, r.head) + c", "r.image, 0, r.head) + c", PLAIN),
    "half of a group": ("int bits = 1; bits < p.group", "int bits = 2; bits < p.group", PLAIN),
    "the height of a level": ("float(level.height) * a * dy", "float(level.width) * a * dy", PLAIN),
    "locations of nearest": ("const bool moves = at.alive && !p.nearest;", "const bool moves = at.alive;", NEAR),
    "a key too early": ("+ at.column + 1\n", "+ at.column\n", PLAIN),
    "points that are nowhere": (": int64_t(p.batch) * p.heads * p.padded;", ": 0;", ODD),
    "one row of left upper cells": ("side = p.nearest ? 1 : 0", "side = 1", PLAIN),
    "points of the level before": ("point % p.points - level.first", "point % p.points", OWN),
    "the image of a point": ("point / p.points / p.heads % p.queries", "point / p.points / p.heads", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name):
    old, new, call = FAULTS[name]
    broken = emulated((Edit("deformable_attention.cu", old, new),))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, call)


@pytest.mark.parametrize("call", [PLAIN, OWN, NEAR, ODD, ODD_NEAR], ids=str)
def test_every_call_of_the_faults_passes_without_them(kernels, call):
    check(kernels, call, range(3))
