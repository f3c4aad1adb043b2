"""A module of vitkern.nn held to a published one with the same weights."""

import copy

import patch_cases
import torch
from torch import nn

from vitkern.testing import assert_close_to_oracle


class Applied(nn.Module):
    """A module under the name attn, called by a function."""

    def __init__(self, attn, call):
        super().__init__()
        self.attn, self.call = attn, call

    def forward(self, x):
        return self.call(self.attn, x)


def ours_alone(module, x):
    return module(x)


def compare(ours, theirs, call, size, strict=False, mine=ours_alone):
    """Outputs and gradients of a module with the weights of a published one, by the oracle rule."""
    ours.load_state_dict(theirs.state_dict(), strict=strict)
    x = torch.randn(2, *size, ours.dim, generator=torch.Generator().manual_seed(4))
    got = patch_cases.run(Applied(ours, mine), x, torch.float32, True)
    patch_cases.Yardstick(Applied(theirs, call), x).hold(str(size), got)


def by_formula(module, formula, x, mine=ours_alone):
    """Outputs and gradients of a module, by the oracle rule, against formula(module, x) on its own parameters."""

    def results(run, dtype):
        own = copy.deepcopy(module).to(dtype)
        given = x.to(dtype).requires_grad_()
        out = run(own, given)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [given, *own.parameters()])]

    exact, eager = results(formula, torch.float64), results(formula, torch.float32)
    for i, got in enumerate(results(mine, torch.float32)):
        assert_close_to_oracle(str(i), got, exact[i], eager[i], gradient=i > 0)
