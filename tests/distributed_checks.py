"""What the processes of tests/test_distributed.py check. Each check is a function of the mesh's processes; what it raises is the
result of that test."""

import contextlib
import datetime
import functools
import os
import time
import traceback

import libraries  # noqa: F401
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vitkern
import vitkern.distributed
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


# public functions --------------------------------------------------------------------------------------------------------

BATCHED = {"q", "k", "v", "qkv", "x", "value", "u", "a", "attention", "y", "cells", "logits", "metric", "score"}
CANNOT = {  # what DTensor or the test's own arithmetic cannot do
    "channel_attention packed": "the test's view selects with a negative axis, whose backward DTensor gets wrong",
    "bipartite_match": "the call compares with plain tensors",
    "select_tokens threshold": "nonzero has no rule",
    "sampled_window_attention decomposed": "the dense form of the positions mixes with constants in the backward",
}


def can(entry, call):
    names = (entry.name, *(f"{entry.name} {word}" for word in str(call).replace("=", " ").split()))
    return not any(name in CANNOT for name in names) and any(
        name in BATCHED and len(t) == 2 for name, t in call.tensors.items()
    )


def run_public(entry, call, dtype, mesh=None):
    """Results and gradients, with a mesh of tensors whose first axis is cut; every other tensor is plain."""
    leaves = call.leaves(dtype, entry.gradient)
    given = dict(leaves)
    for name in BATCHED & given.keys() if mesh is not None else ():
        if len(given[name]) == 2:
            given[name] = scattered(given[name].detach(), mesh, [Shard(0)]).requires_grad_(leaves[name].requires_grad)
    outs = [whole(o) for o in call.run(given)]
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    if entry.gradient:
        loss = sum((o.double() * w).sum() for o, w in zip(outs, call.weights(tuple(outs)), strict=True))
        names = [name for name, t in given.items() if t.requires_grad]
        grads = torch.autograd.grad(loss, [given[name] for name in names], allow_unused=True)
        for name, g in zip(names, grads, strict=True):
            found[f"grad of {name}"] = torch.zeros_like(leaves[name]) if g is None else whole(g)
    return found


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def public(mesh, names):
    for name in names:
        entry, done = entries()[name], 0
        for call in some([c for c in entry.small() if can(entry, c)], 8):
            call = call.rounded(torch.float32)
            want, eager = (run_public(entry, call, dtype) for dtype in (torch.float64, torch.float32))
            for title, g in run_public(entry, call, torch.float32, mesh).items():
                assert_close_to_oracle(f"{name} {call} {title}", g, want[title], eager[title], "grad" in title)
            done += 1
        assert done, name


@check
def public_functions_of_windows(mesh):
    public(mesh, [n for n in entries() if n.startswith(("window", "neighborhood", "sampled"))])


@check
def public_attention(mesh):
    public(mesh, ["attention", "depthwise_value", "mask_from_logits"])


@check
def public_functions_of_sums(mesh):
    public(mesh, ["linear_attention", "channel_attention", "selective_scan", "deformable_attention"])


@check
def public_functions_of_tokens(mesh):
    names = ("merge_tokens", "unmerge_tokens", "select_tokens", "restore_tokens", "drop_tokens", "soft_merge")
    public(mesh, [*names, "cluster_tokens", "reconstruct_tokens"])


@check
def matches_and_plans(mesh):
    x = torch.randn(4, 17, 8, generator=torch.Generator().manual_seed(0))
    plan = vitkern.merge_plan(vitkern.bipartite_match(x), r=5)
    match = vitkern.bipartite_match(scattered(x, mesh, [Shard(0)]))
    found = vitkern.merge_plan(match, r=5)
    y, size = vitkern.merge_tokens(scattered(x, mesh, [Shard(0)]), found)
    assert y.placements == (Shard(0),) and torch.equal(found.token_map.full_tensor(), plan.token_map)
    want, _ = vitkern.merge_tokens(x, plan)
    assert torch.equal(y.full_tensor(), want)


