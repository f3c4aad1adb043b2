"""The CUDA kernels on the CPU: builds csrc/cuda over tests/cpp/emulator and puts it where the CUDA ops are looked for.

`edits` replace text in a copy of the sources: that is how the tests plant faults.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import native
import torch

from vitkern import backends
from vitkern.ops import _cuda
from vitkern.testing import Call, Entry, assert_matches, poisoned
from vitkern.testing.oracle import _run

CUDA = native.ROOT / "csrc" / "cuda"
SOURCES = (
    "window_attention.cu",
    "window_attention_bwd.cu",
    "window_attention_reduce.cu",
    "window_attention_op.cpp",
    "linear_attention.cu",
    "linear_attention_bwd.cu",
    "linear_attention_op.cpp",
    "bipartite_match.cu",
    "merge_plan.cu",
    "merge_tokens.cu",
    "merge_tokens_mlerp.cu",
    "tokens_op.cpp",
    "deformable_attention.cu",
    "deformable_attention_op.cpp",
)
FLAGS = ("-Wall", "-Wno-unknown-pragmas", "-DVITKERN_EMULATED", "-I", str(native.ROOT / "tests/cpp/emulator"))


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces `old`, which must occur exactly `count` times in csrc/cuda/`file`, by `new`."""

    file: str
    old: str
    new: str
    count: int = 1


class Emulated:
    """One build. Its ops are found in a namespace of their own; inside `active` the CUDA back-end is this build."""

    def __init__(self, edits: tuple[Edit, ...] = (), sanitize: bool = False):
        namespace = _namespace(edits)
        self._fragment = torch.library.Library(namespace, "FRAGMENT")
        for schema in _cuda.schemas:
            self._fragment.define(schema)
        module = native.load(build(edits, sanitize), "emulated")  # loading it registers the ops
        self._set_seed = module.seed
        self.launched = module.launched  # the kernels since the last call of this
        self.ops = getattr(torch.ops, namespace)

    @contextmanager
    def active(self) -> Iterator[None]:
        before = _cuda.ops, set(backends._loaded)
        _cuda.ops = self.ops
        backends._loaded.add("_cuda")
        try:
            yield
        finally:
            _cuda.ops, backends._loaded = before

    @contextmanager
    def schedule(self, seed: int) -> Iterator[None]:
        """Kernels run in the order that the seed gives; a failure names it."""
        self._set_seed(seed)
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


emulated = functools.cache(Emulated)  # ops are registered once


def part(items: Iterable) -> list:
    """This process's share of some cases: the suites run in several processes at a time."""
    mine, parts = map(int, os.environ.get("VITKERN_PART", "0/1").split("/"))
    return list(items)[mine::parts]


def check_schedules(build: Emulated, entry: Entry, call: Call, dtype: torch.dtype, seeds: Iterable[int]) -> None:
    """Outputs and gradients keep to the rule, and have the same bits under every schedule."""
    first = None
    for seed in seeds:
        with build.schedule(seed):
            if first is None:
                assert_matches(entry, call, dtype, "cuda")
            with poisoned():
                found = _run(entry, call.rounded(dtype), dtype, "cuda", entry.gradient)
            first = first or found
            for name, x in found.items():
                assert torch.equal(x.nan_to_num(-7.0), first[name].nan_to_num(-7.0)), f"{name} differs from the first"


def build(edits: tuple[Edit, ...] = (), sanitize: bool = False) -> Path:
    namespace = _namespace(edits)
    flags, level = (*FLAGS, *(native.SANITIZERS if sanitize else ())), "-Og" if sanitize else "-O1"
    torch_folder = Path(torch.__file__).parent
    stable = ("-isystem", str(torch_folder / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000")
    changed, quick = plant(edits), level if sanitize else "-O0"
    tests = native.ROOT / "tests/cpp"
    units = [
        native.Unit(tests / "emulator_module.cpp", (*flags, level, *native.pybind_flags())),
        native.Unit(tests / "emulator_library.cpp", (f'-DVITKERN_LIBRARY="{namespace}"',)),
    ]
    for source in SOURCES:
        path = changed.get(source, CUDA / source)
        own = ("-x", "c++") if source.endswith(".cu") else stable
        # a planted fault runs once: what it changes compiles quickly, the rest is shared (at -O0 reports lack lines)
        units.append(native.Unit(path, (*flags, quick if source in changed else level, "-I", str(CUDA), *own)))
    link = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", *(native.SANITIZERS if sanitize else ()))
    return native.build(namespace + ("_sanitized" if sanitize else ""), units, link)


def plant(edits: tuple[Edit, ...]) -> dict[str, Path]:
    """Writes a copy of csrc/cuda with the edits; returns the sources that differ by them, or by what they include."""
    if not edits:
        return {}
    text = {f.name: f.read_text() for f in CUDA.iterdir()}
    for edit in edits:
        if text[edit.file].count(edit.old) != edit.count:
            raise ValueError(
                f"{edit.file}: {edit.old!r} occurs {text[edit.file].count(edit.old)} times, not {edit.count}"
            )
        text[edit.file] = text[edit.file].replace(edit.old, edit.new)
    folder = native.BUILD / "edited" / _digest(edits)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in text.items():
        path = folder / name
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
    changed = {edit.file for edit in edits}
    return {source: folder / source for source in SOURCES if changed & _reached(source, text)}


def _reached(file: str, text: dict[str, str]) -> set[str]:
    """The file, and what it includes of csrc/cuda."""
    includes = [name for name in re.findall(r'#include "(.*)"', text[file]) if name in text]
    return {file}.union(*(_reached(name, text) for name in includes))


def _namespace(edits: tuple[Edit, ...]) -> str:
    return f"vitkern_emulated_{_digest(edits)}" if edits else "vitkern_emulated"


def _digest(edits: tuple[Edit, ...]) -> str:
    return hashlib.sha256(repr(edits).encode()).hexdigest()[:12]
