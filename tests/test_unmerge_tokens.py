"""unmerge_tokens: invariants, edges and refusals. What every op must do is in tests/test_ops.py."""

import pytest
import torch

import vitkern
from vitkern import MergePlan, testing

ON = pytest.mark.parametrize("backend", ["reference", *testing.backends()])


@ON
def test_unmerge_goes_through_the_map_with_a_distillation_token_too(backend):
    x = torch.eye(198).expand(2, -1, -1).contiguous()
    match = vitkern.bipartite_match(torch.randn(2, 198, 16), protect=2, backend=backend)
    plan = vitkern.merge_plan(match, r=16, backend=backend)
    y, size = vitkern.merge_tokens(x, plan, backend=backend)
    back = vitkern.unmerge_tokens(y, plan, backend=backend)
    same = plan.token_map[:, :, None] == plan.token_map[:, None, :]
    torch.testing.assert_close(back, same / same.sum(-1, keepdim=True))
    again, _ = vitkern.merge_tokens(back, plan, backend=backend)
    torch.testing.assert_close(again, y)  # merging what was unmerged changes nothing
    assert float(size.sum()) == 2 * 198


@ON
def test_a_dropped_token_gets_the_fill_and_gives_no_gradient(backend):
    y = torch.randn(1, 2, 3, requires_grad=True)
    plan = MergePlan.from_map(torch.tensor([[0, 2, 1, 0, 2, 1]]), 2)
    x = vitkern.unmerge_tokens(y, plan, fill=7.0, backend=backend)
    assert x[0, [1, 4]].eq(7.0).all() and torch.equal(x[0, [0, 2, 3, 5]], y[0, [0, 1, 0, 1]])
    (dy,) = torch.autograd.grad(x.sum(), y)
    assert dy.eq(2.0).all()


@ON
def test_the_identity_copies_bit_for_bit(backend):
    for batch, tokens in ((2, 5), (0, 5), (2, 0)):
        y = torch.randn(batch, tokens, 4)
        assert torch.equal(vitkern.unmerge_tokens(y, MergePlan.identity(batch, tokens), backend=backend), y)


Y, PLAN = torch.randn(2, 3, 4), MergePlan.from_map(torch.zeros(2, 6, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    "y, plan, kind, sentence",
    [
        (Y[:, :2], PLAN, ValueError, r"y must have the batch and slots of the plan, \[2, 3\], got \[2, 2, 4\]"),
        (Y[0, 0], PLAN, ValueError, r"y must have the batch and slots of the plan, \[2, 3\], got \[4\]"),
        (Y, 3, TypeError, "plan must be a vitkern.MergePlan, got int"),
        (Y.int(), PLAN, TypeError, "y must be float32, float64, bfloat16 or float16, got torch.int32"),
    ],
)
def test_refusals_are_sentences(y, plan, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.unmerge_tokens(y, plan)
