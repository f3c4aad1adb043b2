"""How an op becomes a torch.library op: schemas, fakes, autograd, double backward, autocast and vmap from one description.

An op `name` has three schemas: `name_fwd` (no gradient), `name` (gradient), `name_bwd`. Its first arguments are tensors.
`name_bwd` takes the gradients of the outputs, all outputs but the first, and the arguments of `name`, then `need`, whose
bit i asks for the gradient of `differentiable[i]`; it returns one Tensor? each.

The autograd kernels rest on private names of torch (`torch._C`), because `register_autograd` costs 1.6 us per argument;
where a name is missing, `register_autograd` is used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitkern.ops._gpu import Gpu

_C = torch._C
library = torch.library.Library("vitkern", "FRAGMENT")
registered: list["Op | PlainOp"] = []  # every op, in the order of its definition
_OWN_KERNEL = all(
    hasattr(_C, name)
    for name in (
        "_AutoDispatchBelowAutograd",
        "_any_requires_grad",
        "_after_autograd_keyset",
        "_ExcludeDispatchKeyGuard",
    )
)


@dataclass(frozen=True)
class Op:
    """One op: `tensors` and `options` are schema text, `definition` the reference on the same arguments."""

    name: str
    tensors: tuple[str, ...]  # schema types and names of the tensor arguments, in order
    options: str  # schema text of the other arguments
    differentiable: tuple[int, ...]  # positions of the arguments that get a gradient
    batched: int  # the first arguments: those with a batch dimension, cast by autocast
    definition: Callable[..., Any]
    fake: Callable[..., Any]
    gpu: Gpu = Gpu()  # what CUDA tensors run
    outputs: tuple[str, ...] = ("out", "lse")
    autocast: bool = True  # whether autocast casts the batched tensors
    gradient_like: Callable[[Tensor], Tensor] = lambda t: t.new_empty(t.shape)  # an empty gradient of an argument
    composed: Callable[..., Any] | None = None  # the backward in terms of the op's own forward, where it is one
    summed: tuple[tuple[int, int], ...] = ()  # arguments whose first axes, so many, may have length 1: position, axes

    def register(self) -> None:
        """Defines the schemas and everything that is not a compiled kernel."""
        registered.append(self)
        arguments = ", ".join((*self.tensors, self.options))
        gradients = ", ".join(["Tensor?"] * len(self.differentiable))
        for name in (self.name, f"{self.name}_fwd"):
            library.define(f"{name}({arguments}) -> ({', '.join(['Tensor'] * len(self.outputs))})")
            library.impl(name, self.definition, "CompositeExplicitAutograd")
            library.impl(name, partial(self.gpu.forward, self), "CUDA")
            torch.library.register_fake(f"vitkern::{name}", self.fake, lib=library)
            torch.library.register_vmap(f"vitkern::{name}", self._vmap_of(name), lib=library)
            if self.autocast:
                self._register_autocast(name)
        saved = [*(f"Tensor? d{name}" for name in self.outputs), *(f"Tensor {name}" for name in self.outputs[1:])]
        library.define(f"{self.name}_bwd({', '.join(saved)}, {arguments}, SymInt need) -> ({gradients})")
        backward = self.composed or self._reference_backward_kernel
        library.impl(f"{self.name}_bwd", backward, "CompositeExplicitAutograd")
        library.impl(f"{self.name}_bwd", self.composed or partial(self.gpu.backward, self), "CUDA")
        torch.library.register_fake(f"vitkern::{self.name}_bwd", self._fake_backward, lib=library)
        _register_autograd(self.name, self._save, self._backward)
        _register_autograd(f"{self.name}_bwd", self._save_all, self._double_backward)

    def overload(self, suffix: str = "") -> Any:
        return getattr(torch.ops.vitkern, self.name + suffix).default

    @property
    def lead(self) -> int:
        """The arguments of the backward before those of the op: gradients, then all outputs but the first."""
        return 2 * len(self.outputs) - 1

    # gradients -------------------------------------------------------------------------------------------------------

    def need(self, wanted: Callable[[int], bool]) -> int:
        """The bit mask of the gradients that `wanted(position of the argument)` asks for."""
        return sum(1 << bit for bit, position in enumerate(self.differentiable) if wanted(position))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = len(self.tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count], *_as_tuple(output)[1:])
        ctx.options = inputs[count:]

    def _backward(self, ctx: Any, *douts: Tensor | None) -> tuple[Any, ...]:
        count = len(self.tensors)
        grads: list[Any] = [None] * (count + len(ctx.options))
        if all(d is None for d in douts):
            return tuple(grads)
        need = self.need(lambda i: ctx.needs_input_grad[i])
        everything = ctx.saved_tensors  # read once: a checkpoint recomputes what is read
        tensors, saved = everything[:count], everything[count:]
        found = self.gradients(self.overload("_bwd"), douts, saved, tensors, ctx.options, need)
        for position, grad in zip(self.differentiable, found, strict=True):
            grads[position] = grad
        return tuple(grads)

    def gradients(self, backward: Any, douts: Any, saved: Any, tensors: Any, options: Any, need: int) -> list[Any]:
        """What `backward`, of the schema of the op's, gives. A view that repeats its values (stride 0, of expand) is cut to one
        place for it, and each repetition gets an equal share of that sum, in a view again: the whole never exists."""
        cut = list(tensors)
        for position, axes in self.summed:
            if tensors[position] is not None:
                cut[position] = once_each(tensors[position], axes)
        found = _as_tuple(backward(*douts, *saved, *cut, *options, need))
        return [
            None if grad is None else _shared(grad, tensors[p].shape)
            for p, grad in zip(self.differentiable, found, strict=True)
        ]

    def _fake_backward(self, *args: Any) -> Any:
        inputs, need = args[self.lead : -1], args[-1]
        wanted = [inputs[p] if need >> bit & 1 else None for bit, p in enumerate(self.differentiable)]
        return _one_or_all(None if t is None else self.gradient_like(t) for t in wanted)

    def reference_backward(self, *args: Any) -> Any:
        """The gradients by differentiating the reference."""
        with torch.enable_grad():
            nodes = _own_nodes(list(args[self.lead : -1]))
            grads = self._differentiate(args[: len(self.outputs)], nodes, args[-1], create_graph=False)
        return _one_or_all(None if g is None else g.detach() for g in grads)

    def _reference_backward_kernel(self, *args: Any) -> Any:
        """`reference_backward` below the autograd keys, where torch.autograd.grad needs them back."""
        keys = _C.DispatchKeySet(_C.DispatchKey.AutogradFunctionality)
        for key in (_C.DispatchKey.AutogradCPU, _C.DispatchKey.AutogradCUDA, _C.DispatchKey.ADInplaceOrView):
            keys = keys | _C.DispatchKeySet(key)
        excluded = _C._dispatch_tls_local_exclude_set() - keys
        with _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded):
            return self.reference_backward(*args)

    def _differentiate(self, douts: Any, nodes: list[Any], need: int, create_graph: bool) -> list[Any]:
        outputs = _as_tuple(self.definition(*nodes))
        pairs = [(o, g) for o, g in zip(outputs, douts, strict=True) if g is not None and o.requires_grad]
        wanted = [p for bit, p in enumerate(self.differentiable) if need >> bit & 1 and nodes[p] is not None]
        found: Any = [None] * len(wanted)
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [nodes[p] for p in wanted],
                [g.to(o.dtype) for o, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        by_position = dict(zip(wanted, found, strict=True))
        grads: list[Any] = []
        for bit, p in enumerate(self.differentiable):
            wanted_here = need >> bit & 1 and nodes[p] is not None
            grad = by_position.get(p)
            grads.append(torch.zeros_like(nodes[p]) if wanted_here and grad is None else grad)
        return grads

    def _save_all(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        count = self.lead + len(self.tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def _double_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """Differentiates the reference's gradient; the saved outputs are functions of the inputs and get none."""
        lead, first_saved = self.lead, len(self.outputs)
        count = lead + len(self.tensors)
        result: list[Any] = [None] * (count + len(ctx.options))
        if all(g is None for g in grads):
            return tuple(result)
        everything = ctx.saved_tensors
        douts, tensors = everything[:first_saved], everything[lead:]
        *options, need = ctx.options
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            nodes = _own_nodes([*douts, *tensors], again)
            gouts, inputs = nodes[:first_saved], nodes[first_saved:]
            first = self._differentiate(gouts, [*inputs, *options], need, create_graph=True)
            pairs = [
                (f, g) for f, g in zip(first, grads, strict=True) if f is not None and g is not None and f.requires_grad
            ]
            where = [i for i in (*range(first_saved), *range(lead, count)) if ctx.needs_input_grad[i]]
            sources = [gouts[i] if i < first_saved else inputs[i - lead] for i in where]
            if pairs and sources:
                found = torch.autograd.grad(
                    [f for f, _ in pairs], sources, [g for _, g in pairs], create_graph=again, allow_unused=True
                )
                for i, grad in zip(where, found, strict=True):
                    result[i] = grad
        return tuple(result)

    # autocast and vmap -------------------------------------------------------------------------------------------------

    def cast(self, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
        """The arguments as autocast wants them: q, k, v and their like in its dtype, the others untouched."""
        dtype = torch.get_autocast_dtype(device)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in args[: self.batched]]
        return (*cast, *args[self.batched :])

    def _register_autocast(self, name: str) -> None:
        for device in ("cpu", "cuda"):
            key = f"Autocast{device.upper()}"

            def kernel(*args: Any, device: str = device, key: str = key) -> Any:
                with _C._ExcludeDispatchKeyGuard(_C.DispatchKeySet(getattr(_C.DispatchKey, key))):
                    return getattr(torch.ops.vitkern, name).default(*self.cast(args, device))

            library.impl(name, kernel, key)

    def _vmap_of(self, name: str) -> Callable[..., Any]:
        return _vmap_rule(name, self.tensors, self.batched)