# dropout, batches, sequences ------------------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(function, q, k, v, mesh=None, placements=None, **options):
    """The output and the gradients of q, k and v."""
    given = [t.clone() if mesh is None else scattered(t, mesh, placements) for t in (q, k, v)]
    given = [t.requires_grad_() for t in given]
    out = function(*given, **options)
    return [whole(out), *(whole(g) for g in torch.autograd.grad(out.square().sum(), given))], out


def ways(mesh):
    """Placements over batch and heads, q of four axes."""
    if mesh.ndim == 2:
        return [[Shard(0), Shard(-2)], [Shard(-2), Shard(0)], [Shard(0), Shard(0)], [Replicate(), Shard(-2)]]
    return [[Shard(0)], [Shard(-2)]]


@check
def dropout_draws_the_same(mesh):
    n = 4
    calls = [
        (vitkern.attention, (n, 9, n, 8), {}),
        (vitkern.window_attention, (n, 6, 6, n, 8), {"window_size": 3, "shift_size": 1}),
        (vitkern.window_attention, (n, 6, 5, n, 8), {"window_size": 3, "shift_size": 1, "partition": "block", "order": None,
                                                     "key_mask": torch.ones(n, 6, 5, dtype=torch.bool)}),
    ]  # fmt: skip
    for function, shape, options in calls:
        q, k, v = (normal(*shape, seed=i) for i in range(3))
        options = options | {"dropout_p": 0.5, "dropout_seed": 1234567890123}
        want, _ = trained(function, q, k, v, **options)
        for way in ways(mesh):
            placements = [Shard(p.dim % len(shape)) if p.is_shard() else p for p in way]
            if "key_mask" in options and any(p == Shard(len(shape) - 2) for p in placements) and Shard(0) in placements:
                continue
            found, out = trained(function, q, k, v, mesh, placements, **options)
            assert out.placements == tuple(placements), (function.__name__, way, out.placements)
            for f, w in zip(found, want, strict=True):
                assert torch.equal(f, w), (function.__name__, way, (f - w).abs().max())


@check
def a_seed_that_nobody_gave_is_one(mesh):
    torch.manual_seed(dist.get_rank())
    q = DTensor.from_local(normal(2, 9, 2, 8), mesh, [Replicate()] * mesh.ndim)
    out = vitkern.attention(q, q, q, dropout_p=0.5).to_local()
    gathered = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, out)
    assert all(torch.equal(gathered[0], each) for each in gathered)


@check
def an_uneven_batch(mesh):
    q, k, v = (normal(5, 9, 4, 8, seed=i) for i in range(3))
    want, _ = trained(vitkern.attention, q, k, v, dropout_p=0.25, dropout_seed=3)
    found, out = trained(vitkern.attention, q, k, v, mesh, [Shard(0)] * mesh.ndim, dropout_p=0.25, dropout_seed=3)
    assert len(out.to_local()) != 5 and all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@check
def packed_sequences_over_heads(mesh):
    q, k, v = (normal(11, 4, 8, seed=i) for i in range(3))
    cu = torch.tensor([0, 4, 11], dtype=torch.int32)

    def packed(q, k, v):
        return vitkern.attention_varlen(q, k, v, cu, cu, 7, 7)

    want, _ = trained(packed, q, k, v)
    with CommDebugMode() as comm:
        found, out = trained(packed, q, k, v, mesh, [Shard(1)] * mesh.ndim)
    assert (
        out.placements == (Shard(1),) * mesh.ndim and comm.get_total_counts() == 4 * mesh.ndim
    )  # those of full_tensor
    assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))
    tokens = trained(packed, q, k, v, mesh, [Shard(0)] * mesh.ndim)[0]
    assert all(torch.equal(f, w) for f, w in zip(tokens, want, strict=True))


