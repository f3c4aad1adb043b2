"""The CPU kernels' own functions, at every vector width: exp, log, products, conversions, window geometry."""

import os
import pathlib
import shutil
import subprocess
import sys

import native
import numpy
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
WIDTHS = {4: "", 8: "-mavx2 -mfma -mf16c", 16: "-mavx2 -mfma -mf16c"}  # 16 lanes run as two halves without AVX-512
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture(scope="session", params=WIDTHS, ids=lambda w: f"{w} lanes")
def unit(request):
    """The unit compiled with this many lanes, as a Python module."""
    lanes = request.param
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = WIDTHS[lanes].split() if cpuinfo.exists() and "avx2" in cpuinfo.read_text() else []
    flags += ["-O2", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", f"-DVITKERN_LANES={lanes}"]
    unit = native.Unit(ROOT / "tests/cpp/internals.cpp", (*flags, *native.pybind_flags()))
    return native.load(native.build(f"internals_{lanes}", [unit]), "internals")


def ulps(got, want, dtype):
    """Distance in units in the last place of the exact value."""
    return numpy.max(numpy.abs(got.astype("longdouble") - want) / numpy.spacing(numpy.abs(want).astype(dtype)))


def test_every_unit_is_compiled_with_its_own_lanes(unit, request):
    assert unit.lanes == request.node.callspec.params["unit"]


def test_exp_is_within_two_ulp_and_exact_at_its_ends(unit):
    for name, dtype, low, high in (("exp_f32", "float32", -87, 88), ("exp_f64", "float64", -708, 709)):
        f = getattr(unit, name)
        x = numpy.linspace(low, high, 1 << 16).astype(dtype)
        assert ulps(f(x), numpy.exp(x.astype("longdouble")), dtype) <= 2
        ends = numpy.array([0, -numpy.inf, numpy.inf, numpy.nan, -1e30, 1e30] + [0] * 10, dtype=dtype)
        numpy.testing.assert_array_equal(f(ends)[:6], [1, 0, numpy.inf, numpy.nan, 0, numpy.inf])


def test_exp2_of_scores_is_within_two_ulp_and_hides_minus_infinity(unit):
    x = numpy.linspace(-125, 1, 1 << 16).astype("float32")
    assert ulps(unit.exp2_score(x), numpy.exp2(x.astype("longdouble")), "float32") <= 2
    ends = numpy.array([0, -numpy.inf, numpy.nan, -1e30, -128, -127.6] + [0] * 10, dtype="float32")
    numpy.testing.assert_array_equal(unit.exp2_score(ends)[:6], [1, 0, numpy.nan, 0, 0, 0])


def test_log_is_within_two_ulp_and_exact_at_its_ends(unit):
    for name, dtype in (("log_f32", "float32"), ("log_f64", "float64")):
        f = getattr(unit, name)
        x = numpy.concatenate([numpy.geomspace(1e-30, 1e30, 1 << 15), numpy.linspace(2, 5000, 1 << 15)]).astype(dtype)
        assert ulps(f(x), numpy.log(x.astype("longdouble")), dtype) <= 2
        ends = numpy.array([1, 0, numpy.inf, numpy.nan] + [1] * 12, dtype=dtype)
        numpy.testing.assert_array_equal(f(ends)[:4], [0, -numpy.inf, numpy.inf, numpy.nan])


def test_products_of_every_shape_of_tile(unit):
    generator = numpy.random.default_rng(0)
    for rows in (1, 2, 3, 5, 7, 8, 9, 13, 24, 49):
        for vectors in (1, 2, 3, 4, 5, 7):
            for depth in (1, 31, 65, 200):
                a = generator.standard_normal((rows, depth)).astype("float32")
                b = generator.standard_normal((depth, vectors * unit.lanes)).astype("float32")
                want = a.astype("float64") @ b.astype("float64")
                assert numpy.abs(unit.gemm(a, b) - want).max() < 1e-6 * depth, (rows, vectors, depth)


def test_sixteen_bit_conversions_round_as_torch_does(unit):
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.linspace(-7e-5, 7e-5, 4097), torch.linspace(-66000, 66000, 4097)])
    for name, dtype in (("half_round_trip", torch.float16), ("bfloat_round_trip", torch.bfloat16)):
        got = torch.from_numpy(getattr(unit, name)(x.numpy()))
        torch.testing.assert_close(got, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_geometry_is_that_of_the_reference(unit):
    from vitkern.reference.window_attention import geometry

    maps = [((9, 20), (7, 7), (3, 3)), ((5, 14), (7, 7), (3, 0)), ((17,), (4,), (3,)), ((3, 4, 5), (2, 2, 3), (1, 0, 2)),
            ((2, 3, 4, 5), (2, 2, 3, 3), (1, 1, 1, 1)), ((1, 1), (3, 3), (1, 2))]  # fmt: skip
    for lengths, window, shift in maps:
        for roll_first in (False, True):
            token, region, slot = geometry(list(lengths), list(window), list(shift), roll_first, torch.device("cpu"))
            tokens, regions, walk_agrees = unit.geometry(list(lengths), list(window), list(shift), roll_first)
            assert tokens == token.flatten().tolist() and regions == region.flatten().tolist()
            assert token.flatten()[slot].tolist() == list(range(slot.numel()))
            assert walk_agrees


def test_kernels_of_sixteen_lanes_match_the_reference_on_any_machine(tmp_path):
    """The whole CPU library with its baseline unit widened to 16 lanes: what an AVX-512 machine tiles, run here."""
    tree = ROOT / "build" / "wide"
    shutil.rmtree(tree, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "vitkern", "triton_kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    objects = tree / "build" / "objects" / "_cpu"
    objects.mkdir(parents=True)
    newest = max(f.stat().st_mtime for f in [*ROOT.glob("csrc/**/*"), ROOT / "setup.py"])
    for built in (ROOT / "build" / "objects" / "_cpu").glob("*.o"):
        if built.name != "isa_default.o" and built.stat().st_mtime > newest:  # the flag changes the baseline unit alone
            shutil.copy(built, objects)
    flags = "-DVITKERN_BASELINE_LANES=16 -O1"  # -O3 takes three times as long, more than the tests gain
    env = os.environ | {"VITKERN_CXXFLAGS": flags, "VITKERN_BUILD_CUDA": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-4000:]
    env = os.environ | {"PYTHONPATH": str(tree), "VITKERN_CPU_CAPABILITY": "default", "VITKERN_FUZZ": "16"}
    names = "small or sampled or shapes_of or every_head"
    tests = [str(ROOT / "tests" / f) for f in ("test_ops.py", "test_window_attention.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *tests]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
