"""The wheel and the libraries: what they hold, what they need, and that import never fails."""

import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

import vitkern

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(vitkern.__file__).parent
LIBRARIES = [p for p in (PACKAGE / "_cpu.so", PACKAGE / "_cuda.so") if p.exists()]
SHIM = ROOT / "tests" / "torch_2_10_symbols.txt"

needs_library = pytest.mark.skipif(not LIBRARIES, reason="no library is built")


def nm(path, *flags):
    out = subprocess.run(["nm", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in out.splitlines() if line.split()]


@needs_library
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_a_library_needs_no_symbol_newer_than_torch_2_10(library):
    allowed = set(SHIM.read_text().split())
    needed = {name.split("@")[0] for name in nm(library, "-D", "--undefined-only")}
    torch_names = {n for n in needed if n.startswith(("aoti_torch", "torch_")) or "c10" in n or re.search(r"\bat::", n)}
    assert torch_names <= allowed, f"not in torch 2.10: {sorted(torch_names - allowed)}"
    assert not any(n.startswith(("Py", "_Py")) for n in needed), "a Python symbol ties the wheel to one Python"
    assert not any(n.startswith(("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at")) for n in needed), (
        "C++ names have no stable ABI"
    )


@needs_library
def test_instruction_set_units_have_no_weak_symbols():
    objects = sorted((ROOT / "build" / "objects" / "_cpu").glob("isa_*.o"))
    if not objects:
        pytest.skip("the library was built elsewhere")
    assert len(objects) == 4
    for obj in objects:
        out = subprocess.run(["nm", "--defined-only", str(obj)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in out.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{obj.name}: a weak function may replace the baseline's: {weak[:3]}"


def test_the_wheel_serves_every_python_and_has_one_top_level_name(tmp_path):
    for name in ("csrc", "vitkern", "triton_kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(
            source, tmp_path / name
        )
    env = {"PATH": "/usr/bin:/bin", "VITKERN_BUILD_CPU": "0", "VITKERN_BUILD_CUDA": "0", "HOME": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(tmp_path / "dist"),
        ".",
    ]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("vitkern-") and "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"vitkern"}, top
    for want in ("vitkern/triton_kernels/window_attention.py", "vitkern/triton_kernels/configs/window_attention.json",
                 "vitkern/py.typed", "vitkern/reference/window_attention.py", "vitkern/demo/run.py"):  # fmt: skip
        assert want in names, want
    assert not any(n.startswith("vitkern/tests") or "/csrc/" in n for n in names)


def test_the_source_distribution_holds_what_a_build_needs(tmp_path):
    """Its own copy: a build leaves files behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    needed = [
        n for n in listed if n.split("/")[0] in ("csrc", "triton_kernels", "vitkern", "setup.py", "pyproject.toml")
    ]
    for name in (*needed, "MANIFEST.in", "README.md", "LICENSE", "constraints-cpu.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path / "dist"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").glob("vitkern-*.tar.gz")
    with tarfile.open(archive) as held:
        names = {n.split("/", 1)[1] for n in held.getnames() if "/" in n}
    assert set(needed) <= names, sorted(set(needed) - names)
    assert not any(n.endswith(".so") or n.startswith("tests/") for n in names)


def test_the_platform_tag_is_that_of_the_oldest_glibc_with_every_symbol(tmp_path):
    tag = runpy.run_path(str(ROOT / "setup.py"), run_name="read")["platform_tag"]
    calls = {"old": "memcpy@GLIBC_2.14", "new": "pthread_create@GLIBC_2.34"}
    for name, symbol in calls.items():
        function = symbol.split("@")[0]
        source = f'__asm__(".symver {function},{symbol}"); int {function}(); int call() {{ return {function}(); }}'
        (tmp_path / f"{name}.c").write_text(source)
        command = [
            "gcc",
            "-shared",
            "-fPIC",
            "-fno-builtin",
            "-o",
            str(tmp_path / f"{name}.so"),
            str(tmp_path / f"{name}.c"),
        ]
        subprocess.run(command, check=True, capture_output=True)
    assert tag([tmp_path / "old.so"], "x86_64") == "manylinux_2_17_x86_64"
    assert tag([tmp_path / "old.so", tmp_path / "new.so"], "x86_64") == "manylinux_2_34_x86_64"


PROBE = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED: raise ImportError("blocked for the test")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import torch, vitkern
assert vitkern.__file__.startswith(sys.argv[1])
assert not [m for m in sys.modules if m.split(".")[0] in ("triton", "timm", "transformers", "torchvision", "monai")]
info = vitkern.info()
assert "was not built" in info["ops"]["window_attention"]["cpu"], info
q = torch.randn(1, 4, 4, 1, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = vitkern.window_attention(q, q, q, 2, 1)
    vitkern.window_attention(q, q, q, 2, 1)
assert len([w for w in caught if "reference" in str(w.message)]) == 1, [str(w.message) for w in caught]
out.sum().backward()
numbers = ([2, 2], [1, 1], False, False, 0.5, -100.0, 0.0, 0.0, 0.0, "")
assert torch.ops.vitkern.window_attention_fwd(*[q.detach()] * 3, *[None] * 6, *numbers)[0].isfinite().all()
print("fine")
"""


def test_import_and_calls_work_without_any_library_and_without_triton(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "vitkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    probe = PROBE.replace("BLOCKED", '("triton", "timm", "transformers")')
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "fine", done.stderr


def test_a_library_that_does_not_load_is_a_reason_and_not_a_failure(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "vitkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "vitkern" / "_cpu.so").write_bytes(b"not a library")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import vitkern; print(vitkern.info()['ops']['window_attention']['cpu'])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert "OSError" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("collects", (True, False))
def test_importing_makes_no_pass_over_all_objects_and_leaves_the_collector_as_it_was(collects):
    code = f"""
import gc, sys, torch
gc.set_threshold(100, 2, 2)
{"gc.enable()" if collects else "gc.disable()"}
meanwhile = []
gc.callbacks.append(lambda *_: meanwhile.append("vitkern.bias" in sys.modules and "vitkern.ops.window_order" not in sys.modules))
import vitkern
gc.callbacks.clear()
print(gc.isenabled(), any(meanwhile))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"{collects} False", done.stdout + done.stderr


@pytest.mark.skipif(not (PACKAGE / "_cpu.so").exists(), reason="the CPU library is not built")
def test_an_instruction_set_this_machine_lacks_is_an_error_with_the_sets_it_has():
    code = "import torch, vitkern; print(torch.ops.vitkern._cpu_capability())"
    env = {"PATH": "/usr/bin:/bin", "VITKERN_CPU_CAPABILITY": "avx9000"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "must be a set this machine has (" in done.stderr and "got 'avx9000'" in done.stderr
    env["VITKERN_CPU_CAPABILITY"] = "default"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.strip()
        == "default"
    )


def test_an_unknown_forced_back_end_is_refused_at_import():
    env = {"PATH": "/usr/bin:/bin", "VITKERN_BACKEND": "tpu"}
    done = subprocess.run([sys.executable, "-c", "import vitkern"], capture_output=True, text=True, env=env)
    assert "VITKERN_BACKEND must be one of" in done.stderr


def test_info_names_versions_sets_and_reasons(capsys):
    from vitkern.cli import main

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "instruction set" in text and "window_attention" in text


def test_info_lists_every_public_op_and_tells_what_is_not_written():
    import vitkern

    ops = vitkern.info()["ops"]
    assert set(ops) == {name for name in vitkern.__all__ if hasattr(getattr(vitkern, name), "explain")}
    for name in ("window_attention", "merge_tokens", "select_tokens"):
        assert "is written" not in f"{ops[name]['triton']} {ops[name]['cuda']}"
    assert ops["soft_merge"]["cuda"] == "no CUDA C++ kernel is written for this op"


def test_no_source_file_grows_past_450_lines():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [f for f in listed if f.endswith((".py", ".cpp", ".cu", ".h", ".cuh", ".inc")) and (ROOT / f).exists()]
    long = {f: n for f in files if (n := len((ROOT / f).read_text().splitlines())) > 450 and not f.startswith("tests/")}
    assert not long, long
