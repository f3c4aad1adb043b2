"""merge_tokens: invariants, edges and refusals. What every op must do is in tests/test_ops.py."""

import math

import pytest
import torch

import vitkern
from vitkern import MergePlan, testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def plan_of(x, r, **options):
    return vitkern.merge_plan(vitkern.bipartite_match(x, **options), r=r)


@ON
def test_weighted_means_against_the_one_hot_matrix(backend):
    x = torch.randn(3, 65, 12, dtype=torch.float64)
    weight = torch.randint(1, 9, (3, 65)).double()
    plan = plan_of(x, 20)
    assign = plan.source().double() * weight[:, None, :]
    y, size = vitkern.merge_tokens(x, plan, weight=weight, backend=backend)
    torch.testing.assert_close(size, assign.sum(-1))
    torch.testing.assert_close(y, assign @ x / size[..., None])
    total, _ = vitkern.merge_tokens(x, plan, weight=weight, reduce="sum", backend=backend)
    torch.testing.assert_close(total, assign @ x)
    sources, _ = vitkern.merge_tokens(x, plan, weight=weight, reduce="sum", include_dst=False, backend=backend)
    first = plan.perm.gather(1, plan.offsets[:, :-1].long()).long()
    left = (x * weight[..., None]).gather(1, first[..., None].expand(-1, -1, 12))
    torch.testing.assert_close(sources, total - left)


@ON
def test_ties_of_a_maximum_share_the_gradient_as_torch_does(backend):
    x = torch.randint(-2, 3, (2, 30, 7)).double().requires_grad_()
    plan = MergePlan.from_map(torch.stack([torch.randperm(30) % 5 for _ in range(2)]), 5)  # no slot is empty
    weight = torch.randn(2, 5, 7, dtype=torch.float64)
    got = vitkern.merge_tokens(x, plan, reduce="max", backend=backend)[0]
    slot = plan.token_map.long()[..., None].expand(-1, -1, 7)
    want = torch.full((2, 5, 7), -torch.inf, dtype=torch.float64).scatter_reduce(1, slot, x, "amax")
    assert torch.equal(got, want)
    (a,), (b,) = (torch.autograd.grad((t * weight).sum(), x) for t in (got, want))
    torch.testing.assert_close(a, b)


@ON
def test_mlerp_is_as_long_as_the_longest_token_of_the_slot(backend):
    x = torch.randn(3, 40, 12, dtype=torch.float64) * torch.rand(3, 40, 1, dtype=torch.float64)
    weight = torch.randint(1, 9, (3, 40)).double()
    plan = plan_of(x, 15)
    y, size = vitkern.merge_tokens(x, plan, weight=weight, reduce="mlerp", backend=backend)
    mean, same = vitkern.merge_tokens(x, plan, weight=weight, backend=backend)
    assert torch.equal(size, same)
    inside = plan.source()
    longest = (x.norm(dim=-1)[:, None, :] * inside).amax(-1)  # over the whole slot, its destination too
    torch.testing.assert_close(y.norm(dim=-1), longest)
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(y, mean, dim=-1), torch.ones_like(longest))
    first = plan.perm.gather(1, plan.offsets[:, :-1].long()).long()
    own = x.norm(dim=-1).gather(1, first)
    assert (inside.sum(-1).eq(1) | (longest > own)).any() and (longest == own)[inside.sum(-1) > 1].any()


@ON
def test_mlerp_of_tied_norms_zero_rows_and_empty_slots(backend):
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0], [1.0, 2.0], [-1.0, -2.0], [5.0, 1.0]], dtype=torch.float64)
    x = x[None].requires_grad_()
    plan = MergePlan.from_map(torch.tensor([[0, 0, 1, 2, 2, 4]]), 4)
    y, _ = vitkern.merge_tokens(x, plan, reduce="mlerp", backend=backend)
    torch.testing.assert_close(y[0, 0], torch.full((2,), math.sqrt(12.5), dtype=torch.float64))
    assert y[0, 1:].eq(0).all()  # a zero row, opposite rows, no row
    upstream = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]], dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, x, upstream)
    # mean (3.5, 3.5), M = 5: each half of 5 / |u| (1/2, -1/2); the first of the two longest also <u, dy> x / (|u| M)
    part = 0.5 * 5 / math.sqrt(24.5) * torch.tensor([0.5, -0.5], dtype=torch.float64)
    lead = math.sqrt(0.5) * torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(dx[0, :2], torch.stack((part + lead, part)))
    assert dx[0, 2:].eq(0).all()