@dataclass(frozen=True)
class PlainOp:
    """One op whose outputs have no gradient: one schema, `outputs` tensors. No dtype is cast by autocast."""

    name: str
    tensors: tuple[str, ...]
    options: str
    outputs: int
    batched: int  # the first arguments: those that every sample has its own of
    definition: Callable[..., Any]
    fake: Callable[..., Any]
    gpu: Gpu = Gpu()

    def register(self) -> None:
        registered.append(self)
        arguments = ", ".join((*self.tensors, self.options))
        library.define(f"{self.name}({arguments}) -> ({', '.join(['Tensor'] * self.outputs)})")
        library.impl(self.name, self.definition, "CompositeExplicitAutograd")
        library.impl(self.name, partial(self.gpu.forward, self), "CUDA")
        torch.library.register_fake(f"vitkern::{self.name}", self.fake, lib=library)
        torch.library.register_vmap(
            f"vitkern::{self.name}", _vmap_rule(self.name, self.tensors, self.batched), lib=library
        )

    def overload(self) -> Any:
        return getattr(torch.ops.vitkern, self.name).default


def _vmap_rule(name: str, tensors: Sequence[str], batched: int) -> Callable[..., Any]:
    """Folds the mapped axis into the batch where exactly the `batched` first tensors are mapped, else loops: a seed draws the
    same for every sample, and would count them as images of one batch, and bounds are of one packed batch."""
    count = len(tensors)
    alone = [i for i, text in enumerate(tensors) if text.endswith(" seed") or " cu_" in text]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        op = getattr(torch.ops.vitkern, name).default
        dims = [in_dims[i] if isinstance(in_dims[i], int) else None for i in range(count)]
        mapped = all(d is not None or args[i] is None for i, d in enumerate(dims[:batched]))
        shared = all(d is None for d in dims[batched:]) and all(args[i] is None for i in alone)
        if mapped and shared and not _of_images(args, dims, batched):
            folded = [
                t if d is None else t.movedim(d, 0).flatten(0, 1) for t, d in zip(args, dims[:batched], strict=False)
            ]
            outputs = _as_tuple(op(*folded, *args[batched:]))
            found = tuple(o.unflatten(0, (info.batch_size, -1)) for o in outputs)
        else:
            each = []
            for i in range(info.batch_size):
                chosen = [t if d is None else t.select(d, i) for t, d in zip(args, dims, strict=False)]
                each.append(_as_tuple(op(*chosen, *args[count:])))
            found = tuple(torch.stack(o) for o in zip(*each, strict=True))
        return (found, (0,) * len(found)) if len(found) > 1 else (found[0], 0)

    return rule


