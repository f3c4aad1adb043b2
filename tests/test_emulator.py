"""The CUDA emulator of tests/cpp/emulator: its collectives give the right values, its errors name the culprit."""

import ctypes
import math
import subprocess
import sys

import emulated
import pytest

pytestmark = pytest.mark.compile
SEEDS = range(8)


@pytest.fixture(scope="module")
def selftest():
    library = ctypes.CDLL(str(emulated.build_selftest()))
    library.selftest.restype = ctypes.c_char_p
    library.vitkern_emulator_seed.argtypes = [ctypes.c_uint64]

    def run(name: str, seed: int = 1, n: int = 128) -> list[float]:
        # 16-byte aligned input 0, 1, 2 ...
        buffer = (ctypes.c_float * (n + 4))()
        address = -(-ctypes.addressof(buffer) // 16) * 16
        source = (ctypes.c_float * n).from_address(address)
        source[:] = [float(i) for i in range(n)]
        out = (ctypes.c_float * n)()
        library.vitkern_emulator_seed(seed)
        error = library.selftest(name.encode(), source, out)
        if error is not None:
            raise RuntimeError(error.decode())
        return list(out)

    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_collectives_and_barriers_give_the_right_values(selftest, seed):
    assert selftest("sum", seed)[0] == sum(range(96))
    assert selftest("vote", seed)[:6] == [1.0, 10.0, 496.0, 30.0, 1.0, 32.0]
    assert selftest("named_barrier", seed)[0] == 31.0


def test_shared_memory_starts_as_nan(selftest):
    assert all(math.isnan(x) for x in selftest("fresh")[:2])


def test_a_copy_lands_only_when_it_is_waited_for(selftest):
    before, early, after = selftest("copy")[:3]
    assert (before, after) == (3.0, 4.0)
    assert math.isnan(early)


def test_tf32_products(selftest):
    expected = [sum((i + k / 8) * (k - j) for k in range(8)) for i in range(16) for j in range(8)]
    assert selftest("tf32") == expected


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("part_of_block", r"part_of_block, block 0, thread \d+: .*thread 9 has finished.*\(seed 5\)"),
        ("part_of_warp", r"part_of_warp, block 0, thread \d+: .*(part of the warp|thread 9 has finished).*\(seed 5\)"),
        ("different_barriers", "nobody can go on.*thread 0 waits at named_barrier"),
        ("unfinished_copy", "unfinished_copy, block 0, thread 0: finished while a cp.async was under way"),
        ("misaligned_copy", "copy16_async .*not aligned"),
        ("far_copy", "copy16_async outside the shared memory of the block"),
    ],
)
def test_errors_name_kernel_block_and_thread(selftest, kernel, words):
    with pytest.raises(RuntimeError, match=words):
        selftest(kernel, seed=5)


@pytest.mark.parametrize("kernel", ["stray_shared", "stray_global"])
def test_the_sanitizers_name_the_line_of_a_stray_access(kernel):
    library = emulated.build_selftest(sanitize=True)
    program = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).selftest; c = ctypes.CDLL(None); "
        "c.aligned_alloc.restype = ctypes.c_void_p; a = ctypes.c_void_p(c.aligned_alloc(16, 512)); "
        "f(sys.argv[2].encode(), a, a)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), kernel],
        env=emulated.sanitized_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and f"{kernel}_kernel" in done.stderr, done.stderr[-3000:]
    assert "emulator_selftest.cu:" in done.stderr, done.stderr[-3000:]