@check
def a_shifted_axis_is_gathered(mesh):
    q, k, v = (normal(2, 24, 6, 2, 8, seed=i) for i in range(3))

    def shifted(q, k, v, shift):
        return vitkern.window_attention(q, k, v, 3, shift)

    for shift, placement in ((0, Shard(1)), ((0, 1), Shard(1)), (1, None)):
        want, _ = trained(lambda *t, shift=shift: shifted(*t, shift), q, k, v)
        found, out = trained(lambda *t, shift=shift: shifted(*t, shift), q, k, v, mesh, [Shard(1)] * mesh.ndim)
        assert placement is None or out.placements == (placement,) * mesh.ndim, (shift, out.placements)
        assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True))


@check
def few_key_heads_stay_whole(mesh):
    q, k, v = normal(2, 9, 4, 8), normal(2, 9, 1, 8, seed=1), normal(2, 9, 1, 8, seed=2)
    want, _ = trained(vitkern.attention, q, k, v)
    given = [scattered(t, mesh, [Shard(2) if t is q else Replicate()] * mesh.ndim).requires_grad_() for t in (q, k, v)]
    with CommDebugMode() as comm:
        out = vitkern.attention(*given)
        grads = torch.autograd.grad(out.square().sum(), given)
    assert not comm.get_total_counts() and all(p.is_partial() for p in grads[1].placements)
    found = [out.full_tensor(), *(g.full_tensor() for g in grads)]
    for f, w in zip(found, want, strict=True):
        assert_close_to_oracle("one key head", f, w.double(), w, True)


@check
def cuts_that_would_be_wrong_are_not_made(mesh):
    focused = vitkern.feature_map.Focused(torch.ones(4, 8), norm="width")
    for function, heads, batch, cut, options in (
        (vitkern.attention, (6, 3), 2, 2, {}),
        (vitkern.linear_attention, (4, 4), 3, 0, {}),
        (vitkern.linear_attention, (4, 4), 2, 2, {"feature_map": focused}),
    ):
        q, k, v = (normal(batch, 9, h, 8, seed=i) for i, h in enumerate((heads[0], *heads[1:] * 2)))
        want, _ = trained(function, q, k, v, **options)
        found, _ = trained(function, q, k, v, mesh, [Shard(cut)] * mesh.ndim, **options)
        assert all(torch.equal(f, w) for f, w in zip(found, want, strict=True)), (function.__name__, cut)


@check
def a_plain_tensor_beside_a_shard_raises(mesh):
    q = scattered(normal(4, 9, 4, 8), mesh, [Shard(0)] * mesh.ndim)
    plain = normal(4, 9, 4, 8)
    try:
        torch.ops.vitkern.depthwise_value_fwd(q, plain[0, 0, 0, :1].view(1, 1, 1, 1), None, [3, 3], "")
    except RuntimeError as error:
        assert "must be DTensors on one mesh" in str(error), error
    else:
        raise AssertionError("no error")


# stripes ---------------------------------------------------------------------------------------------------------------------


@check
def a_map_in_stripes(mesh):
    rank, size = dist.get_rank(), dist.get_world_size()
    table = normal(9 * 9, 4, seed=9)
    for shift, window, width in ((0, 5, 10), (2, 5, 10), ((2, 0), 5, 7), ((4, 3), 5, 12), ((0, 1), 5, 8)):
        for heads, rows in ((2, 5), (4, 10)):
            q, v = (normal(2, rows * size, width, 4, 8, seed=i) for i in range(2))
            k, v = normal(2, rows * size, width, heads, 8, seed=2), v[..., :heads, :]
            results = []
            for dtype, striped in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
                own = slice(rank * rows, (rank + 1) * rows) if striped else slice(None)
                parts = [t[:, own].to(dtype).requires_grad_() for t in (q, k, v)]
                given = table.to(dtype).requires_grad_()
                function = vitkern.distributed.window_attention if striped else vitkern.window_attention
                out = function(*parts, window, shift, bias=vitkern.bias.RelativePosition(given))
                loss = (out * normal(2, rows * size, width, 4, 8, seed=7)[:, own].to(dtype)).sum()
                *grads, of_table = torch.autograd.grad(loss, [*parts, given])
                if striped:
                    dist.all_reduce(of_table)
                results.append([out.detach(), *grads, of_table])
            want, eager, found = results
            for n, (f, w, e) in enumerate(zip(found, want, eager, strict=True)):
                mine = slice(None) if n == 4 else (slice(None), slice(rank * rows, (rank + 1) * rows))
                assert_close_to_oracle(f"stripe {shift} {heads} {n}", f, w[mine], e[mine], n > 0)


