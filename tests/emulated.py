"""The CUDA kernels on the CPU: builds csrc/cuda over tests/cpp/emulator and puts it where the CUDA ops are looked for.

`edits` replace text in a copy of the sources: that is how the tests plant faults.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import native
import torch

from vitkern import backends
from vitkern.ops import _cuda

CUDA = native.ROOT / "csrc" / "cuda"
SOURCES = (
    "window_attention.cu",
    "window_attention_bwd.cu",
    "window_attention_reduce.cu",
    "window_attention_op.cpp",
    "bipartite_match.cu",
    "merge_plan.cu",
    "merge_tokens.cu",
    "tokens_op.cpp",
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


def build(edits: tuple[Edit, ...] = (), sanitize: bool = False) -> Path:
    namespace = _namespace(edits)
    flags = (*FLAGS, "-O1", *(native.SANITIZERS if sanitize else ()))
    torch_folder = Path(torch.__file__).parent
    stable = ("-isystem", str(torch_folder / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000")
    changed = plant(edits)
    units = [native.Unit(native.ROOT / "tests/cpp/emulator_module.cpp", (*flags, *native.pybind_flags()))]
    for source in SOURCES:
        path = changed.get(source, CUDA / source)
        own = ("-x", "c++") if source.endswith(".cu") else (*stable, f"-DVITKERN_LIBRARY={namespace}")
        units.append(native.Unit(path, (*flags, "-I", str(CUDA), *own)))
    link = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", *(native.SANITIZERS if sanitize else ()))
    return native.build(namespace + ("_sanitized" if sanitize else ""), units, link)


def plant(edits: tuple[Edit, ...]) -> dict[str, Path]:
    """Writes a copy of csrc/cuda with the edits; returns the sources that differ by them."""
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
    header = any(Path(edit.file).suffix in (".h", ".cuh") for edit in edits)
    return {source: folder / source for source in SOURCES if header or any(edit.file == source for edit in edits)}


def _namespace(edits: tuple[Edit, ...]) -> str:
    return f"vitkern_emulated_{_digest(edits)}" if edits else "vitkern_emulated"


def _digest(edits: tuple[Edit, ...]) -> str:
    return hashlib.sha256(repr(edits).encode()).hexdigest()[:12]
