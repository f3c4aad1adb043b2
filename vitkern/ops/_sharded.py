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

PLAIN = (Tensor, torch.nn.Parameter)  # the types that are known to be no DTensor
MEETING = ("Rope", "ContextualPosition")  # modifiers whose tensors are multiplied with q in front of the op
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
    of = args[0].device_mesh
    mesh = of
    try:
        args = [replicated(t, of) if isinstance(t, Tensor) else _prepared(t, of) for t in args]
        options = {n: _prepared(value, of, n == "extra_kv") for n, value in options.items()}
        with implicit_replication():
            return function(*args, **options)
    finally:
        mesh = None


def _prepared(value: Any, of: Any, meets: bool = False) -> Any:
    """Options whose tensors meet q are spread over the mesh; the others, which meet constants of the lowering, become plain where
    every process has the whole. What goes into an op is spread in front of it."""
    if isinstance(value, Tensor):
        return replicated(value, of) if meets else value
    if isinstance(value, list):
        return [_prepared(v, of, meets) for v in value]
    if type(value) is tuple:
        return tuple(_prepared(v, of, meets) for v in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    meets = type(value).__name__ in MEETING or type(value).__module__ == "vitkern.feature_map"
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    changed = {n: replicated(t, of) if meets else _plain(t) for n, t in fields.items() if isinstance(t, Tensor)}
    changed = {n: t for n, t in changed.items() if t is not fields[n]}
    return dataclasses.replace(value, **changed) if changed else value


def _plain(t: Any) -> Any:
    """The local tensor of one that is the same on every process."""
    return t.to_local() if hasattr(t, "placements") and all(p.is_replicate() for p in t.placements) else t


def like(t: Tensor, q: Tensor) -> Tensor:
    """t as a DTensor where q is one."""
    return t if type(q) in PLAIN or not hasattr(q, "device_mesh") else replicated(t, q.device_mesh)


def alike(parts: list[Tensor]) -> list[Tensor]:
    """All as DTensors where one is."""
    first = next((t for t in parts if type(t) not in PLAIN), None)
    return parts if first is None else [like(t, first) for t in parts]


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


def arguments(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
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
