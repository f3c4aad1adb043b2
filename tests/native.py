"""Builds the C++ that only the tests use, with ninja, in build/native. What did not change is not built again.

A library is an importable Python module (pybind11). Units of the same source and flags are compiled once for all
libraries; ninja knows from the compiler which headers each of them reads.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fmax-errors=3")
SANITIZERS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
RULES = """rule compile
  command = g++ -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $in $flags -o $out
"""


@dataclass(frozen=True)
class Unit:
    source: Path
    flags: tuple[str, ...]


def build(name: str, units: Sequence[Unit], link: Sequence[str] = ()) -> Path:
    """The library `name` of these units."""
    text = RULES
    extra = shlex.split(os.environ.get("VITKERN_TEST_CXXFLAGS", ""))  # "-O0 -g" for a debugger
    objects = []
    for unit in units:
        digest = hashlib.sha256(repr((unit.source, unit.flags, extra)).encode()).hexdigest()[:12]
        objects.append(f"{unit.source.stem}_{digest}.o")
        text += (
            f"build {objects[-1]}: compile {_path(unit.source)}\n  flags = {_flags((*FLAGS, *unit.flags, *extra))}\n"
        )
    text += f"build {name}.so: link {' '.join(objects)}\n  flags = {_flags(link)}\n"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of the tests may build the same objects
        (BUILD / f"{name}.ninja").write_text(text)
        command = [sys.executable, "-m", "ninja", "--quiet", "-C", str(BUILD), "-f", f"{name}.ninja"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} does not compile\n{done.stdout[-4000:]}{done.stderr[-1000:]}")
    return BUILD / f"{name}.so"


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _flags(flags: Sequence[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


@functools.cache
def pybind_flags() -> tuple[str, ...]:
    import pybind11

    return "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")


def load(library: Path, module: str) -> ModuleType:
    """The pybind11 module of that name in the library. pybind11 keeps one module per full name, whatever the file."""
    spec = importlib.util.spec_from_file_location(f"{library.stem}.{module}", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sanitized_environment() -> dict[str, str]:
    """For a process that loads a sanitized library: the sanitizers come before everything else."""
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
