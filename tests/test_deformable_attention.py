"""deformable_attention: transformers' functions, grid_sample, edges and refusals. What every op must do is in
tests/test_ops.py."""

import libraries  # noqa: F401
import pytest
import torch
from agreement import agree
from memory import grown

import vitkern
from vitkern import testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
COCO = ((25, 34), (13, 17), (7, 9), (4, 5))
F = torch.nn.functional


def inputs(shapes=COCO, points=4, batch=2, queries=11, heads=3, dim=8, seed=0, dtype=torch.float64):
    """value, locations, weights of one number of points per level, leaves."""
    g = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim, generator=g, dtype=dtype)
    where = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=g, dtype=dtype) * 1.3 - 0.15
    weights = torch.randn(batch, queries, heads, len(shapes), points, generator=g, dtype=dtype)
    return [t.requires_grad_() for t in (value, where, weights)]


def sampled(value, shapes, where, weights, mode="bilinear"):
    """The levels by grid_sample, one by one."""
    start, out = 0, 0
    for level, (h, w) in enumerate(shapes):
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).unflatten(-1, (h, w)).flatten(0, 1)
        grid = (2 * where[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        found = F.grid_sample(image, grid, mode=mode, align_corners=False)  # [B H, D, N, P]
        found = found.unflatten(0, value.shape[::2][:2]).permute(0, 3, 1, 4, 2)  # [B, N, H, P, D]
        out = out + (weights[:, :, :, level, :, None] * found).sum(3)
        start += h * w
    return out


@ON
@pytest.mark.parametrize("shapes", [COCO, ((6, 4), (3, 2)), ((1, 1),), ((5, 1), (1, 7))], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_grid_sample(backend, shapes, batch):
    value, where, weights = inputs(shapes, batch=batch)
    got = vitkern.deformable_attention(value, shapes, where, weights, backend=backend)
    agree(got, sampled(value, shapes, where, weights), (value, where, weights))


@ON
def test_transformers_deformable_detr(backend):
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, where, weights = inputs()
    shapes = torch.tensor(COCO)
    want = modeling.MultiScaleDeformableAttention()(value, shapes, list(COCO), None, where, weights, 64)
    got = vitkern.deformable_attention(value, shapes, where, weights, backend=backend)  # sizes as an int64 tensor
    agree(got.flatten(2), want, (value, where, weights))


@ON
@pytest.mark.parametrize("method, named", [("bilinear", "default"), ("nearest", "discrete")])
@pytest.mark.parametrize("points", [(4, 4, 4, 4), (3, 6, 3, 1)], ids=str)
def test_transformers_rt_detr_v2(backend, method, named, points):
    modeling = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    value, where, weights = inputs(points=sum(points), shapes=COCO)
    where, weights = (t[:, :, :, 0].detach().requires_grad_() for t in (where, weights))
    want = modeling.multi_scale_deformable_attention_v2(value, COCO, where, weights, list(points), named)
    got = vitkern.deformable_attention(
        value, COCO, where, weights, method=method, points_per_level=points, backend=backend
    )
    leaves = (value, weights) if method == "nearest" else (value, where, weights)
    agree(got.flatten(2), want, leaves)
    if method == "nearest":
        assert torch.autograd.grad(got.sum(), where)[0].eq(0).all()


@ON
def test_weights_as_logits(backend):
    value, where, weights = inputs()
    got = vitkern.deformable_attention(value, COCO, where, weights, normalize_weights=True, backend=backend)
    soft = weights.flatten(3).softmax(-1).view_as(weights)
    agree(got, sampled(value, COCO, where, soft), (value, where, weights))


@ON
def test_logits_may_be_large(backend):
    value, where, weights = (t.detach() for t in inputs(((6, 4), (3, 2)), dtype=torch.float32))
    given = [(1e3 * weights).to(t) for t in (torch.float64, torch.float32, torch.float32)]
    oracle, eager, got = (
        vitkern.deformable_attention(value.to(a), ((6, 4), (3, 2)), where, a, normalize_weights=True, backend=name)
        for a, name in zip(given, ("reference", "reference", backend), strict=True)
    )
    assert oracle.isfinite().all()
    testing.assert_close_to_oracle("out", got, oracle, eager)


@ON
@pytest.mark.parametrize("normalize", [False, True])
def test_nearest_is_twice_differentiable_in_value_and_weights(backend, normalize):
    value, where, weights = inputs(((3, 2), (2, 2)), 2, 1, 3, 2, 2)

    def run(v, a):
        return vitkern.deformable_attention(
            v, ((3, 2), (2, 2)), where.detach(), a, method="nearest", normalize_weights=normalize, backend=backend
        )

    assert torch.autograd.gradcheck(run, (value, weights))
    assert torch.autograd.gradgradcheck(run, (value, weights))


@ON
@pytest.mark.parametrize("batch, queries", [(1, 7), (5, 7), (65, 3), (154, 2), (4, 300)])
def test_every_image_has_its_own_map(backend, batch, queries):
    value, where, weights = (t.detach() for t in inputs(((6, 4), (3, 2)), 2, batch, queries))
    got = vitkern.deformable_attention(value, ((6, 4), (3, 2)), where, weights, backend=backend)
    one = [
        vitkern.deformable_attention(value[i : i + 1], ((6, 4), (3, 2)), where[i : i + 1], weights[i : i + 1])
        for i in range(batch)
    ]
    torch.testing.assert_close(got, torch.cat(one))


@ON
@pytest.mark.parametrize("method", ["bilinear", "nearest"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 1e20, -1e20], ids=str)
def test_a_place_that_is_nowhere_counts_zero(backend, method, odd):
    """It does so whatever its weight is, and whatever lies at the border; "nearest" holds finite places inside."""
    shapes = ((6, 4), (3, 2))
    value, where, weights = (t.detach() for t in inputs(shapes, 2))
    where[:, ::2, :, :, 0, 0] = odd
    where[:, 1::2, :, :, 1, 1] = odd
    kept, dead = weights.clone(), ~where.isfinite().all(-1)
    if method == "bilinear":
        dead = (where * torch.tensor([w for _, w in shapes])[:, None, None] > 1e3) | ~where.isfinite()
        dead = (dead | (where < -1e3)).any(-1)
    kept[dead] = 0
    still = torch.where(dead[..., None], 0.5, where)
    weights[dead] = float("nan")
    leaves = [t.requires_grad_() for t in (value, where, weights)]
    got = vitkern.deformable_attention(*leaves[:1], shapes, *leaves[1:], method=method, backend=backend)
    want = vitkern.deformable_attention(value, shapes, still, kept, method=method, backend="reference")
    torch.testing.assert_close(got, want)
    for t, dark in zip(torch.autograd.grad(got.sum(), leaves), (None, dead, dead), strict=True):
        assert t.isfinite().all()
        if dark is not None:
            assert t[dark].eq(0).all()


@ON
def test_whole_numbers_take_the_gradient_of_the_right_hand_cell(backend):
    value = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=torch.float64).view(1, 4, 1, 1)
    where = torch.tensor([[0.375, 0.5]], dtype=torch.float64).view(1, 1, 1, 1, 1, 2).requires_grad_()  # x = cell 1
    out = vitkern.deformable_attention(value, ((1, 4),), where, torch.ones_like(where[..., 0]), backend=backend)
    assert out.item() == 10
    assert torch.autograd.grad(out, where)[0].flatten().tolist() == [4 * 90.0, -10.0]  # below the only row is nothing


@ON
@pytest.mark.parametrize("x, column", [(-0.5, None), (-0.125, 0.0), (0.0, 0.5), (1.0, 0.5), (1.125, 0.0), (1.5, None)])
def test_cells_outside_count_zero_at_the_border(backend, x, column):
    """On four cells of ones: half a cell outside counts one half, a whole one nothing, and no NaN comes from the border."""
    value = torch.ones(1, 4, 1, 1)
    where = torch.tensor([[x, 0.5]]).view(1, 1, 1, 1, 1, 2)
    out = vitkern.deformable_attention(value, ((1, 4),), where, torch.ones(1, 1, 1, 1, 1), backend=backend)
    assert out.item() == (column or 0.0)


@ON
def test_nothing_reads_a_cell_it_does_not_touch(backend):
    value, where, weights = (t.detach() for t in inputs(((4, 4), (2, 2)), 2))
    where = where.clamp(0.15, 0.35)  # the first level's cells (0..1, 0..1)
    touched = torch.zeros(4, 4, dtype=torch.bool)
    touched[:2, :2] = True
    value = value.clone()
    value[:, :16][:, ~touched.flatten()] = float("nan")
    value[:, 16:] = 1
    leaves = [t.requires_grad_() for t in (value, where, weights)]
    out = vitkern.deformable_attention(leaves[0], ((4, 4), (2, 2)), *leaves[1:], backend=backend)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
@pytest.mark.parametrize("queries", [3, 90], ids=["read in place", "copied side by side"])
def test_cells_may_lie_beyond_32_bits(queries):
    shapes = ((6, 4), (3, 2))
    value, where, weights = (t.detach().half() for t in inputs(shapes, 2, 1, queries))
    step = 2**31 // (value.shape[1] - 1) + 1
    storage = torch.UntypedStorage(
        2 * (step * (value.shape[1] - 1) + value[0, 0].numel())
    )  # few of its pages are touched
    far = torch.empty(0, dtype=value.dtype).set_(storage).as_strided(value.shape, (0, step, 8, 1)).copy_(value)
    results = []
    for given in (value, far):
        leaves = [t.requires_grad_() for t in (given, where, weights)]
        out = vitkern.deformable_attention(leaves[0], shapes, *leaves[1:], backend="cpu")
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_memory_holds_no_samples():
    """The samples of 8400 queries are 103 MB for each corner; out and three gradients are 27."""
    setup = """
torch.set_num_threads(1)
shapes = ((80, 80), (40, 40), (20, 20))
def leaves(n):
    made = torch.randn(1, 8400, 8, 32), torch.rand(1, n, 8, 3, 4, 2), torch.rand(1, n, 8, 3, 4)
    return [t.requires_grad_() for t in made]
few, given = leaves(4), leaves(8400)
run = lambda v, p, a: vitkern.deformable_attention(v, shapes, p, a, backend="cpu").sum().backward()
run(*few)
"""
    assert grown(setup, "run(*given)") < 60e6


@ON
def test_float32_places_beside_a_bfloat16_value_stay_exact(backend):
    """In bfloat16 a place on a map 152 wide is off by 0.3 of a cell."""
    shapes = ((100, 152),)
    value, where, weights = (t.detach() for t in inputs(shapes, batch=1, queries=64, dtype=torch.float32))
    low = value.bfloat16()
    oracle = vitkern.deformable_attention(low.double(), shapes, where.double(), weights.double(), backend="reference")
    eager = vitkern.deformable_attention(low, shapes, where, weights, backend="reference")
    got = vitkern.deformable_attention(low, shapes, where, weights, backend=backend)
    testing.assert_close_to_oracle("out", got, oracle, eager)
    rounded = vitkern.deformable_attention(low, shapes, where.bfloat16(), weights, backend=backend)
    assert (rounded.double() - oracle).abs().max() > 10 * (got.double() - oracle).abs().max()


@ON
def test_autocast_leaves_places_in_float32(backend):
    value, where, weights = (t.detach() for t in inputs(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = vitkern.deformable_attention(value, COCO, where, weights, backend=backend)
    want = vitkern.deformable_attention(value.bfloat16(), COCO, where, weights, backend=backend)
    assert torch.equal(got, want) and got.dtype == torch.bfloat16


def test_vmap_over_the_batch():
    value, where, weights = (torch.stack([t.detach(), t.detach() + 0.1]) for t in inputs())
    got = torch.func.vmap(lambda v, p, a: vitkern.deformable_attention(v, COCO, p, a))(value, where, weights)
    want = [vitkern.deformable_attention(*(value[i], COCO, where[i], weights[i])) for i in range(2)]
    torch.testing.assert_close(got, torch.stack(want))


REFUSED = [
    (dict(shapes=((25, 34),)), ValueError, "the levels of spatial_shapes have 850 cells, but value has 1154"),
    (dict(shapes=()), TypeError, "one \\(height, width\\) for each level"),
    (dict(shapes=((25, 34, 1),)), TypeError, "one \\(height, width\\) for each level"),
    (dict(shapes=((0, 34),)), ValueError, "a side of spatial_shapes must be at least 1, got 0"),
    (dict(shapes=torch.ones(4, 2)), TypeError, "spatial_shapes must hold integers"),
    (dict(where=lambda t: t[..., :1]), ValueError, r"must have shape \[B, N, H, L, P, 2\], the last axis"),
    (dict(where=lambda t: t.flatten(3, 4)), ValueError, "sampling_locations must have shape"),
    (dict(where=lambda t: t[:, :, :2]), ValueError, "the batch and heads of value, 2 and 3"),
    (dict(where=lambda t: t[:, :, :, :3], weights=lambda t: t[:, :, :, :3]), ValueError, "the 4 levels of spatial_shapes"),
    (dict(weights=lambda t: t[..., :3]), ValueError, "attention_weights must have shape"),
    (dict(weights=lambda t: t.int()), TypeError, "attention_weights must be float32"),
    (dict(value=lambda t: t.flatten(2)), ValueError, r"value must have shape \[B, S, H, D\]"),
    (dict(value=lambda t: t.repeat(1, 1, 1, 33)), ValueError, "a head size of 1 to 256"),
    (dict(method="linear"), ValueError, "method must be 'bilinear' or 'nearest', got 'linear'"),
    (dict(normalize_weights=1), TypeError, "normalize_weights must be a bool"),
    (dict(points_per_level=4), TypeError, "points_per_level must hold one int for each level"),
    (dict(points_per_level=(4, 4, 4)), ValueError, "one int for each of the 4 levels"),
    (dict(points_per_level=(4, 4, 4, 4)), ValueError, r"must have shape \[B, N, H, J, 2\]"),
    (
        dict(points_per_level=(4, 4, 4, 3), where=lambda t: t.flatten(3, 4), weights=lambda t: t.flatten(3)),
        ValueError,
        "the 15 points of points_per_level",
    ),
]  # fmt: skip


@pytest.mark.parametrize("changes, kind, sentence", REFUSED)
def test_refusals_are_sentences(changes, kind, sentence):
    value, where, weights = (t.detach() for t in inputs())
    changes = dict(changes)
    value = changes.pop("value", lambda t: t)(value)
    where = changes.pop("where", lambda t: t)(where)
    weights = changes.pop("weights", lambda t: t)(weights)
    with pytest.raises(kind, match=f"deformable_attention: .*{sentence}"):
        vitkern.deformable_attention(value, changes.pop("shapes", COCO), where, weights, **changes)
