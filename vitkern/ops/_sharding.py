"""The sharding rules of every op for DTensor, made from its layout. Importing this imports torch.distributed.tensor.

For each axis of the mesh a call may be cut along the batch, the heads, and windows along an axis of the map that does not shift,
between windows; or every process does the whole. The one that moves the fewest bytes is taken. What lacks the axis is replicated,
and its gradient is a part of the sum. DTensor's own strategies know neither results that are None nor what a shard counts from.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from vitkern.ops._layouts import LAYOUTS, Layout
from vitkern.ops._op import Op, PlainOp, registered

SUM = "+"


def split(text: str) -> list[str]:
    """The axes of a layout: letters, and groups in brackets."""
    axes, rest = [], text
    while rest:
        end = rest.index(")") + 1 if rest[0] == "(" else 1
        axes.append(rest[:end].strip("()"))
        rest = rest[end:]
    return axes


def axes_of(text: str, rank: int) -> list[str]:
    """The axes of the layout of this rank; those of `*` are numbered."""
    for one in text.lstrip(SUM).split("|"):
        axes = split(one)
        if "*" in axes:
            at = axes.index("*")
            axes[at : at + 1] = [f"*{i}" for i in range(rank - len(axes) + 1)]
        if len(axes) == rank:
            return axes
    raise ValueError(f"no layout in {text!r} has {rank} axes")


class Call:
    """The tensors of one call and which of their axes an axis of the mesh may cut."""

    def __init__(
        self, layout: Layout, shapes: list[Any], texts: list[str], options: dict[str, Any], lead: int = 0
    ) -> None:
        self.layout, self.shapes, self.options = layout, shapes, options
        self.axes = [
            None if shape is None or text == "seed" else axes_of(text, len(shape))
            for text, shape in zip(texts, shapes, strict=True)
        ]
        self.lengths: dict[str, int] = {name: math.prod(options[of]) for name, of in layout.products.items()}
        named = [
            p for axes, shape in zip(self.axes, shapes, strict=True) if axes for p in zip(axes, shape, strict=True)
        ]
        for name, n in named:
            if len(name) == 1 and name != ".":
                self.lengths[name] = max(n, self.lengths.get(name, 0))
        for name, n in named:
            if len(name) > 1 and name[1] in layout.products:
                self.lengths[name[0]] = max(n // max(self.lengths[name[1]], 1), self.lengths.get(name[0], 0))
        first = zip(self.axes[lead] or (), shapes[lead] or (), strict=True)
        self.lengths |= {name: n for name, n in first if name.startswith("*")}

    def cut(self, i: int, kind: str) -> int | None:
        """The axis along which tensor i is cut, None where it has none or broadcasts."""
        return self.place(self.axes[i], self.shapes[i], kind)

    def place(self, axes: list[str] | None, shape: Any, kind: str) -> int | None:
        for a, name in enumerate(axes or ()):
            if name == kind or (kind == "h" and name == "k"):
                return a if shape is None or shape[a] == self.lengths[name] > 1 else None
            if len(name) > 1 and name[0] == kind and (shape is None or self._whole(name, shape[a])):
                return a
        return None

    def _whole(self, name: str, n: int) -> bool:
        """Whether an axis of this length is the group, and does not broadcast."""
        if name.endswith("*"):
            return n > 0 and n % self.lengths[name[0]] == 0
        return n == math.prod(self.lengths[each] for each in name)

    def allowed(self, kind: str, shards: int) -> bool:
        """Whether the call is the same in so many shards of this kind."""
        if kind.startswith("*"):
            return self._cut_between_windows(int(kind[1:]), shards)
        n = self.lengths.get(kind, 1)
        named = {name for axes in self.axes for name in axes or () if name[0] == kind and len(name) > 1}
        groups = self.lengths.get("k", n) if kind == "h" else n
        uneven = bool(n % shards)
        if n < shards or (uneven and (named or groups != n or (kind == "h" and -(-n // shards) * (shards - 1) >= n))):
            return False
        if kind == "b":
            return True
        if groups not in (1, n) and groups % shards:
            return False
        return all(self.options[name] not in values for name, values in self.layout.whole.items())

    def _cut_between_windows(self, axis: int, shards: int) -> bool:
        length, window, shift = self.lengths[f"*{axis}"], self.options["window"][axis], self.options["shift"][axis]
        return shift == 0 and length % (window * shards) == 0


class Rule:
    """How the calls of one overload with tensors of these shapes and options may be cut."""

    def __init__(self, op: Op | PlainOp, backward: bool, shapes: list[Any], options: dict[str, Any]) -> None:
        layout = LAYOUTS[op.name]
        self.op, self.backward, self.options = op, backward, options
        self.results, inputs = layout.outputs.split(), layout.inputs.split()
        self.texts = [*self.results, *self.results[1:], *inputs] if backward else inputs
        self.lead = len(self.texts) - len(inputs)
        self.call = Call(layout, shapes, self.texts, options, self.lead)
        given = [text for text, shape in zip(op.tensors, shapes[self.lead :], strict=True) if shape is not None]
        self.seed = next((i for i, text in enumerate(self.texts) if text == "seed" and shapes[i] is not None), None)
        self.kinds = ["b"]
        if not any(text.split()[-1] in layout.mixing for text in given):
            self.kinds.append("h")
        if layout.windows and self.seed is None:
            self.kinds += [name for name in self.call.axes[self.lead] or () if name.startswith("*")]

    def inputs(self, kind: str | None) -> list[Placement]:
        """Where the tensors of the call lie in shards of a kind."""
        cuts = [None if kind is None else self.call.cut(i, kind) for i in range(len(self.texts))]
        return [Replicate() if at is None else Shard(at) for at in cuts]

    def ignored(self, i: int) -> bool:
        """Whether tensor i is a saved sum, which no backward reads."""
        return len(self.results) <= i < self.lead and self.texts[i].startswith(SUM)

    def outputs(self, kind: str | None, made: list[Any]) -> list[Placement] | None:
        """Where the results lie; None where one of them lacks the axis, and is neither a gradient nor a sum."""
        found: list[Placement] = []
        if self.backward and kind is not None:
            for i, text in enumerate(self.results):
                if self.call.shapes[i] is not None and self.call.cut(i, kind) is None and not text.startswith(SUM):
                    return None
        for n, t in enumerate(made):
            if kind is None or t is None:
                found.append(Replicate())
                continue
            if self.backward:
                at = self.call.cut(self.lead + self.op.differentiable[n], kind)  # type: ignore[union-attr]
            else:
                at = self.call.place(axes_of(self.results[n], t.dim()), t.shape, kind)
                if at is None and not self.results[n].startswith(SUM):
                    return None
            found.append(Partial() if at is None else Shard(at))
        return found

    def choices(self, sizes: Sequence[int], made: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
        """Placements of the tensors and of the results, a tuple of an entry for each axis of a mesh of these sizes."""
        for kinds in itertools.product((None, *self.kinds), repeat=len(sizes)):
            shards = {
                kind: math.prod(n for n, k in zip(sizes, kinds, strict=True) if k == kind)
                for kind in {k for k in kinds if k is not None}
            }
            if all(self.call.allowed(kind, n) for kind, n in shards.items()):
                results = [self.outputs(kind, made) for kind in kinds]
                if None not in results:
                    yield list(zip(*map(self.inputs, kinds), strict=True)), list(zip(*results, strict=True))  # type: ignore[arg-type]

    def made(self, metas: list[Any]) -> list[Any]:
        """The results as tensors without values."""
        args = [*metas, *self.options.values()]
        found = self.op._fake_backward(*args) if self.backward else self.op.fake(*args)  # type: ignore[union-attr]
        return [found] if found is None or isinstance(found, Tensor) else list(found)


def like_without_values(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def moved(t: DTensor, wanted: Sequence[Placement]) -> int:
    """Bytes that a tensor's new placement sends, as far as a choice needs to know."""
    cost = 0
    for now, then in zip(t.placements, wanted, strict=True):
        if now != then and not now.is_replicate():
            cost += t.numel() * t.element_size() * (2 if now.is_partial() and then.is_replicate() else 1)
    return cost


