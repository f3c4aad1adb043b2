"""Every op of the registry, on every back-end of this machine, against the float64 reference."""

import os
import random

import pytest
import torch

from vitkern import testing

ENTRIES = list(testing.entries().values())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FULL = os.environ.get("VITKERN_FULL") == "1"


def draw(entry, seed):
    return entry.draw(random.Random(f"{entry.name} {seed}"))


@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("seed", testing.cases(None))
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_sampled_calls_match_the_reference(entry, seed, backend):
    dtypes = DTYPES if FULL else [DTYPES[seed % 4]]
    for dtype in dtypes:
        testing.assert_matches(entry, draw(entry, seed), dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_small_calls_match_in_every_dtype(entry, backend, dtype):
    for call in entry.small():
        testing.assert_matches(entry, call, dtype, backend)


@pytest.fixture
def capability():
    before = torch.ops.vitkern._cpu_capability()
    yield torch.ops.vitkern._cpu_set_capability
    torch.ops.vitkern._cpu_set_capability(before)


@pytest.mark.skipif("cpu" not in testing.backends(), reason="the CPU library is not built")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_instruction_set_of_this_machine_gives_the_reference(entry, capability):
    for name in torch.ops.vitkern._cpu_capabilities().split():
        capability(name)
        for seed, call in enumerate(entry.small()):
            testing.assert_matches(entry, call, DTYPES[seed % 4], "cpu")
        for seed in range(100, 200 if FULL else 106):
            testing.assert_matches(entry, draw(entry, seed), DTYPES[seed % 4], "cpu")


def gradients(entry, call, dtype, backend):
    tensors = call.leaves(dtype, grad=True)
    outputs = call.run(tensors, backend)
    if not entry.gradient:
        return outputs
    wanted = [t for t in tensors.values() if t.requires_grad]
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, call.weights(outputs), strict=True))
    return [*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True)]


@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_results_are_bitwise_equal_in_every_run_and_with_any_number_of_threads(entry, backend):
    threads = torch.get_num_threads()
    calls = entry.small() + [draw(entry, seed) for seed in range(200, 206)]
    try:
        for call in calls:
            first = None
            for count in (1, 2, 7, threads):
                torch.set_num_threads(count)
                found = gradients(entry, call, torch.float32, backend)
                first = first or found
                for a, b in zip(first, found, strict=True):
                    assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()), (
                        f"{call}: {count} threads"
                    )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", *testing.backends()])
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.gradient], ids=lambda e: e.name)
def test_gradcheck_and_double_backward_in_float64(entry, backend):
    for call in [*entry.small()[:7], *entry.derived()]:
        if "dropout" in str(call) and backend == "reference":
            continue  # the same code path as without
        tensors = call.leaves(torch.float64, grad=True)
        wanted = {n: t for n, t in tensors.items() if t.requires_grad}

        def run(*values, call=call, tensors=tensors, wanted=wanted):
            return call.run({**tensors, **dict(zip(wanted, values, strict=True))}, backend)

        values = tuple(wanted.values())
        assert torch.autograd.gradcheck(run, values, fast_mode=True), str(call)
        assert torch.autograd.gradgradcheck(run, values, fast_mode=True), str(call)


def spread(t):
    """The tensor with its first axis stretched beyond 2^31 elements: storage of which all but a few pages is never touched."""
    if not t.is_floating_point() or t.dim() < 2 or t.shape[0] < 2 or not t.numel():
        return t
    step = max(2**31 // (len(t) - 1) + 1, t[0].numel())
    storage = torch.UntypedStorage(t.element_size() * (step * (len(t) - 1) + t[0].numel()))
    flat = torch.empty(0, dtype=t.dtype).set_(storage)
    return flat.as_strided(t.shape, (step, *torch.empty(t.shape[1:], device="meta").stride())).copy_(t)


@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_offsets_beyond_32_bits(entry, backend):
    call = next(c for c in entry.small() if any(t.dim() > 1 and len(t) > 1 and t.numel() for t in c.tensors.values()))
    near = call.leaves(torch.float16)
    far = {name: spread(t) for name, t in near.items()}
    for a, b in zip(call.run(near, backend), call.run(far, backend), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
