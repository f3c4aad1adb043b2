"""Triton kernels of vitkern, one module per op: plain launch functions, no autograd and no torch.library."""
