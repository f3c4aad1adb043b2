"""merge_plan and MergePlan: the published orders, edges and refusals. What every op must do is in tests/test_ops.py."""

import math

import pytest
import torch
import torch._dynamo.testing

import vitkern
from vitkern import MergePlan, testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def published(metric, r, class_token, distillation):
    """The published merge of an index tensor: which tokens stand in each output place, as rows of a one-hot matrix."""
    tokens = metric.shape[1]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    if class_token:
        scores[:, 0] = -math.inf
    if distillation:
        scores[:, :, 0] = -math.inf
    best, place = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)
    left, gone = order[:, r:], order[:, :r]
    if class_token:
        left = left.sort(dim=-1)[0]
    eye = torch.eye(tokens).expand(len(metric), -1, -1)
    a, b = eye[:, ::2], eye[:, 1::2]
    wide = [i[..., None].expand(-1, -1, tokens) for i in (left, gone, place.gather(1, gone))]
    b = b.scatter_add(1, wide[2], a.gather(1, wide[1]))
    kept = a.gather(1, wide[0])
    return torch.cat((kept[:, :1], b[:, :1], kept[:, 1:], b[:, 1:]) if distillation else (kept, b), 1).bool()


@ON
@pytest.mark.parametrize("tokens, r", [(197, 13), (198, 16), (64, 5), (16, 0), (201, 90)])
@pytest.mark.parametrize("prefix, order", [(0, "score"), (1, "split"), (2, "split")])
def test_three_layers_have_the_published_order(backend, tokens, r, prefix, order):
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(3):
        metric = torch.randn(2, tokens, 32, generator=generator)
        match = vitkern.bipartite_match(metric, protect=prefix, backend=backend)
        plan = vitkern.merge_plan(match, r=r, order=order, clip=True, backend=backend)
        used = min(r, match.limit)
        assert torch.equal(plan.source(), published(metric, used, prefix >= 1, prefix == 2))
        assert plan.n_out == tokens - used and plan.key_mask is None
        tokens -= used