@check
def a_stripe_of_half_a_window_raises(mesh):
    x = normal(1, 7, 6, 2, 8)
    for options, words in (({}, "whole windows"), ({"dropout_p": 0.1}, "takes the options")):
        try:
            vitkern.distributed.window_attention(x, x, x, 3, 1, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)


# models ----------------------------------------------------------------------------------------------------------------------


def swin(layers=1):
    import transformers

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        depths=[2] * layers,
        num_heads=[4] * layers,
        embed_dim=16,
        window_size=3,
        image_size=16,
        patch_size=2,
        drop_path_rate=0.0,
    )
    model = transformers.SwinModel(config)
    vitkern.patch(model)
    return model


def gradients(model, images):
    out = model(images).last_hidden_state
    out.square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@check
def fully_sharded_swin(mesh):
    if mesh.ndim > 1:
        return
    size, rank = dist.get_world_size(), dist.get_rank()
    images = torch.rand(2 * size, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    want = gradients(swin(), images)
    model = swin()
    for layer in model.encoder.layers[0].blocks:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = gradients(model, images[2 * rank : 2 * rank + 2])
    assert want.keys() == found.keys()
    for name, g in want.items():
        torch.testing.assert_close(found[name].full_tensor(), g)


@check
def tensor_parallel_swin(mesh):
    if mesh.ndim > 1:
        return
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    want, eager = swin(), swin()
    expected = gradients(want, images)
    whole_out = want(images).last_hidden_state
    plan = {}
    for name, _ in eager.named_modules():  # the names differ between versions
        if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "query", "key", "value"):
            plan[name] = ColwiseParallel(use_local_output=False)
        elif name.endswith(("attention.o_proj", "attention.output.dense")):
            plan[name] = RowwiseParallel()
    assert len(plan) == 8
    model = parallelize_module(eager, mesh, plan)
    own = vitkern.ops.window_attention.PLAIN

    with recorded() as calls:
        out = model(images).last_hidden_state
    windows = [args for op, args in calls if op is own]
    assert len(windows) == 2 and all(args[0].placements == (Shard(args[0].dim() - 2),) for args in windows)
    torch.testing.assert_close(out, whole_out)
    found = gradients(model, images)
    for name, g in expected.items():
        torch.testing.assert_close(whole(found[name]), g)


def run(rank, size, folder):
    """One process: every check on a mesh of one axis, of four processes also on one of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    meshes = [init_device_mesh("cpu", (size,))] if size == 2 else [init_device_mesh("cpu", (2, 2))]
    vitkern.distributed.register_sharding()
    failures = {}
    for mesh in meshes:
        for name, function in CHECKS.items():
            start = time.time()
            try:
                if (name in FLAT and mesh.ndim > 1) or (name in DEEP and mesh.ndim == 1):
                    continue
                function(mesh)
            except Exception:
                failures[name] = traceback.format_exc()
            if rank == 0 and "VITKERN_TIMES" in os.environ:
                print(f"{name} {time.time() - start:.1f}")
    torch.save(failures, f"{folder}/failures{rank}.pt")
    dist.destroy_process_group()


FLAT = {
    name
    for name in CHECKS
    if name.startswith(
        ("cuts", "public", "every_op_over_the", "every_op_over_its", "windows_over", "matches", "tensor", "fully")
    )
}
DEEP = {"every_op_over_batch_and_heads"}
NAMES = {2: sorted(CHECKS.keys() - DEEP), 4: sorted(CHECKS.keys() - FLAT)}
