"""Maps of random float64 tokens, as the tests of window_attention's options take them."""

import torch

from vitkern import testing

BACKENDS = ["reference", *testing.backends()]
D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def maps(*sides, batch=2, heads=2, d=4, seed=0):
    return [draw(batch, *sides, heads, d, seed=seed + i).requires_grad_() for i in range(3)]
