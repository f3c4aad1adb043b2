"""The CUDA kernels of token matching and merging on the emulator: launches, ties, refusals, planted faults. Cases and
schedules are in cuda_emulator/tokens.py, which test_cuda_emulated.py runs under the sanitizers."""

import math
from types import SimpleNamespace

import pytest
import torch
from emulated import Edit, emulated
from emulated_tokens import check
from gpu_path import tokens_on_gpu

import vitkern
from vitkern.ops import _cuda
from vitkern.ops._gpu import Gpu
from vitkern.testing import bipartite_match, merge_plan, merge_tokens, unmerge_tokens

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def kernels():
    return emulated()


def test_match_plan_and_merge_are_three_launches_and_unmerging_is_one(kernels):
    x = torch.randn(2, 30, 16)
    with kernels.active(), tokens_on_gpu("cuda"):
        kernels.launched()
        plan = vitkern.merge_plan(vitkern.bipartite_match(x), r=7)
        y, size = vitkern.merge_tokens(x, plan, weight=torch.ones(2, 30))
        assert kernels.launched() == ["bipartite_match", "merge_plan", "merge_tokens"]
        again = vitkern.unmerge_tokens(y, plan)
        assert kernels.launched() == ["unmerge_tokens"]
    want = vitkern.merge_plan(vitkern.bipartite_match(x, backend="reference"), r=7, backend="reference")
    assert torch.equal(plan.token_map, want.token_map) and y.shape == (2, 23, 16) and size.sum() == 60
    torch.testing.assert_close(again, vitkern.unmerge_tokens(y, want, backend="reference"))


def minus_0_equals_0(kernels):
    score = torch.tensor([[0.0, -math.inf, -0.0, -math.inf, 0.0, -math.inf, -0.0, -math.inf]])
    role = torch.tensor([[0, 1] * 4], dtype=torch.int8)
    match = vitkern.Match(score, torch.ones(1, 8, dtype=torch.int32), role, 4, False)
    with kernels.active(), tokens_on_gpu("cuda"):
        for r in range(5):
            plan = vitkern.merge_plan(match, r=r)
            assert [i for i in range(0, 8, 2) if plan.token_map[0, i] == plan.token_map[0, 1]] == [0, 2, 4, 6][:r]


def ties_share_the_gradient(kernels):
    x = torch.tensor([[[1.0], [3.0], [3.0], [2.0], [3.0]]], requires_grad=True)
    plan = vitkern.MergePlan.from_map(torch.tensor([[0, 0, 0, 0, 1]]), 2)
    with kernels.active(), tokens_on_gpu("cuda"):
        vitkern.merge_tokens(x, plan, reduce="max")[0].sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.5, 0.5, 0.0, 1.0]


def the_first_of_the_longest_gets_its_gradient(kernels):
    x = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [1.0, 0.0]]])
    found = {}
    for backend in ("reference", "cuda"):
        leaf = x.clone().requires_grad_()
        plan = vitkern.MergePlan.from_map(torch.tensor([[0, 0, 0]]), 1)
        with kernels.active(), tokens_on_gpu("cuda"):
            vitkern.merge_tokens(leaf, plan, reduce="mlerp", backend=backend)[0][..., 0].sum().backward()
        found[backend] = leaf.grad
    torch.testing.assert_close(found["cuda"], found["reference"])


def a_mean_of_length_0_has_a_gradient(kernels):
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.0]]], requires_grad=True)
    plan = vitkern.MergePlan.from_map(torch.tensor([[0, 0]]), 1)
    with kernels.active(), tokens_on_gpu("cuda"):
        y, _ = vitkern.merge_tokens(x, plan, reduce="mlerp")
        y.sum().backward()
    assert y.tolist() == [[[0.0, 0.0]]] and x.grad.isfinite().all() and (x.grad > 1e12).all()


def infinite_rows_match_nothing(kernels):
    call = bipartite_match.make(4, 1, 40, 5, damage="inf", similarity="dot")
    check(kernels, "bipartite_match", call, torch.float32, seeds=(0,))


DIRECT = (
    minus_0_equals_0,
    ties_share_the_gradient,
    the_first_of_the_longest_gets_its_gradient,
    a_mean_of_length_0_has_a_gradient,
    infinite_rows_match_nothing,
)


@pytest.mark.parametrize("property", DIRECT, ids=lambda f: f.__name__)
def test_properties(kernels, property):
    property(kernels)


def test_the_choice_falls_to_what_can_run(kernels):
    x = torch.randn(1, 8, 4)
    plan = torch.zeros(1, 8, dtype=torch.int32)
    args = (x, plan, plan, torch.tensor([[0, 8]], dtype=torch.int32), None, "mean", True)
    alone = Gpu(cuda=_cuda.MERGE)
    both = Gpu(lambda: SimpleNamespace(supported=lambda *_: []), _cuda.MERGE)
    with kernels.active():
        assert both.choose(args) == "cuda"
        strided = (torch.randn(1, 4, 8).mT, *args[1:])
        (reason,) = _cuda.merge_refusals(strided)
        assert "last dimension must be contiguous, its stride is 8" in reason
        assert both.choose(strided) == "triton"
        assert alone.choose(strided) == "reference"
        assert "it is torch.float64" in _cuda.match_refusals((x.double(),))[0]
        assert (
            "weights must not be torch.float64" in _cuda.merge_refusals((*args[:4], x[..., 0].double(), *args[5:]))[0]
        )
        wide = (torch.zeros(1, 8, 8193), *args[1:5], "mlerp", True)
        assert "reduce='mlerp' takes at most 8192 channels, there are 8193" in _cuda.merge_refusals(wide)[0]
        with pytest.raises(RuntimeError, match="mlerp counts every token and takes at most 8192 channels"):
            _cuda.merge(*wide)
        many = torch.zeros(1, 5000)
        assert _cuda.plan_refusals((many, many, many, None, None, 1, 1, "split")) == []
        (reason,) = _cuda.plan_refusals((many, many, many, None, None, 1, 1, "score"))
        assert "order='score' takes at most 4096 tokens, there are 5000" in reason
    with pytest.raises(ValueError, match="cuda: the tensors are on cpu"):
        vitkern.bipartite_match(x, backend="cuda")


