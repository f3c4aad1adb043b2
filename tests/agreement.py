"""Two results of one computation: equal values, and equal gradients under one upstream."""

import torch


def agree(got, want, inputs):
    """Values and gradients."""
    torch.testing.assert_close(got, want)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=want.dtype)
    pairs = (torch.autograd.grad((t * upstream).sum(), inputs, retain_graph=True) for t in (got, want))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)