@ON
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("order", ["split", "score", "position"])
@pytest.mark.parametrize("partition", ["alternate", "random2d"])
def test_protected_tokens_stand_first_and_alone(backend, prefix, order, partition):
    metric = torch.randn(3, 64 + prefix, 8)
    match = vitkern.bipartite_match(metric, protect=prefix, partition=partition, grid=(8, 8), backend=backend)
    plan = vitkern.merge_plan(match, r=20, order=order, backend=backend)
    assert torch.equal(plan.token_map[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(3, -1))
    assert (plan.token_map[:, prefix:] >= prefix).all()
    if order == "position":
        assert (plan.perm.gather(1, plan.offsets[:, :-1].long()).diff(dim=1) > 0).all()


@ON
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 197, 198])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_the_number_that_can_merge_is_known_and_clipped_on_request(backend, tokens, prefix):
    match = vitkern.bipartite_match(torch.randn(2, tokens, 8), protect=prefix, backend=backend)
    assert match.limit <= max(0, (tokens - prefix) // 2)
    plan = vitkern.merge_plan(match, r=10**9, clip=True, backend=backend)
    assert plan.n_out == tokens - match.limit and (plan.lengths == plan.n_out).all()
    with pytest.raises(ValueError, match=f"r must be at most {match.limit}, the tokens that can merge, got 1000"):
        vitkern.merge_plan(match, r=1000, backend=backend)


@ON
def test_thresholds_masks_and_counts_per_sample_give_ragged_plans(backend):
    metric = torch.randn(4, 40, 8)
    mask = torch.ones(4, 40, dtype=torch.bool)
    mask[1, 30:] = mask[2] = False
    match = vitkern.bipartite_match(metric, mask=mask, protect=1, backend=backend)
    for threshold, wanted in ((-math.inf, [19, 14, 0, 19]), (math.inf, [0] * 4), (math.nan, [0] * 4)):
        plan = vitkern.merge_plan(match, threshold=threshold, backend=backend)
        assert (mask.sum(1) - plan.lengths).tolist() == wanted and plan.n_out == 40
        assert (plan.token_map[~mask] == 40).all()
    plan = vitkern.merge_plan(match, r=torch.tensor([3, 1, 0, 7]), backend=backend)
    assert plan.lengths.tolist() == [37, 29, 0, 33] and plan.cu_seqlens.tolist() == [0, 37, 66, 66, 99]
    assert torch.equal(plan.key_mask.sum(1).int(), plan.lengths)
    packed = plan.pack(torch.arange(160).view(4, 40))
    assert packed.tolist() == [*range(37), *range(40, 69), *range(120, 153)]
    plan = vitkern.merge_plan(match, threshold=0.9, n_max=30, backend=backend)
    assert plan.n_out == 30 and (plan.lengths <= 30).all() and int(plan.lengths[0]) == 30
    with pytest.raises((ValueError, RuntimeError), match="keeps 21 tokens, there are 20 slots"):
        vitkern.merge_plan(match, threshold=0.9, n_max=20, backend=backend)


@ON
def test_the_plan_of_a_sample_does_not_depend_on_its_batch(backend):
    match = vitkern.bipartite_match(torch.randint(-4, 5, (8, 65, 4)).float(), similarity="dot", backend=backend)
    plan = vitkern.merge_plan(match, threshold=10.0, backend=backend)
    for b in range(8):
        one = vitkern.Match(match.score[[b]], match.dst[[b]], match.role[[b]], match.limit, match.ragged)
        alone = vitkern.merge_plan(one, threshold=10.0, backend=backend)
        assert torch.equal(alone.token_map[0], plan.token_map[b]) and torch.equal(alone.perm[0], plan.perm[b])


@ON
def test_equal_scores_merge_by_position_and_minus_0_equals_0(backend):
    score = torch.tensor([[0.0, -math.inf, -0.0, -math.inf, 0.0, -math.inf, -0.0, -math.inf]])
    role = torch.tensor([[0, 1] * 4], dtype=torch.int8)
    match = vitkern.Match(score, torch.ones(1, 8, dtype=torch.int32), role, 4, False)
    for r in range(5):
        plan = vitkern.merge_plan(match, r=r, backend=backend)
        joined = [i for i in range(0, 8, 2) if plan.token_map[0, i] == plan.token_map[0, 1]]
        assert joined == [0, 2, 4, 6][:r]
    assert vitkern.merge_plan(match, threshold=0.0, backend=backend).lengths.tolist() == [4]


def test_composed_plans_equal_the_steps():
    x = torch.randn(2, 197, 5, dtype=torch.float64)
    stepped, whole = x, MergePlan.identity(2, 197)
    size = None
    for _ in range(12):
        match = vitkern.bipartite_match(stepped)
        plan = vitkern.merge_plan(match, r=13, clip=True)
        stepped, size = vitkern.merge_tokens(stepped, plan, weight=size)
        whole = whole.compose(plan)
    together, sizes = vitkern.merge_tokens(x, whole)
    torch.testing.assert_close(together, stepped)
    assert torch.equal(sizes, size) and (size.sum(1) == 197).all()
    assert torch.equal(whole.source().sum(2), sizes.long())
    dropping = MergePlan.from_map(torch.tensor([[0, 2, 1, 2]]), 2).compose(
        MergePlan.from_map(torch.tensor([[0, 1]]), 1)
    )
    assert dropping.token_map.tolist() == [[0, 1, 1, 1]] and dropping.offsets.tolist() == [[0, 1]]


def test_a_plan_travels_through_export_and_pytrees():
    plan = MergePlan.identity(2, 6)
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), MergePlan)

    class Model(torch.nn.Module):
        def forward(self, x):
            plan = vitkern.merge_plan(vitkern.bipartite_match(x), r=2)
            return vitkern.merge_tokens(x, plan)[0], plan

    x = torch.randn(2, 9, 4)
    program = torch.export.export(Model(), (x,), strict=False)
    for a, b in zip(
        torch.utils._pytree.tree_leaves(program.module()(x)), torch.utils._pytree.tree_leaves(Model()(x)), strict=True
    ):
        assert (a == b).all() if isinstance(a, torch.Tensor) else a == b


