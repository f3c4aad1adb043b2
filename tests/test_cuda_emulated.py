"""The CUDA kernels of csrc/cuda, executed on the CPU by tests/cpp/emulator, against the float64 reference."""

import math
import os
import re
import subprocess
import sys

import emulated_window
import native
import pytest
import torch
from emulated import Edit, build, emulated
from emulated_window import CASES, GRADIENTS, Case, Inputs, check

from vitkern.ops import _window_gpu
from vitkern.ops.window_attention import PLAIN
from vitkern.testing import poisoned

PARTS = min(4, len(os.sched_getaffinity(0)))
pytestmark = pytest.mark.compile


@pytest.mark.parametrize("name", ["window_attention", "tokens", "linear_attention", "deformable_attention"])
def test_every_case_dtype_and_schedule_under_the_sanitizers(name):
    """cuda_emulator/NAME.py, in as many processes as there are cores."""
    build(sanitize=True)  # here, where the compiler itself is not sanitized
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    environment = native.sanitized_environment()
    running = [
        subprocess.Popen(
            [*command, str(native.ROOT / f"tests/cuda_emulator/{name}.py")],
            env=environment | {"VITKERN_PART": f"{part}/{PARTS}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in range(PARTS)
    ]
    said = [process.communicate()[0] for process in running]
    for process, text in zip(running, said, strict=True):
        assert process.returncode == 0, text[-8000:]


@pytest.fixture(scope="module")
def kernels():
    return emulated()


def test_a_missing_lse_is_not_written(kernels):
    inputs = Inputs(CASES["one warp, shifted, dense bias"], torch.bfloat16)
    args = (inputs.q, inputs.k, inputs.v, *inputs.options())
    out, again = torch.full_like(inputs.q, math.nan), torch.full_like(inputs.q, math.nan)
    kernels.ops._window_attention_cuda_fwd(*args, out, torch.empty(0))
    kernels.ops._window_attention_cuda_fwd(*args, again, torch.empty(inputs.q.shape[:-1]))
    assert torch.equal(out, again)


def test_a_table_index_out_of_range_stays_in_bounds(kernels):
    inputs = Inputs(Case(bias="table"), torch.bfloat16)
    clamped = inputs.index.clone()
    inputs.index[0, :4] = torch.tensor([-1, -(2**31), 2**31 - 1, inputs.bias.shape[0]], dtype=torch.int32)
    clamped[0, :4] = torch.tensor([0, 0, inputs.bias.shape[0] - 1, inputs.bias.shape[0] - 1], dtype=torch.int32)
    got = emulated_window.run(kernels, inputs)
    inputs.index = clamped
    for name, x in emulated_window.run(kernels, inputs).items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(
    ("case", "dtype", "words", "sentence"),
    [
        (Case((16, 16), (8, 9)), torch.bfloat16, "at most 64 tokens", "may hold 64 tokens, it holds 72"),
        (Case(d=136), torch.bfloat16, "multiples of 8 up to 128", "of q and k must be a multiple of 8 .* it is 136"),
        (Case(dv=12), torch.float16, "multiples of 8 up to 128", "of v must be a multiple of 8 up to 128, it is 12"),
        (Case(), torch.float32, "bfloat16 and float16", "must be bfloat16 or float16, it is torch.float32"),
    ],
    ids=["tokens", "d", "dv", "dtype"],
)
def test_what_the_kernels_do_not_serve_is_refused(kernels, case, dtype, words, sentence):
    """By the kernels' own checks, and before that by the back-end's, in a sentence."""
    inputs = Inputs(case, dtype)
    with pytest.raises(RuntimeError, match=words):
        emulated_window.run(kernels, inputs)
    args = (inputs.q, inputs.k, inputs.v, *inputs.options())
    with kernels.active():
        (reason,) = _window_gpu.cuda_refusals(args)
        assert PLAIN.gpu.choose(args) != "cuda"
    assert re.search(sentence, reason)


def test_refusals_of_the_back_end(kernels):
    inputs = Inputs(Case(bias="dense"), torch.bfloat16)
    args = [inputs.q, inputs.k, inputs.v, *inputs.options()]
    with kernels.active():
        assert _window_gpu.cuda_refusals(tuple(args)) == [] and PLAIN.gpu.choose(tuple(args)) == "cuda"
        strided = torch.empty(*inputs.q.shape[:-1], 2 * inputs.q.shape[-1], dtype=torch.bfloat16)[..., ::2]
        (reason,) = _window_gpu.cuda_refusals((args[0], strided, *args[2:]))
        assert "last dimension of k must be contiguous" in reason
        (reason,) = _window_gpu.cuda_refusals((*args[:3], inputs.bias.double(), *args[4:]))
        assert "bias must not be float64" in reason
    if torch.version.cuda is None:
        (reason,) = _window_gpu.cuda_refusals(tuple(args))
        assert "torch has no CUDA" in reason or "not built" in reason


@pytest.mark.parametrize("need", [1 << bit for bit in range(7)] + [0b0000111, 0b1111000])
def test_only_the_gradients_that_are_needed_are_returned(kernels, need):
    case = Case((5, 9), shift=(2, 1), pads="vector", cosine=True, bias="table", bias_dtype=torch.bfloat16)
    inputs = Inputs(case, torch.bfloat16)
    inputs.logit_scale = inputs.logit_scale.mean().expand(case.heads)
    want = emulated_window.run(kernels, inputs)
    args = (inputs.q, inputs.k, inputs.v, *inputs.options())
    into = tuple(torch.empty_like(x) for x in args[:3])
    with kernels.active(), poisoned():
        out, lse = _window_gpu.forward("cuda", *args)
        rest = _window_gpu.backward("cuda", into, inputs.dout, inputs.dlse, lse, *args, need)
    for bit, (name, x) in enumerate(zip(GRADIENTS, (*into, *rest), strict=True)):
        if need >> bit & 1:
            assert torch.equal(x, want[f"d{name}"]) and x.dtype == getattr(inputs, name).dtype
        else:
            assert bit < 3 or x is None


def test_no_gradient_of_the_output_is_a_gradient_of_zero(kernels):
    inputs = Inputs(CASES["one warp, shifted, dense bias"], torch.float16)
    args = (inputs.q, inputs.k, inputs.v, *inputs.options())
    dout = (None, torch.zeros_like(inputs.dout), inputs.dout.new_zeros(1).expand(inputs.dout.shape))
    found = []
    with kernels.active(), poisoned():
        lse = _window_gpu.forward("cuda", *args)[1]
        for given in dout:
            into = tuple(torch.empty_like(x) for x in args[:3])
            rest = _window_gpu.backward("cuda", into, given, inputs.dlse, lse, *args, 0b1111111)
            found.append((*into, rest[0]))
    assert (found[0][0] != 0).any() and (found[0][2] == 0).all()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# Every fault is planted in a copy of the sources. `words` is what the emulator says, None where
# it may be the numbers that are wrong.
FAULTS = {
    "missing barrier": (
        Edit("window_attention.cu", "__syncthreads();  // this window is complete;", "// this window is complete;"),
        None,
    ),
    "missing wait": (Edit("window_attention.cu", "    copy_wait_all();\n", ""), None),
    "missing barrier between P and dv": (
        Edit("window_attention_bwd.cu", "__syncthreads();  // P and dS are complete;", "// P and dS are complete;"),
        None,
    ),
    "index off by one": (
        Edit("window_attention.cuh", "n * 8 + me.t * 2 + (c & 1)", "n * 8 + me.t * 2 + (c & 1) + 1"),
        None,
    ),
    "wrong fragment lane": (
        Edit("window_attention.cuh", "me.lane & 7) + (me.lane >> 4) * 8)", "me.lane & 7) + (me.lane >> 3 & 1) * 8)"),
        None,
    ),
    "missing barrier after hidden keys were cleaned": (
        Edit("window_attention_bwd.cu", "true);\n        }\n        __syncthreads();\n", "true);\n        }\n"),
        None,
    ),
    "bias gradient added twice": (
        Edit("window_attention_bwd.cu", "dbias[n][c] += s[n][c];", "dbias[n][c] += 2.0f * s[n][c];"),
        None,
    ),
    "a collective that part of a warp skips": (
        Edit("window_attention.cu", "    __syncwarp();\n    store", "    if (me.lane != 5) __syncwarp();\n    store"),
        "window_attention_forward, block .*, thread .*part of the (warp|block)",
    ),
    "a barrier that one thread skips": (
        Edit("window_attention.cu", "__syncthreads();\n  fill", "if (me.thread != 3) __syncthreads();\n  fill"),
        "window_attention_forward, block .*, thread .*(part of the block|nobody can go on|part of the warp)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name):
    edit, words = FAULTS[name]
    broken = emulated((edit,))
    with pytest.raises((AssertionError, RuntimeError), match=words):
        for case in ("7x7 packed, shifted", "7x7 table", "exact mask"):
            check(broken, CASES[case], torch.bfloat16, range(8))


# Writes beyond global buffers, by one chunk and by one element.
STRAY = (
    Edit("window_attention.cu", "store_rows<S>(p, p.out, head,", "store_rows<S>(p, p.out, head + (p.out.head == 32),"),
    Edit("window_attention_reduce.cu", "* w.map.size + j : nullptr", "* w.map.size + j + 1 : nullptr"),
)
STRAY_PROGRAM = """
import sys, torch
from emulated import emulated
from emulated_window import Case, Inputs, reference
from test_cuda_emulated import STRAY
from vitkern.ops import _window_gpu

inputs = Inputs(Case(bias="table"), torch.bfloat16)
args = (inputs.q, inputs.k, inputs.v, *inputs.options())
into = tuple(torch.empty_like(x) for x in args[:3])
with emulated(STRAY, sanitize=True).active():
    if sys.argv[1] == "out":
        _window_gpu.forward("cuda", *args)
    _window_gpu.backward("cuda", into, inputs.dout, None, reference(*args)[1], *args, 0b1111111)
"""


@pytest.mark.parametrize(
    ("buffer", "file"), [("out", "window_attention.cuh"), ("workspace", "window_attention_reduce.cu")]
)
def test_a_write_beyond_a_tensor_is_reported_with_its_line(buffer, file):
    """torch allocates exactly what a tensor holds, and the sanitizer guards the byte behind it."""
    build(STRAY, sanitize=True)
    done = subprocess.run(
        [sys.executable, "-c", STRAY_PROGRAM, buffer],
        env=native.sanitized_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(rf"heap-buffer-overflow(.|\n)*WRITE of size(.|\n)*{file}:\d+", done.stderr), done.stderr[-4000:]
    assert re.search(r"located \d+ bytes (after|to the right of) \d+-byte region", done.stderr), done.stderr[-4000:]