def _of_images(args: tuple[Any, ...], dims: list[int | None], batched: int) -> bool:
    """Whether a tensor that is not mapped may hold something for each image of a batch (a mask or bias of every image), or one
    that is mapped holds one thing for all of them."""
    mapped = {t.movedim(d, 0).shape[1:2] for t, d in zip(args, dims, strict=False) if d is not None}
    return len(mapped) != 1 or any(t is not None and t.shape[:1] in mapped for t in args[batched : len(dims)])


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return (outputs,) if outputs is None or isinstance(outputs, Tensor) else tuple(outputs)


def once_each(t: Tensor, axes: int) -> Tensor:
    """One place of the first `axes` axes along which t repeats itself."""
    for a in range(axes):
        if t.shape[a] > 1 and t.stride(a) == 0:
            t = t.narrow(a, 0, 1)
    return t


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, axes: int) -> Tensor:
        ctx.shape = t.shape
        return once_each(t, axes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return _shared(grad, ctx.shape), None


def once(t: Tensor, axes: int) -> Tensor:
    """`once_each`, whose gradient is one of equal shares too; under transforms it is that of slices, full of zeros."""
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if transformed or forward_ad._current_level >= 0 or not t.requires_grad:
        return once_each(t, axes)
    return _Once.apply(t, axes)


def _shared(grad: Tensor, shape: torch.Size) -> Tensor:
    count = 1
    for n, one in zip(shape, grad.shape, strict=True):
        count *= 1 if n == one else n
    return grad if grad.shape == shape else (grad / count).expand(shape)


def _one_or_all(values: Any) -> Any:
    """What an op with this many results returns: the tuple, or the one value."""
    values = tuple(values)
    return values[0] if len(values) == 1 else values


def _own_nodes(values: list[Any], again: bool = False) -> list[Any]:
    """Each floating-point tensor with a node of its own, so that one that depends on another is not counted twice."""
    nodes = []
    for t in values:
        if isinstance(t, Tensor) and t.is_floating_point():
            nodes.append(t.view_as(t) if again and t.requires_grad else t.detach().requires_grad_())
        else:
            nodes.append(t)
    return nodes


def _register_autograd(name: str, save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]) -> None:
    if not _OWN_KERNEL:
        torch.library.register_autograd(f"vitkern::{name}", backward, setup_context=_keyword_setup(save), lib=library)
        return
    op = getattr(torch.ops.vitkern, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args  # the key set stands last, so that needs_input_grad keeps its positions
        with _C._AutoDispatchBelowAutograd():
            output = op.redispatch(keyset & _C._after_autograd_keyset, *inputs)
        save(ctx, inputs, output)
        return output

    def gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (*backward(ctx, *grads), None)

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    )

    def kernel(keyset: Any, *args: Any) -> Any:
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            return function.apply(*args, keyset)  # type: ignore[attr-defined]
        with _C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _C._after_autograd_keyset, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


def _keyword_setup(save: Callable[..., None]) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, inputs, output)

    return setup
