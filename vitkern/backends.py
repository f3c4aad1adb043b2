"""Which back-end runs a call, and why the others cannot.

The compiled libraries only add implementations to ops whose schemas are defined in Python: a library that is missing or
does not load is a reason in ``explain``, never a failed import.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

NAMES = ("reference", "cpu", "triton", "cuda")
_FOLDER = Path(__file__).parent
_forced: str | None = None
_reasons: dict[str, str] = {}  # library -> why it is not there
_loaded: set[str] = set()
_warned = False


def _check_name(name: str | None, origin: str) -> str | None:
    if name is not None and name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a back-end for every vitkern call inside the block; ``None`` restores the choice by device."""
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = before


def forced(backend: str | None) -> str | None:
    """The back-end that this call was told to use, or None."""
    return _forced if backend is None else _check_name(backend, "backend")


def load(library: str) -> str | None:
    """Loads ``_cpu`` or ``_cuda`` once. Returns the reason why it is not there, or None."""
    if library in _loaded:
        return None
    if library in _reasons:
        return _reasons[library]
    path = _FOLDER / f"{library}.so"
    try:
        if not path.exists():
            raise FileNotFoundError(f"{path.name} was not built")
        if library == "_cuda":
            if torch.version.cuda is None:
                raise RuntimeError("this torch has no CUDA")
            # torch maps libtorch_cuda privately; once more, to make its names visible to our library
            ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error
        _reasons[library] = f"{type(cause).__name__}: {cause}"
        return _reasons[library]
    _loaded.add(library)
    return None


def triton_missing() -> str | None:
    """Why Triton kernels cannot run at all, or None."""
    if "triton" not in _reasons:
        try:
            import triton  # noqa: F401
        except ImportError as error:
            _reasons["triton"] = f"triton cannot be imported: {error}"
        else:
            _reasons["triton"] = ""
    return _reasons["triton"] or None


def reference_only() -> bool:
    """True where only the plain reference is right: forward-mode derivatives and torch.func's grad and jvp."""
    if forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)


def needs_grad(tensors: tuple[Any, ...]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def may_read(t: torch.Tensor) -> bool:
    """Whether a check may look at the values of t: eagerly on the CPU, elsewhere only with VITKERN_CHECK=1."""
    if torch.compiler.is_compiling() or type(t) is not torch.Tensor or torch._C._are_functorch_transforms_active():
        return False
    return t.device.type == "cpu" or os.environ.get("VITKERN_CHECK") == "1"


def warn_without_library() -> None:
    """Says once that the reference runs because the CPU library is not there."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"vitkern runs its plain PyTorch reference on the CPU: {load('_cpu')}", stacklevel=4)


class Refused(ValueError):
    """A back-end was named that cannot run this call."""


def refuse(op: str, wanted: str, reasons: dict[str, list[str]]) -> None:
    """Raises for a named back-end, with the reasons of every back-end that cannot run."""
    lines = [f"{op}: backend={wanted!r} cannot run this call"]
    for name, why in reasons.items():
        lines.append(f"  {name}: {'; '.join(why) if why else 'can run'}")
    raise Refused("\n".join(lines))


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Which back-end ``fn(*args, **kwargs)`` would run, why not the others, and which modifiers become maps of scores, as text. No
    kernel runs."""
    describe = getattr(fn, "explain", None)
    if describe is None:
        raise TypeError(f"explain: fn must be a public vitkern function, got {fn!r}")
    chosen, reasons, *notes = describe(*args, **kwargs)
    lines = [f"{fn.__name__} runs on: {chosen}"]
    for name, why in reasons.items():
        lines.append(f"  {name}: {'; '.join(why) if why else 'can run'}")
    return "\n".join(lines + [f"  {note}" for each in notes for note in each])


_check_name(os.environ.get("VITKERN_BACKEND") or None, "VITKERN_BACKEND")
_forced = os.environ.get("VITKERN_BACKEND") or None
