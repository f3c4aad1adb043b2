"""How a public function reaches a back-end of its op: the choice, a forced one, and why the others cannot."""

from typing import Any

import torch

from vitkern import backends
from vitkern.ops import _checks, _sharded
from vitkern.ops._op import Op, PlainOp

Found = tuple[str, dict[str, list[str]]]


def run(op: Op | PlainOp, args: tuple[Any, ...], backend: str | None) -> Any:
    """The outputs of the op; `args` are its arguments without the last, which names the GPU back-end."""
    wanted = backends.forced(backend)
    if wanted is not None:
        refused = reasons(op, args)
        if refused[wanted]:
            backends.refuse(op.name, wanted, refused)
    return dispatch(op, args, wanted)


def beside(backend: str | None) -> str | None:
    """What runs an op beside the one that `backend` is named for, which alone refuses what it cannot do."""
    return "reference" if backends.forced(backend) == "reference" else None


def dispatch(op: Op | PlainOp, args: tuple[Any, ...], wanted: str | None) -> Any:
    """As `run`, with a back-end that is known to be able to."""
    if type(args[0]) not in _sharded.PLAIN:
        args = _sharded.arguments(op, args)
    device, gpu = args[0].device.type, ""
    if device == "cuda":
        gpu = wanted = wanted or op.gpu.choose(args)
    elif wanted is None and backends.load("_cpu"):
        backends.warn_without_library()
        wanted = "reference"
    if wanted == "reference" or backends.reference_only():
        return _reference(op, args, device)
    if isinstance(op, PlainOp):
        return op.overload()(*args, gpu)
    return op.overload("" if backends.needs_grad(args[: len(op.tensors)]) else "_fwd")(*args, gpu)


def _reference(op: Op | PlainOp, args: tuple[Any, ...], device: str) -> Any:
    if not _checks.autocast(device):
        return op.definition(*args)
    with torch.autocast(device, enabled=False):
        return op.definition(*(op.cast(args, device) if isinstance(op, Op) and op.autocast else args))


def reasons(op: Op | PlainOp, args: tuple[Any, ...]) -> dict[str, list[str]]:
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
        "triton": gpu or op.gpu.triton_refusals(args),
        "cuda": gpu or op.gpu.cuda_refusals(args),
    }


def explanation(name: str, op: Op | PlainOp, args: tuple[Any, ...], backend: str | None) -> Found:
    """The back-end that would run, for the function `name`, and every back-end's reasons against."""
    wanted, refused = backends.forced(backend), reasons(op, args)
    if wanted is None:
        wanted = next((n for n in ("cpu", "cuda", "triton") if not refused[n]), "reference")
    elif refused[wanted]:
        backends.refuse(name, wanted, refused)
    return wanted, refused


def torch_only(name: str, why: str, backend: str | None) -> Found:
    """`explanation` of a call that is PyTorch's own work on every device; raises where another back-end is named."""
    refused: dict[str, list[str]] = {"reference": []} | {other: [why] for other in ("cpu", "triton", "cuda")}
    wanted = backends.forced(backend) or "reference"
    if refused[wanted]:
        backends.refuse(name, wanted, refused)
    return wanted, refused
