"""Every op of the registry under vmap and autocast, and exported without an op of vitkern."""

import pytest
import torch

import vitkern
from vitkern import testing

ENTRIES = testing.entries()
BY_NAME = pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda e: e.name)


def close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True)


def is_packed(call):
    """Whether the result is as long as the values say, which vmap and graphs refuse."""
    options = call.build(call.leaves(torch.float32))[1]
    packs = call.function is vitkern.select_tokens and options.get("n_max") is None
    return packs and options.get("threshold") is not None


@BY_NAME
@pytest.mark.parametrize("all_mapped", [True, False])
def test_vmap_is_a_loop(entry, all_mapped):
    """Every floating tensor mapped, tables too, or those alone that autocast knows as queries, keys and values: then masks and
    biases of every image stay beside them."""
    for call in entry.small():
        tensors = call.leaves(torch.float32)
        names = [n for n, t in tensors.items() if t.is_floating_point() and (all_mapped or n in entry.cast)]
        if not names or is_packed(call):
            continue
        many = {n: torch.stack((t, 0.5 * t)) if n in names else t for n, t in tensors.items()}
        got = torch.func.vmap(call.run, in_dims=({n: 0 if n in names else None for n in many},))(many)
        each = [call.run({n: t[i] if n in names else t for n, t in many.items()}) for i in range(2)]
        close(got, [torch.stack(outputs) for outputs in zip(*each, strict=True)])


@BY_NAME
def test_autocast_casts_what_is_named_and_nothing_where_it_is_off(entry):
    call = entry.small()[1]
    tensors = call.leaves(torch.float32, grad=entry.gradient)
    leaves = [t for t in tensors.values() if t.requires_grad]
    plain = call.run(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        cast = call.run(tensors)
        with torch.autocast("cpu", enabled=False):
            close(call.run(tensors), plain)
    low = {n: t.detach().bfloat16() if n in entry.cast else t.detach() for n, t in tensors.items()}
    close([t.detach() for t in cast], call.run(low))
    if leaves:
        found = torch.autograd.grad(sum(o.float().sum() for o in cast if o.requires_grad), leaves, allow_unused=True)
        assert all(g is None or g.dtype == torch.float32 for g in found)


@BY_NAME
def test_the_reference_exports_aten_alone(entry):
    call = entry.small()[1]
    tensors = call.leaves(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, t):
            return call.run(t)

    with torch.no_grad(), vitkern.use_backend("reference"):
        program = torch.export.export(Model(), (tensors,), strict=False)
        want = call.run(tensors)
    called = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert called and {getattr(target, "namespace", "aten") for target in called} == {"aten"}, called
    close(program.module()(tensors), want)


def test_vmap_leaves_bounds_to_one_packed_batch():
    q, k, v = torch.randn(3, 2, 7, 2, 4).unbind()
    gates, bounds = -torch.rand(2, 7, 2), torch.tensor([0, 4, 7], dtype=torch.int32)

    def run(q, k, v, gates):
        return vitkern.linear_attention(q, k, v, decay=vitkern.decay.Gated(gates), causal=True, cu_seqlens=bounds)

    each = [run(*parts) for parts in zip(q, k, v, gates, strict=True)]
    torch.testing.assert_close(torch.func.vmap(run)(q, k, v, gates), torch.stack(each))
