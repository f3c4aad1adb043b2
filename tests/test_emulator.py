"""The CUDA emulator of tests/cpp/emulator: its collectives give the right values, its errors name the culprit."""

import math
import re
import subprocess
import sys

import native
import numpy
import pytest
import torch
from emulated import FLAGS

pytestmark = pytest.mark.compile
SEEDS = range(8)
SOURCE = native.ROOT / "tests/cpp/emulator_selftest.cu"


def build(sanitize: bool = False):
    own = native.SANITIZERS if sanitize else ()
    unit = native.Unit(SOURCE, (*FLAGS, "-O0" if sanitize else "-O1", *own, *native.pybind_flags(), "-x", "c++"))
    return native.build("emulator_selftest" + ("_sanitized" if sanitize else ""), [unit], own)


@pytest.fixture(scope="module")
def selftest():
    module = native.load(build(), "selftest")

    def run(name, seed=1, n=128, values=None):
        values = numpy.arange(n, dtype="float32") if values is None else values
        out = numpy.zeros_like(values)
        module.run(name, seed, values, out)
        return out

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_and_barriers_give_the_right_values(selftest, seed):
    assert selftest("sum", seed)[0] == sum(range(96))
    assert selftest("vote", seed)[:8].tolist() == [1, 10, 496, 30, 1, 15 * 15, 30 ^ 5, 3 ^ 8]
    assert selftest("named_barrier", seed)[0] == 31.0
    assert selftest("atomic", seed)[:4].tolist() == [120, 119, 1, 1]


def test_the_first_to_swap_is_the_only_one(selftest):
    winners = {tuple(selftest("atomic", seed)[4:6]) for seed in range(20)}
    assert all(a == b > 0 for a, b in winners) and len(winners) > 1


def test_the_seed_alone_decides_the_schedule(selftest):
    orders = [tuple(selftest("order", seed)[:96]) for seed in SEEDS]
    assert orders == [tuple(selftest("order", seed)[:96]) for seed in SEEDS]
    assert len(set(orders)) == len(SEEDS) and all(sorted(x) == list(range(96)) for x in orders)


def test_shared_memory_starts_as_nan(selftest):
    assert all(math.isnan(x) for x in selftest("fresh")[:2])


def test_a_copy_lands_only_when_it_is_waited_for(selftest):
    before, early, after = selftest("copy")[:3]
    assert (before, after) == (3.0, 4.0)
    assert math.isnan(early)
    early, after = selftest("copy4")[:2]
    assert math.isnan(early) and after == 7.0


def test_tf32_products(selftest):
    expected = [sum((i + k / 8) * (k - j) for k in range(8)) for i in range(16) for j in range(8)]
    assert selftest("tf32").tolist() == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_of_matrices_from_shared_memory(selftest, dtype):
    expected = [1 + sum((i + k / 8) * (k - j) for k in range(16)) for i in range(16) for j in range(16)]
    assert selftest(f"mma_{dtype}", n=256).tolist() == expected


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_rounding_is_that_of_torch(selftest, name, dtype):
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 14,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(-7e-5, 7e-5, 4096), torch.linspace(-66000, 66000, 4096)])
    got = torch.from_numpy(selftest(f"round_{name}", values=x.numpy()))
    torch.testing.assert_close(got, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("part_of_block", r"part_of_block, block 0, thread \d+: .*thread 9 has finished.*\(seed 5\)"),
        ("part_of_warp", r"part_of_warp, block 0, thread \d+: .*(part of the warp|thread 9 has finished).*\(seed 5\)"),
        ("different_barriers", "nobody can go on.*thread 0 waits at named_barrier"),
        ("unfinished_copy", "unfinished_copy, block 0, thread 0: finished while a cp.async was under way"),
        ("misaligned_copy", "copy16_async .*not aligned"),
        ("foreign_lane", "foreign_lane, block 0, thread .*reads a lane that takes no part"),
        ("wrong_mask", "wrong_mask, block 0, thread .*the mask leaves out its own lane"),
        ("mixed_collectives", "mixed_collectives, block 0, thread .*part of the warp: thread .* waits at __a"),
        ("mixed_barriers", "mixed_barriers, block 0, thread .*__syncthreads.* meets __syncthreads"),
        ("barrier_number", "barriers are numbered 0 to 15"),
        ("far_copy", "copy16_async outside the shared memory of the block"),
    ],
)
def test_errors_name_kernel_block_and_thread(selftest, kernel, words):
    with pytest.raises(RuntimeError, match=words):
        selftest(kernel, seed=5)


@pytest.mark.parametrize("kernel", ["stray_shared", "stray_global"])
def test_the_sanitizers_name_the_line_of_a_stray_access(kernel):
    library = build(sanitize=True)
    program = (
        "import sys, pathlib, native, numpy; a = numpy.zeros(128, 'float32'); "
        "native.load(pathlib.Path(sys.argv[1]), 'selftest').run(sys.argv[2], 1, a, a)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), kernel],
        env=native.sanitized_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"{kernel}_kernel" in done.stderr, done.stderr[-3000:]
    assert "emulator_selftest.cu:" in done.stderr, done.stderr[-3000:]


def test_ptx_and_launches_stand_in_one_place_each():
    """And each function that hides PTX has a twin in the emulator."""
    code = {f.name: re.sub(r"//.*", "", f.read_text()) for f in (native.ROOT / "csrc/cuda").iterdir()}
    assert [name for name, text in code.items() if re.search(r"\basm\b", text)] == ["intrinsics.cuh"]
    assert [name for name, text in code.items() if "<<<" in text] == ["launch.cuh"]
    twins = (native.ROOT / "tests/cpp/emulator/intrinsics.h").read_text()
    functions = set(re.findall(r"__forceinline__ [\w ]+?[ *](\w+)(?:<\w+>)?\(", code["intrinsics.cuh"])) - {
        "shared_address"
    }
    assert len(functions) > 10 and [f for f in sorted(functions) if not re.search(rf"\b{f}\(", twins)] == []
