"""What the tests of linear attention share: inputs, dense scores, a comparison with gradients."""

import torch


def heads(batch=2, n=35, h=3, d=8, dv=None, dtype=torch.float64):
    """q, k, v as [B, N, H, D] with gradients."""
    return [torch.randn(batch, n, h, w, dtype=dtype, requires_grad=True) for w in (d, d, dv or d)]


def weights(a, b):
    """The dense scores of features [B, N, H, F], [B, H, Nq, Nk]."""
    return torch.einsum("bnhf,bmhf->bhnm", a, b)


def mixed(w, v):
    return torch.einsum("bhnm,bmhe->bnhe", w, v)