MATCHES = [
    ("bipartite_match", bipartite_match.make(1, 1, 150, 40, integers=True)),
    ("bipartite_match", bipartite_match.make(2, 1, 150, 8, integers=True, damage="nan", partition="index")),
]
COSINE = [("bipartite_match", bipartite_match.make(3, 1, 40, 5))]
PLANS = [
    ("merge_plan", merge_plan.make(1, 1, 600, r=150, roles=(0, 0, 1, 2, 3), values=3)),
    ("merge_plan", merge_plan.make(2, 1, 40, r=9, order="score", roles=(0, 1, 2, 4))),
]
MERGES = [
    ("merge_tokens", merge_tokens.make(1, 1, 12, 4, 264, weight="sizes", dropped=False)),
    ("merge_tokens", merge_tokens.make(2, 1, 12, 4, 8, weight="sizes", include_dst=False)),
    ("unmerge_tokens", unmerge_tokens.small()[0]),
]
MLERPS = [
    ("merge_tokens", merge_tokens.make(1, 1, 12, 4, 264, weight="zeros", reduce="mlerp")),
    ("merge_tokens", merge_tokens.make(2, 2, 12, 4, 8, weight="sizes", reduce="mlerp")),
]
MATCH, PLAN, MERGE, MLERP = "bipartite_match.cu", "merge_plan.cu", "merge_tokens.cu", "merge_tokens_mlerp.cu"
GROUPS = "merge_tokens.cuh"
FAULTS = {
    "a tile read while it is written": (MATCH, "__syncthreads();  // the tile before has been read", "", MATCHES),
    "ties to the larger position": (MATCH, "with < partner[h]", "with > partner[h]", MATCHES),
    "the norm of another row": (MATCH, "(lane / 4 + 8 * h) * 2)", "lane / 4 + 8 * h)", COSINE),
    "broken rows that match": (MATCH, "broken |= !(fabsf(x[j]) < INFINITY);", "", infinite_rows_match_nothing),
    "a list with holes": (MATCH, "(1u << lane) - 1", "(2u << lane) - 1", MATCHES),
    "one tie too many": (PLAN, "int(seen + before) < ties", "int(seen + before) <= ties", PLANS),
    "-0 below 0": (PLAN, "score == 0.0f ? 0.0f : score", "score", minus_0_equals_0),
    "slots counted before they are listed": (PLAN, "slots[entry] = slot;\n    __syncthreads();", "slots[entry] = slot;", PLANS),
    "the destination overwritten": (PLAN, "          ++place;\n", "", PLANS),
    "the destination counted": (GROUPS, "p.include_dst ? s.first : min(s.first + 1, s.end)", "s.first", MERGES),
    "ties that do not share": (MERGE, "else ties[v] += x[v] == best[v];", "", ties_share_the_gradient),
    "the mean not taken off": (MERGE, "(of - weighted / total) / total", "of / total", MERGES),
    "sums read before they are there": (GROUPS, "= x;\n  __syncthreads();\n  float sum", "= x;\n  float sum", MERGES),
    "tokens without a slot": (MERGE, "if (slot >= 0 && slot < p.slots) load", "load", MERGES[2:]),
    "sums overwritten before they are read": (GROUPS, "return x;\n  __syncthreads();", "return x;", MLERPS),
    "the rows of two groups in one place": (MLERP, "group * row_floats<kVector, kGroup>(p.width)", "0", MLERPS[1:]),
    "the last of the longest tokens": (MLERP, "norm > m.longest", "norm >= m.longest", the_first_of_the_longest_gets_its_gradient),
    "the length of the mean not held": (MLERP, "dy[v] - back * u", "dy[v]", MLERPS),
    "the longest token without its part": (MLERP, "i == m.leader ? of_leader * x[v] : 0.0f", "0.0f", MLERPS),
    "a mean of length 0": (MLERP, "length <= kLeastLength ? kLeastLength : length", "length", a_mean_of_length_0_has_a_gradient),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name):
    file, old, new, calls = FAULTS[name]
    broken = emulated((Edit(file, old, new),))
    with pytest.raises((AssertionError, RuntimeError)):
        if callable(calls):
            calls(broken)
            calls = ()
        for op, call in calls:
            check(broken, op, call, torch.float32, seeds=range(6))


def test_every_call_of_the_faults_passes_without_them(kernels):
    for op, call in (*MATCHES, *COSINE, *PLANS, *MERGES, *MLERPS):
        check(kernels, op, call, torch.float32, seeds=(0, 1))
