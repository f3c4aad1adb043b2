"""attention_varlen: modifiers of packed sequences against one call each, the sequence's own numbers and places."""

import pytest
import torch
from test_attention_varlen import D, one_by_one, packed

import vitkern
from vitkern import modulation


def drawn(*shape, grad=True):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def agree(arguments, each, learned, **options):
    """The call of all sequences is that of each alone, and so are the gradients."""
    got, want = vitkern.attention_varlen(*arguments, **options), one_by_one(arguments, each)
    torch.testing.assert_close(got, want)
    wanted = (*arguments[:3], *learned)
    grads = [torch.autograd.grad(t.sin().sum(), wanted, allow_unused=True) for t in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_policy_counts_the_keys_of_the_own_sequence(diagonal):
    arguments = packed(grad=True)
    keep = torch.rand(1, len(arguments[1]), dtype=D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    each = lambda s, rows, columns: {"modulation": modulation.Policy(keep[:, columns], 0.3, diagonal)}  # noqa: E731
    agree(arguments, each, (keep,), modulation=modulation.Policy(keep, 0.3, diagonal))


def test_a_policy_without_eps_has_finite_gradients_where_nothing_is_seen():
    arguments = packed(((3, 4), (2, 0)), grad=True)
    keep = torch.ones(1, 4, dtype=D, requires_grad=True)
    for backend in ("cpu", "reference"):
        out = vitkern.attention_varlen(*arguments, modulation=modulation.Policy(keep, 0.0), backend=backend)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sin().sum(), (*arguments[:3], keep)))
