"""The CUDA kernels on the CPU: builds csrc/cuda over tests/cpp/emulator and loads it as torch ops.

A build is a plain g++ call per source, cached in build/emulated by the content of everything that goes in. `edits`
replace text in a copy of the sources: that is how the tests plant faults.
"""

import ctypes
import dataclasses
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "emulated"
SOURCES = (
    "window_attention.cu",
    "window_attention_bwd.cu",
    "window_attention_reduce.cu",
    "window_attention_op.cpp",
)
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-fmax-errors=3")
FLAGS += ("-DVITKERN_EMULATED",)
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
GEOMETRY = (
    "Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? k_pad, Tensor? v_pad, Tensor? seed, "
    "SymInt[] window, SymInt[] shift, bool roll_first, bool pad_visible, float scale, float mask_value, "
    "float cosine_max, float cosine_eps, float dropout_p"
)
SCHEMAS = (
    f"_window_attention_cuda_fwd(Tensor q, Tensor k, Tensor v, {GEOMETRY}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    f"_window_attention_cuda_bwd(Tensor dout, Tensor? dlse, Tensor lse, Tensor q, Tensor k, Tensor v, {GEOMETRY}, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? dlogit_scale, Tensor(f!)? dk_pad, "
    "Tensor(g!)? dv_pad, Tensor(h!) workspace) -> ()",
    "_window_attention_cuda_workspace(SymInt heads, SymInt kv_heads, SymInt windows, SymInt tokens, SymInt d, "
    "SymInt dv) -> SymInt",
)


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces `old`, which must occur exactly `count` times in csrc/cuda/`file`, by `new`."""

    file: str
    old: str
    new: str
    count: int = 1


class Emulated:
    """The ops of one build. `seed(n)` fixes the schedules that follow."""

    def __init__(self, name: str, edits: tuple[Edit, ...] = (), sanitize: bool = False):
        library = build(name, edits, sanitize)
        namespace = library.stem
        self._fragment = torch.library.Library(namespace, "FRAGMENT")
        for schema in SCHEMAS:
            self._fragment.define(schema)
        torch.ops.load_library(str(library))
        ops = getattr(torch.ops, namespace)
        self.forward = ops._window_attention_cuda_fwd.default
        self.backward = ops._window_attention_cuda_bwd.default
        self.workspace = ops._window_attention_cuda_workspace.default
        self._seed = ctypes.CDLL(str(library)).vitkern_emulator_seed
        self._seed.argtypes = [ctypes.c_uint64]

    def seed(self, n: int) -> None:
        self._seed(n)


def build(name: str, edits: tuple[Edit, ...] = (), sanitize: bool = False) -> Path:
    """Compiles what is not cached and returns the library, named after its content."""
    files = sorted((*ROOT.glob("csrc/c[ou]*/*"), *ROOT.glob("tests/cpp/emulator/*.h")))
    flags = (*FLAGS, "-O0" if sanitize else "-O1", *(SANITIZERS if sanitize else ()))
    content = [(str(f.relative_to(ROOT)), f.read_text()) for f in files]
    for edit in edits:
        at = [n for n, _ in content].index(f"csrc/cuda/{edit.file}")
        text = content[at][1]
        if text.count(edit.old) != edit.count:
            raise ValueError(f"{edit.file}: {edit.old!r} occurs {text.count(edit.old)} times, not {edit.count}")
        content[at] = (content[at][0], text.replace(edit.old, edit.new))
    inputs = (flags, content, Path(__file__).read_text(), torch.__version__)
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]
    namespace = f"vitkern_{name}_{digest}"
    library = BUILD / f"{namespace}.so"
    if library.exists():
        return library
    folder = BUILD / namespace
    for path, text in content:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    headers = [(path, text) for path, text in content if Path(path).suffix not in (".cu", ".cpp")]
    torch_folder = Path(torch.__file__).parent
    includes = ("-I", str(folder / "tests/cpp/emulator"), "-isystem", str(torch_folder / "include"))

    def compile_one(source: str) -> str:
        defines = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-DVITKERN_LIBRARY={namespace}")
        text = dict(content)[f"csrc/cuda/{source}"]
        used = (flags, headers, text, defines if source.endswith(".cpp") else ())
        made = BUILD / "objects" / f"{hashlib.sha256(repr(used).encode()).hexdigest()[:16]}.o"
        if not made.exists():
            made.parent.mkdir(parents=True, exist_ok=True)
            partial = made.with_suffix(f".{os.getpid()}")
            run("g++", *flags, *defines, *includes, "-x", "c++", "-c", str(folder / "csrc/cuda" / source),
                "-o", str(partial))  # fmt: skip
            partial.rename(made)
        return str(made)

    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    partial = library.with_suffix(f".{os.getpid()}")
    run("g++", "-shared", *flags, *objects, "-L", str(torch_folder / "lib"), "-ltorch_cpu", "-o", str(partial))
    partial.rename(library)
    return library


def build_selftest(sanitize: bool = False) -> Path:
    """tests/cpp/emulator_selftest.cu as a library."""
    source = ROOT / "tests/cpp/emulator_selftest.cu"
    parts = [source, *ROOT.glob("tests/cpp/emulator/*.h"), *ROOT.glob("csrc/cuda/*.cuh")]
    digest = hashlib.sha256("".join(f.read_text() for f in sorted(parts)).encode()).hexdigest()[:12]
    flags = (*FLAGS, "-O1", *(SANITIZERS if sanitize else ()))
    library = BUILD / f"selftest{'_sanitized' if sanitize else ''}_{digest}.so"
    if not library.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        run("g++", "-shared", *flags, "-I", str(ROOT / "tests/cpp/emulator"), "-x", "c++", str(source),
            "-o", str(partial))  # fmt: skip
        partial.rename(library)
    return library


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def sanitized_environment() -> dict[str, str]:
    """For a process that loads a sanitized build: the sanitizers come before everything else."""
    libraries = [
        subprocess.run(("g++", f"-print-file-name={x}"), capture_output=True, text=True).stdout.strip()
        for x in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
