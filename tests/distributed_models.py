"""Several processes: maps in stripes, and models that are sharded or cut, against one process."""

import libraries  # noqa: F401
import torch
import torch.distributed as dist
from distributed_ops import check, recorded
from distributed_public import normal, whole
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import vitkern
import vitkern.distributed
from vitkern.testing.oracle import assert_close_to_oracle


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
def a_group_of_one_has_the_whole_map(mesh):
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    q = normal(1, 10, 10, 2, 8)
    found = vitkern.distributed.window_attention(q, q, q, 5, 2, group=groups[dist.get_rank()])
    assert torch.equal(found, vitkern.window_attention(q, q, q, 5, 2))


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
