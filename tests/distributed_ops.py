"""Several processes: what checks share, and every op of torch.ops.vitkern in shards against one process."""

import contextlib
import functools

import libraries  # noqa: F401
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from vitkern.ops import _call, _sharding
from vitkern.ops._layouts import LAYOUTS
from vitkern.ops._op import Op, registered
from vitkern.testing.oracle import assert_close_to_oracle
from vitkern.testing.registry import entries

OPS = {op.name: op for op in registered}
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@contextlib.contextmanager
def recorded():
    """The ops that public functions call inside the block, with their arguments; none sends anything."""
    found, own = [], _call.dispatch

    def dispatch(op, args, wanted):
        with CommDebugMode() as comm:
            result = own(op, args, wanted)
        assert not comm.get_total_counts()
        found.append((op, args))
        return result

    _call.dispatch = dispatch
    try:
        yield found
    finally:
        _call.dispatch = own


def small_calls():
    """Op -> the arguments of its hand-picked calls."""
    found = {}
    with recorded() as calls, torch.no_grad():
        for entry in entries().values():
            for call in entry.small():
                with contextlib.suppress(NotImplementedError):
                    call.run(call.leaves(torch.float64))
    for op, args in calls:
        found.setdefault(op.name, []).append(args)
    for decayed in found["chain_sum"]:
        a, b, c, log_decay, state, order, bounds, columns, reverse, strict, block = decayed
        if log_decay is not None and not strict:
            args = (c, a, b, c, log_decay, state, None, order, bounds, columns, reverse, block)
            found.setdefault("chain_links", []).append(args)
    found["grid_links"] = [(args[2], *args) for args in found["grid_sum"]]
    return found


