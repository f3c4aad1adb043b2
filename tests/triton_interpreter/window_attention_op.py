"""window_attention from the public function down to the interpreted Triton kernels. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import lowered, on_gpu

from vitkern import testing
from vitkern.ops import _window_gpu
from vitkern.ops.window_attention import PLAIN
from vitkern.testing import window_attention as registry

ENTRIES = testing.entries()
SMALL = [(ENTRIES["window_attention"], call) for call in registry.small()]
SMALL += [(ENTRIES["window_attention_qkvpacked"], call) for call in registry.small(packed=True)[6:]]  # few: it is slow
NAMES = ("dq", "dk", "dv", "dbias", "dlogit_scale", "dk_pad", "dv_pad")


@pytest.mark.parametrize("entry, call", SMALL, ids=lambda x: str(x) if isinstance(x, testing.Call) else x.name)
def test_small_calls_of_the_registry_match(entry, call):
    dtype = (torch.float32, torch.float16)[call.seed % 2]  # the interpreter cannot multiply bfloat16
    assert PLAIN.gpu.triton_refusals(lowered(call, call.leaves(dtype))) == []
    testing.assert_matches(entry, on_gpu(call, "triton"), dtype, "triton")


def test_the_choice_falls_on_triton_where_the_cuda_kernels_are_not():
    call = registry.make(1, (3, 3), (2, 2), (1, 1), d=7)
    args = lowered(call, call.leaves(torch.float32))
    reasons = " ".join(_window_gpu.cuda_refusals(args))
    assert "must be bfloat16 or float16" in reasons and "multiple of 8 up to 128, it is 7" in reasons
    assert PLAIN.gpu.choose(args) == "triton"
    wide = registry.make(1, (1, 1), (40, 40), (0, 0), batch=1, heads=1)
    (reason,) = PLAIN.gpu.triton_refusals(lowered(wide, wide.leaves(torch.float32)))
    assert "1024 tokens, got 1600" in reason


@pytest.mark.parametrize("dlse", [None, "random"])
@pytest.mark.parametrize("dout", [None, "random"])
def test_only_the_gradients_that_are_needed_are_written_and_returned(dout, dlse):
    call = registry.make(3, (5,), (3,), (1,), batch=1, heads=1, bias="table", cosine=True, pads="given")
    args = lowered(call, call.leaves(torch.float32))
    with testing.poisoned():
        out, lse = _window_gpu.forward("triton", *args)
        dout = None if dout is None else torch.randn(out.shape)
        dlse = None if dlse is None else torch.randn(lse.shape)

        def gradients(need):
            into = tuple(torch.empty(x.shape) for x in args[:3])
            return *into, *_window_gpu.backward("triton", into, dout, dlse, lse, *args, need)

        everything = gradients(0b1111111)
        assert all(x.isfinite().all() for x in everything)
        for need in [1 << bit for bit in range(7)] + [0b0000111, 0b1111000, 0]:
            for bit, (name, x) in enumerate(zip(NAMES, gradients(need), strict=True)):
                if need >> bit & 1:
                    assert torch.equal(x, everything[bit]), name
                else:
                    assert x.isnan().all() if bit < 3 else x is None, name
