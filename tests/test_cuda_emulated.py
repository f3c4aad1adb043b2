"""The CUDA kernels of csrc/cuda, executed on the CPU by tests/cpp/emulator, against the float64 reference."""

import math
import subprocess
import sys

import emulated
import emulated_window
import pytest
import torch
from emulated import Edit
from emulated_window import CASES, Case, Inputs, oracle

SEEDS = range(8)
DTYPES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def ops():
    return emulated.Emulated("window")


def assert_close(name: str, got: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, factor: float) -> None:
    """The error of the kernel is at most `factor` times that of the eager reference, in the same dtypes, plus 4 ulp."""
    x, y, z = got.double(), exact.double(), eager.double()
    assert torch.equal(x.isnan(), y.isnan()), f"{name}: NaN in other places"
    assert torch.equal(x.isinf(), y.isinf()), f"{name}: infinity in other places"
    seen = y.isfinite()
    if not seen.any():
        return
    error, allowed = (x - y)[seen].abs().max().item(), (z - y)[seen].nan_to_num(0.0).abs().max().item()
    ulp = torch.finfo(got.dtype).eps * y[seen].abs().max().item()
    assert error <= factor * allowed + 4 * ulp, f"{name}: error {error:.3g}, eager {allowed:.3g}, ulp {ulp:.3g}"


def check(ops, case: Case, dtype: torch.dtype, seeds=SEEDS) -> None:
    """Every seed gives the same bits, and they agree with the oracle."""
    inputs = Inputs(case, dtype)
    first = None
    for seed in seeds:
        ops.seed(seed)
        results = emulated_window.run(ops, inputs)
        first = first or results
        for name, x in results.items():
            same = torch.equal(x.nan_to_num(-7.0), first[name].nan_to_num(-7.0))
            assert same, f"{name} depends on the order ({seed=})"
    exact, eager = oracle(inputs, torch.float64), oracle(inputs, None)
    for name in ("out", "lse"):
        assert_close(name, first[name], exact[name], eager[name], 2.0)
    if case.poison:
        # Tokens whose log-sum-exp is not NaN neither see a NaN key nor share a key with a row that does: their
        # gradients are those of a map without it.
        clean = Inputs(case, dtype).without_poison()
        exact, eager = oracle(clean, torch.float64), oracle(clean, None)
        rows = ~first["lse"].isnan()
        for name in ("dq", "dk", "dv"):
            assert_close(name, first[name][rows], exact[name][rows], eager[name][rows], 3.0)
        return
    for name in first.keys() - {"out", "lse"}:
        assert_close(name, first[name], exact[name], eager[name], 3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_agree_with_the_oracle_under_every_schedule(ops, name, dtype):
    check(ops, CASES[name], dtype)


def test_a_missing_lse_is_not_written(ops):
    inputs = Inputs(CASES["one warp, shifted, dense bias"], torch.bfloat16)
    out, again = torch.full_like(inputs.q, math.nan), torch.full_like(inputs.q, math.nan)
    ops.forward(inputs.q, inputs.k, inputs.v, *inputs.options(), out, torch.empty(0))
    ops.forward(inputs.q, inputs.k, inputs.v, *inputs.options(), again, torch.empty(inputs.q.shape[:-1]))
    assert torch.equal(out, again)


def test_a_table_index_out_of_range_stays_in_bounds(ops):
    inputs = Inputs(Case(bias="table"), torch.bfloat16)
    clamped = inputs.index.clone()
    inputs.index[0, :4] = torch.tensor([-1, -(2**31), 2**31 - 1, inputs.bias.shape[0]], dtype=torch.int32)
    clamped[0, :4] = torch.tensor([0, 0, inputs.bias.shape[0] - 1, inputs.bias.shape[0] - 1], dtype=torch.int32)
    got = emulated_window.run(ops, inputs)
    inputs.index = clamped
    for name, x in emulated_window.run(ops, inputs).items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize(
    ("case", "dtype", "words"),
    [
        (Case((16, 16), (8, 9)), torch.bfloat16, "at most 64 tokens"),
        (Case(d=136), torch.bfloat16, "multiples of 8 up to 128"),
        (Case(dv=12), torch.float16, "multiples of 8 up to 128"),
        (Case(), torch.float32, "bfloat16 and float16"),
    ],
    ids=["tokens", "d", "dv", "dtype"],
)
def test_what_the_kernels_do_not_serve_is_refused(ops, case, dtype, words):
    with pytest.raises(RuntimeError, match=words):
        emulated_window.run(ops, Inputs(case, dtype))


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
    broken = emulated.Emulated("fault", (edit,))
    with pytest.raises((AssertionError, RuntimeError), match=words):
        for case in ("7x7 packed, shifted", "7x7 table", "exact mask"):
            check(broken, CASES[case], torch.bfloat16)


def test_the_kernels_are_clean_under_the_sanitizers():
    emulated.build("sanitized", sanitize=True)
    environment = emulated.sanitized_environment()
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


if __name__ == "__main__":
    sanitized = emulated.Emulated("sanitized", sanitize=True)
    for case in CASES.values():
        emulated_window.run(sanitized, Inputs(case, torch.bfloat16))
