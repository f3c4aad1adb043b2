"""Run by `make compat` with the built wheel on another torch: a few ops, forward and backward, and torch.compile."""

import torch

import vitkern
from vitkern.bias import RelativePosition

q, k, v = torch.randn(3, 2, 9, 11, 2, 8).unbind()
table = torch.randn(169, 2, requires_grad=True)
q.requires_grad_()


def call(backend=None):
    return vitkern.window_attention(q, k, v, 7, 3, bias=RelativePosition(table), backend=backend)


got, want = call("cpu"), call("reference")
assert torch.allclose(got, want, atol=1e-5), (got - want).abs().max()
grads = [torch.autograd.grad(out.square().sum(), (q, table)) for out in (got, want)]
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
compiled = torch.compile(call, backend="aot_eager", fullgraph=True)()
assert torch.allclose(compiled, want, atol=1e-5)
info = vitkern.info()
print(f"torch {info['torch']}: window_attention forward, backward and compiled agree ({info['instruction set']})")
