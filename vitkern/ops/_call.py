"""How a token op's public function reaches a back-end: the choice, a forced one, and why the others cannot."""

from collections.abc import Callable
from typing import Any

from vitkern import backends
from vitkern.ops._op import Op, PlainOp

Refusals = Callable[[tuple[Any, ...]], list[str]]


def no_triton(args: tuple[Any, ...]) -> list[str]:
    return ["no Triton kernel is written for this op"]


def no_cuda(args: tuple[Any, ...]) -> list[str]:
    return ["no CUDA C++ kernel is written for this op"]


def run(
    op: Op | PlainOp, args: tuple[Any, ...], backend: str | None, triton: Refusals, cuda: Refusals = no_cuda
) -> Any:
    """The outputs of the op; `args` are its arguments without the last, which names the GPU back-end."""
    wanted = backends.forced(backend)
    device = args[0].device.type
    if wanted is not None:
        refused = reasons(args, triton, cuda)
        if refused[wanted]:
            backends.refuse(op.name, wanted, refused)
    elif device == "cpu" and backends.load("_cpu"):
        backends.warn_without_library()
        wanted = "reference"
    if wanted == "reference" or backends.reference_only():
        return op.definition(*args)
    gpu = wanted if device == "cuda" and wanted else ""
    if isinstance(op, PlainOp):
        return op.overload()(*args, gpu)
    return op.overload("" if backends.needs_grad(args[: len(op.tensors)]) else "_fwd")(*args, gpu)


def choose(gpu: str, args: tuple[Any, ...], triton: Refusals, cuda: Refusals = no_cuda) -> str:
    """The back-end for CUDA tensors: the one that is named, else the first that can run."""
    return gpu or next((n for n, refusals in (("cuda", cuda), ("triton", triton)) if not refusals(args)), "reference")


def reasons(args: tuple[Any, ...], triton: Refusals, cuda: Refusals = no_cuda) -> dict[str, list[str]]:
    """Back-end -> sentences why it cannot run these arguments."""
    device = args[0].device.type
    cpu = [] if device == "cpu" else [f"the tensors are on {device}"]
    missing = backends.load("_cpu")
    if missing:
        cpu.append(missing)
    gpu = [] if device == "cuda" else [f"the tensors are on {device}"]
    return {
        "reference": [],
        "cpu": cpu,
        "triton": gpu or triton(args),
        "cuda": gpu or cuda(args),
    }


def explanation(
    name: str, args: tuple[Any, ...], backend: str | None, triton: Refusals, cuda: Refusals = no_cuda
) -> tuple[str, dict[str, list[str]]]:
    """The back-end that would run and every back-end's reasons against."""
    wanted, refused = backends.forced(backend), reasons(args, triton, cuda)
    if wanted is None:
        wanted = next((n for n in ("cpu", "cuda", "triton") if not refused[n]), "reference")
    elif refused[wanted]:
        backends.refuse(name, wanted, refused)
    return wanted, refused
