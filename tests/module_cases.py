"""A module of vitkern.nn held to a published one with the same weights."""

import patch_cases
import torch
from torch import nn


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