def test_match_plan_and_merge_compile_into_one_graph_for_all_sizes():
    def layer(x, r):
        plan = vitkern.merge_plan(vitkern.bipartite_match(x), r=r)
        y, size = vitkern.merge_tokens(x, plan)
        return vitkern.unmerge_tokens(y, plan), size

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for tokens, r in ((197, 13), (184, 11), (150, 9), (99, 30)):
        x = torch.randn(2, tokens, 16)
        for a, b in zip(compiled(x, r), layer(x, r), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


MATCH = vitkern.bipartite_match(torch.randn(2, 9, 4))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(r=-1), "r must be at least 0, got -1"),
        (dict(r=5), "r must be at most 4, the tokens that can merge, got 5"),
        (dict(r=0.5), "r must be an int or an integer tensor"),
        (dict(r=torch.tensor([1.0, 2.0])), "r must hold integers, got torch.float32"),
        (dict(r=torch.tensor([1, 9])), r"r must lie in \[0, 4\], the tokens that can merge, got 1 to 9"),
        (dict(r=torch.tensor([1])), r"r must have shape \[B\] = \[2\], got \[1\]"),
        (dict(threshold="high"), "threshold must be a float or a tensor"),
        (dict(order="size"), "order must be 'split', 'score' or 'position', got 'size'"),
        (dict(n_max=10), r"n_max must lie in \[0, N\] = \[0, 9\], got 10"),
        (dict(r=1, backend="cuda"), "cuda: the tensors are on cpu"),
    ],
)
def test_refusals_are_sentences(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        vitkern.merge_plan(MATCH, **options)


def test_plans_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="merge_plan: match must be a vitkern.Match, got Tensor"):
        vitkern.merge_plan(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"from_map: token_map must lie in \[0, n_out\] = \[0, 3\], got 0 to 4"):
        MergePlan.from_map(torch.tensor([[0, 4]]), 3)
    with pytest.raises(ValueError, match="from_map: token_map must be integers"):
        MergePlan.from_map(torch.zeros(2, 3), 3)
    with pytest.raises(
        ValueError, match=r"compose: later must be a plan of \[B, n_out\] = \[1, 4\] tokens, got \[1, 5\]"
    ):
        MergePlan.identity(1, 4).compose(MergePlan.identity(1, 5))
    with pytest.raises(ValueError, match="pack: y must have the batch and slots of the plan"):
        MergePlan.identity(1, 4).pack(torch.zeros(1, 5))


@ON
def test_a_partner_that_is_not_kept_leaves_its_token_without_a_slot(backend):
    """No match of bipartite_match is like this; a match made by hand may be."""
    score = torch.tensor([[0.9, 0.8, 0.1, 0.7, 0.2, -math.inf]])
    dst = torch.tensor([[3, 5, 5, 4, 5, 5]], dtype=torch.int32)  # 0 -> 3, which merges too; 1 -> 5, which is masked
    role = torch.tensor([[0, 0, 0, 0, 0, 4]], dtype=torch.int8)
    plan = vitkern.merge_plan(vitkern.Match(score, dst, role, 5, True), r=3, backend=backend)
    assert plan.token_map.tolist() == [[plan.n_out, plan.n_out, 0, 1, 1, plan.n_out]]
    assert plan.perm[0, :3].tolist() == [2, 4, 3] and plan.lengths.tolist() == [2]


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_a_match_that_is_none_is_refused_by_the_kernel():
    score, dst, role = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="role must hold 0 to 4"):
        vitkern.merge_plan(vitkern.Match(score, dst, role + 5, 2, False), r=1)
    with pytest.raises(RuntimeError, match=r"dst must hold positions in \[0, N\)"):
        vitkern.merge_plan(vitkern.Match(score, dst - 1, role, 2, False), r=1)