@ON
def test_sizes_stay_exact_and_half_precision_does_not_overflow(backend):
    x = (torch.randn(1, 4096, 8) * 0.01 + 200).half()
    size, tokens = None, 4096
    for _ in range(12):
        match = vitkern.bipartite_match(x, protect=0, backend=backend)
        plan = vitkern.merge_plan(match, r=tokens // 2, clip=True, backend=backend)
        x, size = vitkern.merge_tokens(x, plan, weight=size, backend=backend)
        tokens = plan.n_out
        assert size.dtype == torch.float32 and float(size.sum()) == 4096.0
        assert x.isfinite().all() and float((x - 200).abs().max()) < 1.0
    assert float(size.max()) > 2048


@ON
def test_dropped_tokens_are_seen_by_nothing_and_get_no_gradient(backend):
    x = torch.randn(1, 6, 3)
    x[0, [1, 4]] = torch.nan
    x.requires_grad_()
    weight = torch.ones(1, 6, requires_grad=True)
    plan = MergePlan.from_map(torch.tensor([[0, 2, 1, 0, 2, 1]]), 2)
    for reduce in ("mean", "sum", "max", "first"):
        y, size = vitkern.merge_tokens(x, plan, weight=weight, reduce=reduce, backend=backend)
        assert y.isfinite().all() and size.tolist() == [[2.0, 2.0]]
        dx, dw = torch.autograd.grad(y.square().sum() + size.sum(), (x, weight))
        assert dx[0, [1, 4]].eq(0).all() and dw[0, [1, 4]].eq(0).all() and dx.isfinite().all() and dw.isfinite().all()


@ON
def test_a_token_without_a_part_gets_no_gradient_however_large_the_others_are(backend):
    x = torch.randn(1, 4, 3, requires_grad=True)
    plan = MergePlan.from_map(torch.tensor([[0, 0, 1, 1]]), 2)
    go = torch.full((1, 2, 3), math.inf)
    for options, alone in (({"reduce": "first"}, [1, 3]), ({"include_dst": False}, [0, 2])):
        y, _ = vitkern.merge_tokens(x, plan, backend=backend, **options)
        (dx,) = torch.autograd.grad(y, x, go)
        assert dx[0, alone].eq(0).all() and dx.isinf().any()


@ON
def test_an_untouched_token_comes_out_bit_for_bit_and_a_slot_of_size_0_is_0(backend):
    x = torch.randn(1, 5, 9)
    plan = MergePlan.from_map(torch.tensor([[0, 1, 2, 2, 3]]), 5)
    weight = torch.tensor([[0.3, 7.1, 0.0, 0.0, 1e-3]]).requires_grad_()
    y, size = vitkern.merge_tokens(x, plan, weight=weight, backend=backend)
    assert torch.equal(y[:, :2], x[:, :2]) and torch.equal(y[:, 3], x[:, 4])
    assert y[:, 2].eq(0).all() and y[:, 4].eq(0).all() and size[0, 4] == 0
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    assert grad.isfinite().all() and grad[0, 2:4].eq(0).all()


@ON
def test_all_tokens_in_one_slot(backend):
    x = torch.randn(2, 4096, 16)
    plan = MergePlan.from_map(torch.zeros(2, 4096, dtype=torch.int32), 1)
    first, _ = vitkern.merge_tokens(x, plan, backend=backend)
    eager, _ = vitkern.merge_tokens(x, plan, backend="reference")
    testing.assert_close_to_oracle("y", first[:, 0], x.double().mean(1), eager[:, 0])
    assert torch.equal(first, vitkern.merge_tokens(x, plan, backend=backend)[0])


@ON
def test_several_tensors_in_one_call(backend):
    x, places, cosines = torch.randn(2, 9, 4), torch.rand(2, 9), torch.randn(2, 9, 2, 3)
    plan = plan_of(x, 3)
    reduce = ("mean", "max", "first")
    assert "cpu: can run" in vitkern.explain(vitkern.merge_tokens, (x, places, cosines), plan, reduce=reduce)
    (a, b, c), size = vitkern.merge_tokens((x, places, cosines), plan, reduce=reduce, backend=backend)
    assert a.shape == (2, 6, 4) and b.shape == (2, 6) and c.shape == (2, 6, 2, 3) and size.shape == (2, 6)
    for t, one, reduce in ((x, a, "mean"), (places, b, "max"), (cosines, c, "first")):
        assert torch.equal(one, vitkern.merge_tokens(t, plan, reduce=reduce, backend=backend)[0])


@ON
def test_sizes_without_weights_carry_no_gradient(backend):
    x = torch.randn(2, 9, 4, requires_grad=True)
    y, size = vitkern.merge_tokens(x, plan_of(x, 3), backend=backend)
    assert y.requires_grad and not size.requires_grad


@ON
def test_nothing_to_do_passes_through(backend):
    for shape in ((1, 1, 4), (0, 9, 4), (2, 5, 4)):
        x = torch.randn(shape)
        match = vitkern.bipartite_match(x, protect=5, backend=backend)
        for r in (0, 3):  # three where nothing can merge; an empty batch of nine merges two of each
            plan = vitkern.merge_plan(match, r=r, clip=True, backend=backend)
            y, _ = vitkern.merge_tokens(x, plan, backend=backend)
            assert torch.equal(y, x) or y.shape == (0, 7, 4)
            assert torch.equal(vitkern.unmerge_tokens(y, plan, backend=backend), x)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_a_damaged_plan_is_refused_by_the_kernels():
    x, plan = torch.randn(1, 4, 2), MergePlan.identity(1, 4)
    for field, value in (("perm", 4), ("token_map", 9), ("offsets", 7)):
        broken = {n: getattr(plan, n).clone() for n in ("token_map", "perm", "offsets")}
        broken[field][0, 2] = value
        with pytest.raises(RuntimeError, match=r"merge_tokens: the plan must hold slots in \[0, n_out\]"):
            vitkern.merge_tokens(x, MergePlan(**broken, lengths=plan.lengths, n_out=4))


X, PLAN = torch.randn(2, 6, 4), MergePlan.from_map(torch.zeros(2, 6, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (
            lambda: vitkern.merge_tokens(X[:, :5], PLAN),
            ValueError,
            r"x must have the batch and length of the plan, \[2, 6\]",
        ),
        (
            lambda: vitkern.merge_tokens(X[:1], PLAN),
            ValueError,
            r"x must have the batch and length of the plan, \[2, 6\]",
        ),
        (lambda: vitkern.merge_tokens(X.int(), PLAN), TypeError, "x must be float32, float64, bfloat16 or float16"),
        (lambda: vitkern.merge_tokens(X, X), TypeError, "plan must be a vitkern.MergePlan, got Tensor"),
        (
            lambda: vitkern.merge_tokens(X, PLAN, reduce="min"),
            ValueError,
            "reduce must be 'mean', 'sum', 'max', 'first' or 'mlerp'",
        ),
        (
            lambda: vitkern.merge_tokens(X, PLAN, reduce="mlerp", include_dst=False),
            ValueError,
            "include_dst=False must go with",
        ),
        (
            lambda: vitkern.merge_tokens(X, PLAN, reduce="max", include_dst=False),
            ValueError,
            "include_dst=False must go with",
        ),
        (lambda: vitkern.merge_tokens(X, PLAN, weight=X), ValueError, r"weight must have shape \[B, N\] = \[2, 6\]"),
        (
            lambda: vitkern.merge_tokens((X, X), PLAN, reduce=("mean",)),
            ValueError,
            "reduce must have one entry per tensor",
        ),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