def cast(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def texts_of(op, suffix):
    layout = LAYOUTS[op.name]
    outputs, inputs = layout.outputs.split(), layout.inputs.split()
    return [*outputs, *outputs[1:], *inputs] if suffix == "_bwd" else inputs


def as_tuple(found):
    return (found,) if found is None or isinstance(found, Tensor) else tuple(found)


def placed(call, texts, args, kinds, mesh):
    """The tensors of a call as DTensors that are cut along an axis of each kind."""
    found = list(args)
    for i in range(len(texts)):
        if isinstance(args[i], Tensor):
            cuts = [None if kind is None else call.cut(i, kind) for kind in kinds]
            found[i] = scattered(args[i], mesh, [Replicate() if c is None else Shard(c) for c in cuts])
    return found


def scattered(t, mesh, placements):
    """The part of a tensor that every process has, as a DTensor; nothing is sent."""
    part = t
    for axis, p in enumerate(placements):
        if p.is_shard():
            first, n = _sharding.own_part(
                part.shape[p.dim], p.dim, mesh, [p if i == axis else Replicate() for i in range(mesh.ndim)]
            )
            part = part.narrow(p.dim, first, n)
    whole = t.contiguous()
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def compare(title, got, want, eager, gradient):
    for n, (g, w, e) in enumerate(zip(as_tuple(got), as_tuple(want), as_tuple(eager), strict=True)):
        assert (g is None) == (w is None), f"{title} result {n}"
        if g is not None:
            assert isinstance(g, DTensor), f"{title} result {n}: {type(g)}"
            assert_close_to_oracle(f"{title} result {n}", g.full_tensor(), w, e, gradient)


def shard_op(op, args, kinds, mesh):
    """Forward and backward of one op in shards against one process. False where the rule does not offer such shards."""
    shapes = [a.shape if isinstance(a, Tensor) else None for a in args[: len(op.tensors)]]
    names = [a.name for a in op.overload()._schema.arguments]
    options = dict(zip(names[len(op.tensors) :], [*args[len(op.tensors) :], ""], strict=True))
    rule = _sharding.Rule(op, False, shapes, options)
    made = rule.made(
        [
            None if s is None else torch.empty(s, dtype=t.dtype, device="meta")
            for s, t in zip(shapes, args, strict=False)
        ]
    )
    sizes = [mesh.size(i) for i in range(mesh.ndim)]
    want = list(zip(*(rule.inputs(kind) for kind in kinds), strict=True))
    if not {*kinds} <= {None, *rule.kinds} or want not in [choice[0] for choice in rule.choices(sizes, made)]:
        return False
    if not all(any(each[axis].is_shard() for each in want) for axis in range(mesh.ndim)):
        return False
    call = rule.call
    narrow = [cast(a, torch.float32) for a in args]
    want, eager = op.overload()(*args, ""), op.overload()(*narrow, "")
    title = f"{op.name} {kinds}"
    with CommDebugMode() as comm:
        got = op.overload()(*placed(call, texts_of(op, ""), narrow, kinds, mesh), "")
    scattered = {k: v for k, v in comm.get_comm_counts().items() if v}
    assert not any("gather" in str(k) or "reduce" in str(k) for k in scattered), f"{title}: {scattered}"
    compare(title, got, want, eager, False)
    if not isinstance(op, Op):
        return True
    generator = torch.Generator().manual_seed(5)
    outs = as_tuple(want)
    douts = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64) if o.is_floating_point() else None for o in outs
    ]
    douts = [None if d is None else torch.where(o.isfinite(), d, 0.0) for o, d in zip(outs, douts, strict=True)]
    if op.name in ("linear_attention", "channel_attention", "cluster_kmeans"):
        douts[1:] = [None] * (len(douts) - 1)
    need = op.need(lambda i: args[i] is not None and args[i].is_floating_point())
    whole = [*douts, *outs[1:], *args, "", need]
    thin = [
        *[cast(d, e.dtype) if d is not None else None for d, e in zip(douts, as_tuple(eager), strict=True)],
        *as_tuple(eager)[1:],
        *narrow,
        "",
        need,
    ]
    texts = texts_of(op, "_bwd")
    behind = _sharding.Rule(
        op, True, [a.shape if isinstance(a, Tensor) else None for a in whole[: len(texts)]], options
    ).call
    want, eager = op.overload("_bwd")(*whole), op.overload("_bwd")(*thin)
    with CommDebugMode() as comm:
        got = op.overload("_bwd")(*placed(behind, texts, thin, kinds, mesh))
    scattered = {k: v for k, v in comm.get_comm_counts().items() if v}
    assert not any("gather" in str(k) or "reduce" in str(k) for k in scattered), f"{title} backward: {scattered}"
    compare(f"{title} backward", got, want, eager, True)
    return True


def kinds_of(op):
    layout = LAYOUTS[op.name]
    return ["b"] + (["h"] if "h" in layout.inputs else []) + (["*0", "*1"] if layout.windows else [])


def some(calls, count):
    """So many of the calls of one op, spread over all."""
    return calls[:: max(1, -(-len(calls) // count))]


@functools.cache
def calls_of_ops():
    return small_calls()


def in_shards(names, mesh, kinds, count):
    """The calls of some ops in shards of these kinds; an op that no call of it cuts is wrong too."""
    for name in names:
        cut = [shard_op(OPS[name], args, kinds, mesh) for args in some(calls_of_ops()[name], count)]
        assert any(cut), f"{name} was never cut along {kinds}"


@check
def every_op_over_the_batch(mesh):
    in_shards(OPS, mesh, ("b",), 30)


@check
def every_op_over_its_heads(mesh):
    names = [name for name, op in OPS.items() if "h" in kinds_of(op)]
    in_shards(names, mesh, ("h",), 30)


@check
def every_op_over_batch_and_heads(mesh):
    names = [name for name, op in OPS.items() if "h" in kinds_of(op)]
    in_shards(names, mesh, ("b", "h"), 6)


@check
def windows_over_an_axis_of_the_map(mesh):
    names = ("window_attention", "window_attention_qkvpacked")
    for kind in ("*0", "*1"):
        in_shards(names, mesh, (kind,), 60)
