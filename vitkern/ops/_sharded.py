"""Calls on DTensors: what a public function and the call of an op do for them. Nothing here imports torch.distributed.

Who has a DTensor has imported torch.distributed.tensor, so it is looked up, and the rules are registered at the first such call.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitkern.ops._op import Op, PlainOp

PLAIN = (Tensor, torch.nn.Parameter)  # the types that are known to be no DTensor
mesh: Any = None  # of the DTensors of the public call that runs


def met(t: Any) -> bool:
    """Whether t is the DTensor with which a public call begins."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and mesh is None and isinstance(t, module.DTensor)


def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """The public function again, on its own arguments `given`; a plain tensor among them is the same on every process."""
    global mesh
    from torch.distributed.tensor.experimental import implicit_replication

    from vitkern.ops import _sharding

    _sharding.register()
    args: list[Any] = []
    options: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            options |= given[name]
        elif parameter.kind is parameter.KEYWORD_ONLY:
            options[name] = given[name]
        else:
            args.append(given[name])
    of = _first(args).device_mesh
    mesh = of
    try:
        args, options = _spread(args, of), _spread(options, of)
        with implicit_replication():
            return function(*args, **options)
    finally:
        mesh = None


def _first(args: list[Any]) -> Any:
    for value in args:
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if hasattr(first, "device_mesh"):
            return first
    raise AssertionError("a call on DTensors begins with one")


def _spread(value: Any, of: Any) -> Any:
    """Lists, tuples and dataclasses with their plain tensors replicated over a mesh."""
    if isinstance(value, Tensor):
        return replicated(value, of)
    if isinstance(value, dict):
        return {name: _spread(each, of) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        each = [_spread(v, of) for v in value]
        return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changed = {name: _spread(v, of) for name, v in fields.items()}
        return dataclasses.replace(value, **{n: v for n, v in changed.items() if v is not fields[n]})
    return value


def replicated(t: Tensor, of: Any) -> Any:
    module = sys.modules["torch.distributed.tensor"]
    if isinstance(t, module.DTensor):
        return t
    return module.DTensor.from_local(t, of, [module.Replicate()] * of.ndim, run_check=False)


def agreed(seed: Tensor) -> Tensor:
    """A seed that one process drew, for all of the mesh."""
    if mesh is not None:
        for axis in range(mesh.ndim):
            torch.distributed.broadcast(seed, group=mesh.get_group(axis), group_src=0)
    return seed


def arguments(op: Op | PlainOp, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op with plain tensors beside DTensors replicated."""
    module = sys.modules.get("torch.distributed.tensor")
    first = (
        None if module is None else next((t for t in args[: len(op.tensors)] if isinstance(t, module.DTensor)), None)
    )
    if first is None:
        return args
    return (
        *(replicated(t, first.device_mesh) if isinstance(t, Tensor) else t for t in args[: len(op.tensors)]),
        *args[len(op.tensors) :],
    )
