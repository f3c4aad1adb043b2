"""Every op of the registry as a torch citizen: opcheck, compile, export, autocast, vmap, functional transforms."""

import os

import pytest
import torch
import torch._dynamo.testing

import vitkern
from vitkern import testing

ENTRIES = list(testing.entries().values())
BY_NAME = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)


def sample(name="window_attention"):
    call = testing.entries()[name].small()[1]  # padded, shifted, with table and pad vectors
    return call, call.leaves(torch.float32, grad=True)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the arguments of every vitkern op that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitkern":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


QUICK = "test_schema", "test_autograd_registration", "test_faketensor"  # without tracing, which takes seconds


@BY_NAME
def test_opcheck_of_forward_and_backward(entry):
    """In full for every op once (tracing a backward goes twice through the definition), further calls without tracing."""
    few = slice(6) if os.environ.get("VITKERN_FULL") else slice(1, 2)
    traced = set()

    def check(func, args):
        full = os.environ.get("VITKERN_FULL") or func not in traced
        traced.add(func)
        torch.library.opcheck(func, tuple(args), **({} if full else {"test_utils": QUICK}))

    for call in [*entry.small()[few], entry.small()[-1]]:
        tensors = call.leaves(torch.float32, grad=True)
        with Recorder() as recorder:
            outputs = call.run(tensors)
            if entry.gradient:
                sum(o.square().sum() for o in outputs).backward()
        last = entry.last or (f"{entry.name}_bwd" if entry.gradient else entry.name)
        assert {f.name().removeprefix("vitkern::") for f, _ in recorder.calls} >= {last}, recorder.calls
        for func, args in recorder.calls:
            fresh = [
                a.detach().clone().requires_grad_(entry.gradient and a.is_floating_point())
                if isinstance(a, torch.Tensor)
                else a
                for a in args
            ]
            check(func, fresh)
            name = func.name().removeprefix("vitkern::")
            if (
                name == entry.name and entry.gradient and not entry.last
            ):  # the variant without gradient has the same schema
                plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in fresh]
                check(getattr(torch.ops.vitkern, f"{name}_fwd").default, plain)


@BY_NAME
def test_compiles_without_graph_breaks_and_once_for_all_sizes(entry):
    calls = entry.sizes()

    def loss(tensors):
        return sum(o.float().square().sum() for o in calls[0].run(tensors))

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    compiled_once = None
    for call in calls:
        tensors = call.leaves(torch.float32, grad=entry.gradient)
        leaves = [t for t in tensors.values() if t.requires_grad]
        got, want = compiled(tensors), loss(tensors)
        torch.testing.assert_close(got, want)
        if entry.gradient:
            pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b)
        compiled_once = compiled_once or counter.frame_count
    assert counter.frame_count == compiled_once, "another size was compiled anew"


@pytest.mark.compile
def test_inductor_gives_the_eager_result():
    call, tensors = sample()
    names = list(tensors)

    def run(*values):
        return call.run(dict(zip(names, values, strict=True)))[0]

    values = [tensors[n].detach() for n in names]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(*values), run(*values))


def test_a_forced_back_end_is_guarded_by_compiled_code():
    call, tensors = sample()
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: call.run(t)[0], backend="aot_eager", fullgraph=True)
    first = compiled(tensors)
    with vitkern.use_backend("reference"):
        torch.testing.assert_close(compiled(tensors), first)


@BY_NAME
def test_exports_with_and_without_gradient(entry):
    call = entry.small()[1]
    tensors = call.leaves(torch.float32)

    class Model(torch.nn.Module):
        def forward(self, t):
            return call.run(t)[0]

    with torch.no_grad():
        program = torch.export.export(Model(), (tensors,), strict=False)
    torch.testing.assert_close(program.module()(tensors), call.run(tensors)[0])
    assert any("vitkern" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.cast], ids=lambda e: e.name)
@pytest.mark.parametrize("backend", ["reference", *testing.backends()])
def test_autocast_casts_queries_keys_values_and_leaves_tables_alone(entry, backend):
    call = entry.small()[1]
    tensors = call.leaves(torch.float32, grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            out = call.run(tensors, backend)[0]
        assert out.dtype == dtype
        low = {n: t.detach().to(dtype) if n in entry.cast else t for n, t in tensors.items()}
        torch.testing.assert_close(out, call.run(low, backend)[0])
        grad = torch.autograd.grad(out.float().square().sum(), [t for t in tensors.values() if t.requires_grad])
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grad)


def test_vmap_over_the_batch_and_over_a_bias():
    q, k, v = torch.randn(3, 4, 2, 5, 6, 2, 8).unbind()
    got = torch.func.vmap(lambda a, b, c: vitkern.window_attention(a, b, c, 3, 1))(q, k, v)
    torch.testing.assert_close(
        got, torch.stack([vitkern.window_attention(*t, 3, 1) for t in zip(q, k, v, strict=True)])
    )
    bias = torch.randn(4, 2, 9, 9)
    got = torch.func.vmap(lambda b: vitkern.window_attention(q[0], k[0], v[0], 3, 1, bias=b))(bias)
    torch.testing.assert_close(
        got, torch.stack([vitkern.window_attention(q[0], k[0], v[0], 3, 1, bias=b) for b in bias])
    )


def test_functional_transforms_and_forward_mode_are_never_silent_zeros():
    q, k, v = torch.randn(3, 1, 4, 4, 1, 4, dtype=torch.float64).unbind()

    def loss(x):
        return vitkern.window_attention(x, k, v, 2, 1).square().sum()

    x = q.clone().requires_grad_()
    want = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q), want)
    direction = torch.randn_like(q)
    _, tangent = torch.func.jvp(loss, (q,), (direction,))
    torch.testing.assert_close(tangent, (want * direction).sum())
    assert torch.func.hessian(loss)(q).abs().sum() > 0


def test_checkpointing_is_bitwise_equal():
    from torch.utils.checkpoint import checkpoint

    call, tensors = sample()
    leaves = [t for t in tensors.values() if t.requires_grad]
    plain = torch.autograd.grad(call.run(tensors)[0].square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(lambda: call.run(tensors)[0], use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_second_derivative_of_a_dependent_upstream_gradient_is_right():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 4, 2, 4, dtype=torch.float64).unbind())

    def second(backend):
        out = vitkern.window_attention(q, k, v, 2, backend=backend)
        (first,) = torch.autograd.grad(
            (out * q.sin()).sum(), q, create_graph=True
        )  # the upstream gradient depends on q
        return torch.autograd.grad(first.square().sum(), (q, k, v))

    for a, b in zip(second(None), second("reference"), strict=True):
        torch.testing.assert_close(a, b)


def test_calling_from_another_thread_and_after_fork():
    import os
    import threading

    call, tensors = sample()
    want = call.run(tensors)[0]
    found = []
    thread = threading.Thread(target=lambda: found.append(call.run(tensors)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], want)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has no worker threads
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(call.run(tensors)[0], want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    torch.set_num_threads(before)