def own_part(n: int, axis: int, mesh: Any, placements: Sequence[Placement]) -> tuple[int, int]:
    """Where this process's part of an axis of length n begins, and its length."""
    first = 0
    for i, p in enumerate(placements):
        if p.is_shard(axis):
            chunk = -(-n // mesh.size(i))
            begin = min(n, chunk * mesh.get_local_rank(i))
            first, n = first + begin, min(chunk, n - begin)
    return first, n


def own_stream(stream: Tensor, q: DTensor, placements: Sequence[Placement]) -> Tensor:
    """What dropout counts in this process's part of q [B, *, H, D], out of the stream of the whole."""
    image, images = own_part(q.shape[0], 0, q.device_mesh, placements)
    head, _ = own_part(q.shape[-2], q.dim() - 2, q.device_mesh, placements)
    if len(stream) == 1:
        stream = torch.cat((stream, stream.new_zeros(1)))
    places = stream[2:].view(q.shape[0], -1)[image : image + images] if len(stream) > 2 else stream[2:]
    first = stream[1:2] + head if len(stream) > 2 else stream[1:2] + head + (image << 32)
    return torch.cat((stream[:1], first, places.flatten()))


_chosen: dict[Any, Any] = {}  # placements by all that they depend on


def handle(op: Op | PlainOp, backward: bool, overload: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """A call on DTensors: on the local tensors, moved to where the cheapest rule wants them."""
    count = len(op.tensors) + (op.lead if backward else 0)  # type: ignore[union-attr]
    tensors = args[:count]
    mesh = next(t for t in tensors if isinstance(t, DTensor)).device_mesh
    if any(isinstance(t, Tensor) and (not isinstance(t, DTensor) or t.device_mesh != mesh) for t in tensors):
        raise RuntimeError(f"{overload}: all tensors must be DTensors on one mesh beside a DTensor")
    sources, results, made, lead, seed = _placements(op, backward, overload, tensors, args[count:], mesh)
    with torch.no_grad():
        local = [
            None if t is None else (t if t.placements == to else t.redistribute(mesh, to)).to_local()
            for t, to in zip(tensors, sources, strict=True)
        ]
        if seed is not None:
            local[seed] = own_stream(local[seed], tensors[lead], sources[lead])
        found = overload(*local, *args[count:])
        several = not (found is None or isinstance(found, Tensor))
        wrapped = [
            None
            if t is None
            else DTensor.from_local(t, mesh, to, run_check=False, shape=like.shape, stride=like.stride())
            for t, to, like in zip(found if several else [found], results, made, strict=True)
        ]
    return tuple(wrapped) if several else wrapped[0]


def _placements(op: Op | PlainOp, backward: bool, overload: Any, tensors: Any, options: Any, mesh: Any) -> Any:
    """Those of the tensors and of the results, the results without values, and the positions of the first tensor and the seed."""
    key: Any = (overload, mesh, *(None if t is None else (t.shape, t.stride(), t.dtype, t.placements) for t in tensors))
    key += tuple(tuple(o) if isinstance(o, (list, tuple)) else o for o in options)
    symbolic = torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None
    if not symbolic and key in _chosen:
        return _chosen[key]
    names = [a.name for a in overload._schema.arguments][len(tensors) :]
    rule = Rule(op, backward, [None if t is None else t.shape for t in tensors], dict(zip(names, options, strict=True)))
    made = rule.made([None if t is None else like_without_values(t) for t in tensors])
    sizes = [mesh.size(i) for i in range(mesh.ndim)]

    def stays(choice: Any) -> Any:
        return [
            t.placements if t is not None and rule.ignored(i) else choice[0][i] for i, t in enumerate(tensors)
        ], choice[1]

    def cost(choice: Any) -> tuple[int, int]:
        pairs = [(t, to) for t, to in zip(tensors, choice[0], strict=True) if t is not None]
        return sum(moved(t, to) for t, to in pairs), sum(t.placements != to for t, to in pairs)

    sources, results = min(map(stays, rule.choices(sizes, made)), key=cost)
    found = sources, results, made, rule.lead, rule.seed
    if not symbolic:
        if len(_chosen) >= 4096:
            _chosen.clear()
        _chosen[key] = found
    return found


@functools.cache
def register() -> None:
    """Gives DTensor the rules of every op, once."""
    handlers = DTensor._op_dispatcher._custom_op_handlers
    for op in registered:
        for suffix in ("",) if isinstance(op, PlainOp) else ("", "_fwd", "_bwd"):
            overload = op.overload(suffix) if isinstance(op, Op) else op.overload()
            handlers[overload] = functools.partial(handle, op, suffix == "_bwd")
