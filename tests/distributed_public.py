"""Several processes: public functions on DTensors, dropout, batches and sequences against one process."""

import libraries  # noqa: F401
import torch
import torch.distributed as dist
from distributed_ops import (
    check,
    scattered,
    some,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import vitkern
import vitkern.distributed
from vitkern.testing.oracle import assert_close_to_oracle
from vitkern.testing.registry import entries

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
