"""What CUDA graphs ask of a call: no wait for the device, no shape that values decide, nothing copied from the host.

Without a GPU: fake tensors, whose values nobody can read, go through the public functions and the host code of the Triton
kernels, whose launches do nothing, forward and backward. The second of two calls is watched, since tables that are kept are
made in the first, before a capture.
"""

import sys
from contextlib import ExitStack
from functools import partial
from unittest import mock

import gpu_path
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from vitkern import _constants, testing
from vitkern.nn import MultiScaleDeformableAttention, VariedSizeWindowAttention
from vitkern.ops import _call
from vitkern.ops._op import Op, PlainOp

triton = pytest.importorskip("triton")
ENTRIES = testing.entries()
WITHOUT_TRITON = ("soft_merge", "cluster_kmeans", "reconstruct_tokens")  # their definition runs on a GPU
MADE = (
    "tensor",
    "as_tensor",
    "asarray",
    "new_tensor",
    "from_numpy",
)  # of Python's numbers: a copy that a capture refuses
READ = (
    "cpu",
    "item",
    "tolist",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "unique",
    "masked_select",
)


class Watch(TorchFunctionMode):
    """Keeps the calls that copy from the host or read a value."""

    def __init__(self):
        super().__init__()
        self.refused = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in (*MADE, *READ):
            self.refused.append(name)
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                self.refused.append(f"{name} of a list")
        return func(*args, **(kwargs or {}))


def _ops():
    files = [m for name, m in list(sys.modules.items()) if name.startswith("vitkern.ops")]
    return [value for m in files for value in vars(m).values() if isinstance(value, (Op, PlainOp))]


def run(ran, op, args, backend):
    """What the dispatcher does for CUDA tensors: Triton where it serves the call, else the definition."""
    chosen = "reference" if op.gpu.triton_refusals(args) else "triton"
    ran.add((op.name, chosen))
    return op.gpu.forward(op, *args, chosen) if isinstance(op, PlainOp) else gpu_path.apply(op, *args, chosen)


@pytest.fixture
def ran():
    """The ops that ran, and on what; no fake is left where a later test would find it among the kept tables."""
    found, overload = set(), lambda op, suffix="": partial(op.gpu.forward, op)
    with ExitStack() as patches:
        for kind in (Op, PlainOp):
            patches.enter_context(mock.patch.object(kind, "overload", overload))
        patches.enter_context(mock.patch.object(_call, "run", partial(run, found)))
        patches.enter_context(mock.patch.object(_constants, "_lasts", lambda: True))
        patches.enter_context(mock.patch.object(triton.JITFunction, "run", lambda *args, **options: None))
        for op in _ops():
            if op.gpu.triton is not None:
                op.gpu.triton()  # imported before its names are replaced
        modules = [m for name, m in list(sys.modules.items()) if name.startswith("vitkern.triton_kernels")]
        for module in modules:
            if hasattr(module, "device_reasons"):
                patches.enter_context(mock.patch.object(module, "device_reasons", lambda *args, **options: []))
        yield found
    for name, module in list(sys.modules.items()):
        if name.startswith("vitkern"):
            for kept in vars(module).values():
                if callable(getattr(kept, "cache_clear", None)):
                    kept.cache_clear()


def refusals(entry, call, fake):
    """What a capture of the call and its backward would refuse."""
    with fake:
        tensors = {n: fake.from_tensor(t) for n, t in call.leaves(torch.float32).items()}
        watch = Watch()
        for mode in (ExitStack(), watch):
            leaves = {
                n: t.detach().requires_grad_(entry.gradient and t.is_floating_point()) for n, t in tensors.items()
            }
            with mode:
                outputs = call.run(leaves)
                if any(o.requires_grad for o in outputs):
                    sum(o.sum() for o in outputs if o.requires_grad).backward()
    return watch.refused


@pytest.mark.parametrize("name", list(ENTRIES))
def test_a_call_can_be_captured(ran, name):
    for call in ENTRIES[name].small():
        options = call.build(call.leaves(torch.float32))[1]
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        if name == "select_tokens" and options.get("threshold") is not None and options.get("n_max") is None:
            with pytest.raises(DynamicOutputShapeException):  # its result is packed: as long as the values say
                refusals(ENTRIES[name], call, fake)
            continue
        refused = refusals(ENTRIES[name], call, fake)
        assert not refused, (str(call), refused)
    kernels = {op for op, chosen in ran if chosen == "triton"}
    assert kernels or ENTRIES[name].name in WITHOUT_TRITON, ran


@pytest.mark.parametrize("kind", [VariedSizeWindowAttention, MultiScaleDeformableAttention])
def test_a_module_can_be_captured(ran, kind):
    if kind is VariedSizeWindowAttention:
        module, args = kind(16, 2, 4, rotated=True), (torch.randn(1, 8, 8, 16),)
    else:
        module = kind(16, num_heads=2, num_levels=2, num_points=2)
        args = torch.randn(1, 5, 16), torch.randn(1, 20, 16), torch.rand(1, 5, 2, 2)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        args = [fake.from_tensor(t) for t in args]
        for mode in (ExitStack(), watch := Watch()):
            with mode:
                module(*args, *([((4, 4), (2, 2))] if len(args) > 1 else [])).sum().backward()
    assert not watch.refused
