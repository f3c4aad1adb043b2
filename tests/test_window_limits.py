"""Windows and neighbourhoods at the edges of what a machine addresses and a compiler keeps: strides beyond 2^31, other windows."""

import pytest
import torch
import torch._dynamo.testing
from agreement import agree
from window_maps import BACKENDS, D, draw, maps

import vitkern
from vitkern import testing
from vitkern.bias import PolylinePath

SIDES = (1, 5, 6, 2, 8)
CALLS = {
    "window": lambda q, k, v: vitkern.window_attention(q, k, v, (3, 2), (1, 1)),
    "gathered": lambda q, k, v: vitkern.window_attention(q, k, v, (3, 2), partition="grid", normalizer="sigmoid"),
    "neighborhood": lambda q, k, v: vitkern.neighborhood_attention(q, k, v, 3),
    "sampled": lambda q, k, v: vitkern.sampled_window_attention(
        q, k, v, 3, 5 * torch.rand(1, 2, 2, 4, 1, 2, generator=torch.Generator().manual_seed(0))
    ),
}


def apart(t, axis):
    """The values of t where one step along `axis` crosses 2^31 elements in all; the memory between is never touched."""
    strides = list(t.stride())
    strides[axis] = 2**31 // (t.shape[axis] - 1) + 1
    size = sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True)) + 1
    whole = torch.empty(0, dtype=t.dtype).set_(torch.UntypedStorage(size * t.element_size()))
    return whole.as_strided(t.shape, strides).copy_(t)


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif("cpu" not in testing.backends(), reason="the CPU library is not built")
def test_rows_columns_and_heads_may_lie_beyond_two_to_the_31(name, axis):
    near = [draw(*SIDES, seed=s).half() for s in range(3)]
    results = []
    for tensors in (near, [apart(t, axis) for t in near]):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = CALLS[name](*leaves)
        results.append([out, *torch.autograd.grad(out.float().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "call, values",
    [
        (lambda x, w, s: vitkern.window_attention(x, x, x, (w, w), (s, s)), [(5, 2), (7, 3), (6, 1)]),
        (lambda x, k, d: vitkern.neighborhood_attention(x, x, x, k, dilation=d), [(3, 2), (5, 3), (4, 4)]),
    ],
    ids=["windows and shifts", "kernels and dilations"],
)
def test_other_values_compile_nothing_anew(call, values):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    x, frames = torch.randn(2, 26, 31, 3, 8), None
    for value in values:
        torch.testing.assert_close(compiled(x, *value), call(x, *value))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.parametrize("backend", BACKENDS)
def test_paths_run_inside_windows(backend):
    """PPMA's rows: windows of one row, whose log-decays are given window by window."""
    q, k, v = maps(3, 4)
    along = -draw(6, 1, 4, 2, seed=8).abs().requires_grad_()  # [B windows, 1, 4, H]
    path = PolylinePath(along, torch.zeros(6, 1, 4, 2, dtype=D))
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    want = vitkern.attention(*rows, bias=path, backend="reference").unflatten(0, (2, 3))
    got = vitkern.window_attention(q, k, v, (1, None), bias=path, backend=backend)
    agree(got, want, (q, k, v))


def test_neighbourhoods_are_mapped_over_a_batch():
    q, k, v = (draw(3, 2, 5, 6, 2, 4, seed=s) for s in range(3))
    mapped = torch.func.vmap(lambda q, k, v: vitkern.neighborhood_attention(q, k, v, 3))(q, k, v)
    each = [vitkern.neighborhood_attention(*parts, 3) for parts in zip(q, k, v, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(each))
