"""merge_lse: parts of the keys against the whole, empty parts, refusals."""

import math

import pytest
import torch
from test_attention import qkv

import vitkern


def test_parts_of_the_keys_join_to_the_whole():
    q, k, v = qkv(5, 9, grad=True)
    seen = torch.ones(5, 9, dtype=torch.bool)
    seen[1, :4], seen[2] = False, False  # a query that sees nothing of one part, and one that sees nothing at all

    def whole():
        out, stats = vitkern.attention(q, k, v, mask=seen, return_stats="lse")
        return out, stats.lse

    def joined():
        parts = [
            vitkern.attention(q, k[:, part], v[:, part], mask=seen[:, part], return_stats="lse")
            for part in (slice(0, 4), slice(4, 9))
        ]
        return vitkern.merge_lse([out for out, _ in parts], [stats.lse for _, stats in parts])

    found = []
    for out, lse in (whole(), joined()):
        finite = lse.masked_fill(lse.isinf(), 0.0)
        found.append((out, lse, *torch.autograd.grad(out.sin().sum() + finite.sin().sum(), (q, k, v))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a)
    assert found[1][1][:, 2].eq(-math.inf).all() and found[1][0][:, 2].eq(0).all()


def test_a_part_that_nobody_sees_hides_its_nan():
    out, lse = vitkern.merge_lse(
        [torch.full((1, 1, 2), torch.nan), torch.ones(1, 1, 2)], [torch.full((1, 1), -math.inf), torch.zeros(1, 1)]
    )
    assert out.eq(1).all() and lse.eq(0).all()


def test_a_part_that_is_nan_and_empty_gives_no_gradient_a_nan():
    lses = [torch.full((1, 1), -math.inf, requires_grad=True), torch.zeros(1, 1, requires_grad=True)]
    outs = [torch.full((1, 1, 2), torch.nan, requires_grad=True), torch.ones(1, 1, 2, requires_grad=True)]
    out, lse = vitkern.merge_lse(iter(outs), iter(lses))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum() + lse.sum(), (*outs, *lses)))


def test_merge_lse_refuses_in_sentences():
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="outs and lses must hold as many tensors, at least one, got 1 and 2"):
        vitkern.merge_lse([out], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[0\] must have shape of outs\[0\] but its last axis = \[1, 3, 2\]"):
        vitkern.merge_lse([out], [lse[:, :2]])
