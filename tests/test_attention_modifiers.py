"""The typed modifiers of attention: against the code of the models they come from, and against loops."""

import math

import libraries  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from memory import grown
from test_attention import logits, output, qkv
from timm.models import beit, cait, levit, vision_transformer_sam

import vitkern
from vitkern import bias, mask, modulation
from vitkern.testing import attention as registry

D = torch.float64


def normal(*shape, grad=True):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def check(queries, keys, *leaves, **options):
    """The output is that of the dense forms, and the gradients of the leaves are those of finite differences."""
    q, k, v = qkv(queries, keys, heads=2, kv_heads=1, d=4, dv=3, grad=True)
    assert torch.autograd.gradcheck(
        lambda *_: vitkern.attention(q, k, v, **options), (q, k, v, *leaves), fast_mode=True
    )


# biases -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_table_with_a_class_token_is_that_of_beit(grid):
    index = bias.RelativePosition(torch.zeros(0), grid=grid, prefix_tokens=1).rows((), torch.device("cpu"))
    assert torch.equal(index.long(), beit.gen_relative_position_index(grid))
    module = beit.Attention(16, num_heads=2, qkv_bias=True, window_size=grid).eval()
    with torch.no_grad():
        module.relative_position_bias_table.normal_()
        x = torch.randn(2, grid[0] * grid[1] + 1, 16)
        offset = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
        q, k, v = F.linear(x, module.qkv.weight, offset).unflatten(-1, (3, 2, 8)).unbind(2)
        table = bias.RelativePosition(module.relative_position_bias_table, grid=grid, prefix_tokens=1)
        torch.testing.assert_close(module.proj(vitkern.attention(q, k, v, bias=table).flatten(2)), module(x))


def test_absolute_offsets_and_strided_queries_are_those_of_levit():
    module = levit.AttentionDownsample(32, 32, key_dim=8, num_heads=4, attn_ratio=2.0, stride=2, resolution=(5, 6))
    module.eval()
    with torch.no_grad():
        module.attention_biases.normal_()
        x = torch.randn(2, 30, 32)
        k, v = module.kv(x).view(2, 30, 4, -1).split([8, 16], dim=3)
        q = module.q(x).view(2, -1, 4, 8)
        table = bias.RelativePosition(module.attention_biases.t(), grid=(5, 6), sign="abs", q_stride=2)
        out = vitkern.attention(q, k, v, bias=table, scale=module.scale)
        torch.testing.assert_close(module.proj(out.flatten(2)), module(x))


@pytest.mark.parametrize("sign", bias.SIGNS)
@pytest.mark.parametrize("prefix, stride", [(0, 1), (2, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("grid", [(3, 7), (20,)])
def test_a_table_on_a_grid_is_that_of_its_index(grid, prefix, stride, sign):
    table = normal(bias.table_rows(grid, sign, prefix), 2, grad=False)
    table[[0, 4]], table[2] = -math.inf, math.nan
    queries = prefix + math.prod(-(-n // stride) for n in grid)
    q, k, v = qkv(queries, prefix + math.prod(grid), heads=2)
    table.requires_grad_()
    modifier = bias.RelativePosition(table, grid=grid, sign=sign, prefix_tokens=prefix, q_stride=stride)
    index = modifier.rows((), q.device)
    visible = (index != 2) & (torch.arange(k.shape[1]) != 1)  # what meets the NaN is hidden
    of_index = bias.RelativePosition(table, index)
    got, want = (vitkern.attention(q, k, v, bias=b, mask=visible) for b in ([modifier, modifier], [of_index, of_index]))
    torch.testing.assert_close(got, want)
    go = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(out, table, go)[0] for out in (got, want)))


@pytest.mark.parametrize("q_grid, k_grid", [((4, 4), (4, 4)), ((3, 5), (3, 5)), ((4, 6), (2, 3)), ((2, 3), (4, 6))])
def test_decomposed_positions_are_those_of_sam(q_grid, k_grid):
    q, k, v = qkv(math.prod(q_grid), math.prod(k_grid), heads=2, kv_heads=2)
    tables = [normal(2 * max(a, b) - 1, 8) for a, b in zip(q_grid, k_grid, strict=True)]
    modifier = bias.DecomposedRelativePosition(*tables, q_grid, k_grid)
    ours = modifier.dense(q, k)
    theirs = vision_transformer_sam.get_decomposed_rel_pos_bias(
        q.transpose(1, 2).flatten(0, 1), *tables, q_grid, k_grid
    )
    torch.testing.assert_close(ours.flatten(0, 1), theirs.reshape(ours.flatten(0, 1).shape))
    got = vitkern.attention(q, k, v, bias=modifier, scale=0.3)  # the queries of the term are not scaled
    torch.testing.assert_close(got, output((logits(q, k, 0.3) + ours).softmax(-1), v))


def test_positions_given_for_every_query():
    rows, columns = normal(1, 6, 2, 3), normal(1, 6, 1, 4)
    modifier = bias.DecomposedRelativePosition(rows, columns, None, (3, 4))
    dense = modifier.dense(*qkv(6, 12)[:2])
    assert dense.shape == (1, 2, 6, 12)
    torch.testing.assert_close(dense[0, 1, 5, 2 * 4 + 3], rows[0, 5, 1, 2] + columns[0, 5, 0, 3])
    check(6, 12, rows, columns, bias=modifier)


def test_key_bias_is_proportional_attention():
    """Keys that stand for several tokens count as often: merging equal tokens changes nothing (ToMe)."""
    q, k, v = qkv(5, 9)
    twice = [torch.cat((t, t[:, :3]), 1) for t in (k, v)]
    size = torch.ones(2, 1, 9, dtype=D)
    size[..., :3] = 2.0
    size.requires_grad_()
    got = vitkern.attention(q, k, v, bias=bias.KeyBias(size.log()))
    torch.testing.assert_close(got, vitkern.attention(q, *twice))
    (grad,) = torch.autograd.grad(got.square().sum(), size)
    assert grad.isfinite().all()
    hidden = bias.KeyBias(
        torch.tensor([[[0.0] * 8 + [1.0]]], dtype=D).log().neg()
    )  # log 0 hides nothing, its negative ...
    assert hidden.vector[..., 0].eq(math.inf).all()
    nobody = bias.KeyBias((1 - torch.eye(9, dtype=D)[8])[None, None].log())
    assert torch.equal(vitkern.attention(q, k, v, bias=nobody), vitkern.attention(q, k[:, :8], v[:, :8]))


def test_distances_and_decays():
    xy = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1).reshape(12, 2).double()
    rate, slope = normal(2), normal(2)
    dense = bias.ManhattanDecay(rate, (3, 4)).dense(*qkv(12, 12)[:2])
    torch.testing.assert_close(dense, rate[:, None, None] * torch.cdist(xy, xy, p=1))
    check(12, 12, rate, bias=bias.ManhattanDecay(rate, (3, 4)))
    q, k, v = qkv(12, 12, heads=2, kv_heads=2)
    got = vitkern.attention(q, k, v, bias=bias.ManhattanDecay(rate, (3, 4), place="prob"))
    torch.testing.assert_close(got, output(logits(q, k).softmax(-1) * dense.exp(), v))
    where = xy[None].clone().requires_grad_()
    far = bias.EuclideanDistance(slope, where, where)
    torch.testing.assert_close(far.dense(q, k)[0], -slope[:, None, None] * torch.cdist(xy, xy))
    (grad,) = torch.autograd.grad(vitkern.attention(q, k, v, bias=far).square().sum(), where)
    assert grad.isfinite().all() and grad.abs().sum() > 0
    apart = normal(1, 5, 2), normal(2, 6, 2)
    check(5, 6, slope, *apart, bias=bias.EuclideanDistance(slope, *apart))


@pytest.mark.parametrize("transpose", [False, True])
def test_the_polyline_path_is_a_walk_along_the_row_and_then_down_the_column(transpose):
    row, col = normal(2, 3, 4, 2), normal(2, 3, 4, 2)
    modifier = bias.PolylinePath(row, col, transpose=transpose)
    dense = modifier.dense(*qkv(12, 12, heads=2)[:2])
    for i in range(12):
        for j in range(12):
            (y, x), (v, u) = divmod(j if transpose else i, 4), divmod(i if transpose else j, 4)
            along = row[:, y, min(x, u) + 1 : max(x, u) + 1].sum(1)
            down = col[:, min(y, v) + 1 : max(y, v) + 1, u].sum(1)
            torch.testing.assert_close(dense[:, :, i, j], along + down)
    check(12, 12, row, col, bias=modifier)


def test_contextual_positions_meet_queries_keys_and_values():
    index = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(0))
    tables = [normal(5, h, d) for h, d in ((2, 4), (1, 4), (2, 3))]
    modifier = bias.ContextualPosition(*tables, index)
    q, k, v = qkv(4, 6, heads=2, kv_heads=1, d=4, dv=3)
    a, b, c = (t.expand(-1, 2, -1)[index] for t in tables)  # [Nq, Nk, H, D]
    s = logits(q, k) + torch.einsum("bihd,ijhd->bhij", q, a) + torch.einsum("bjd,ijhd->bhij", k[:, :, 0], b)
    want = output(s.softmax(-1), v) + torch.einsum("bhij,ijhd->bihd", s.softmax(-1), c)
    torch.testing.assert_close(vitkern.attention(q, k, v, bias=modifier), want)
    check(4, 6, *tables, bias=modifier)


def test_one_contextual_position_may_stand_twice_in_a_list():
    q, k, v = qkv(4, 5, heads=2, d=4)
    table, index = normal(3, 1, 4), torch.arange(20).view(4, 5) % 3
    twice, double = (bias.ContextualPosition(table * n, None, None, index) for n in (1, 2))
    torch.testing.assert_close(vitkern.attention(q, k, v, bias=[twice, twice]), vitkern.attention(q, k, v, bias=double))


def test_a_key_that_a_bias_hides_may_be_nan_beside_contextual_positions():
    q, k, v = qkv(4, 6, heads=2, kv_heads=1, d=4, dv=3)
    modifier = bias.ContextualPosition(
        normal(5, 2, 4), normal(5, 1, 4), normal(5, 2, 3), torch.arange(24).view(4, 6) % 5
    )
    hidden = bias.KeyBias(torch.tensor([0.0, -math.inf, 0, 0, 0, 0], dtype=D).expand(1, 1, -1))
    want = vitkern.attention(q, k, v, bias=[modifier, hidden])
    k, v = (t.clone() for t in (k, v))
    k[:, 1], v[:, 1] = math.nan, math.nan
    torch.testing.assert_close(vitkern.attention(q, k, v, bias=[modifier, hidden]), want)


# masks ------------------------------------------------------------------------------------------------------------------


def test_causal_and_no_self():
    q, k, v = qkv(5, 7)
    triangle = torch.ones(5, 7, dtype=torch.bool).tril(2)
    assert torch.equal(vitkern.attention(q, k, v, mask=mask.Causal(2)), vitkern.attention(q, k, v, mask=triangle))
    assert torch.equal(mask.NoSelf().dense(q, k), ~torch.eye(5, 7, dtype=torch.bool))
    both = [mask.Causal(2), mask.NoSelf()]
    want = triangle & ~torch.eye(5, 7, dtype=torch.bool)
    assert torch.equal(vitkern.attention(q, k, v, mask=both), vitkern.attention(q, k, v, mask=want))


def test_segments_are_packed_sequences():
    q, k, v = qkv(9, 9, batch=1)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, -1]])
    out = vitkern.attention(q, k, v, mask=mask.Segments(ids, ids))
    for first, last in ((0, 3), (3, 5), (5, 8)):
        torch.testing.assert_close(out[:, first:last], vitkern.attention(*(t[:, first:last] for t in (q, k, v))))
    assert out[:, 8].eq(0).all()
    order = torch.tensor([4, 8, 0, 7, 2, 3, 6, 1, 5])
    moved = vitkern.attention(*(t[:, order] for t in (q, k, v)), mask=mask.Segments(ids[:, order], ids[:, order]))
    torch.testing.assert_close(moved, out[:, order])


def test_the_allow_table_of_denoising_groups():
    """DN-DETR: id 0 are the matching queries, each group sees itself and them, they see nobody else."""
    ids = torch.tensor([[1, 1, 2, 2, 0, 0, 0]])
    allow = torch.eye(3, dtype=torch.bool)
    allow[:, 0] = True
    visible = mask.Segments(ids, ids, allow).dense(*qkv(7, 7)[:2])[0, 0]
    for i in range(7):
        for j in range(7):
            assert visible[i, j] == (ids[0, j] == 0 or ids[0, i] == ids[0, j])


def test_block_causal_levels_are_prefixes_and_staircases():
    levels = torch.tensor([[0, 0, 1, 2]])
    visible = mask.BlockCausal(levels, levels).dense(*qkv(4, 4)[:2])[0, 0]
    assert visible.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    wait = mask.BlockCausal(torch.arange(5)[None] + 2, torch.arange(8)[None]).dense(*qkv(5, 8)[:2])[0, 0]
    assert torch.equal(wait, torch.ones(5, 8, dtype=torch.bool).tril(2))


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (5, 7)])
def test_masks_from_logits_are_those_of_mask2former(size):
    """The published code: resize, sigmoid below a half is blocked, rows that see nothing see all."""
    g = torch.Generator().manual_seed(1)
    predicted = torch.randn(2, 5, 12, 12, generator=g) - 0.5
    predicted[0, 3] = -1.0  # sees nothing
    predicted[1, 2] = 0.0  # a tie is on
    blocked = F.interpolate(predicted.double(), size=size, mode="bilinear", align_corners=False).flatten(2) < 0
    blocked = blocked & ~blocked.all(-1, keepdim=True)
    q, k, v = qkv(5, math.prod(size), dtype=torch.float32)
    modifier = mask.FromLogits(predicted, size)
    visible = modifier.dense(q, k)[:, 0]
    assert (visible != ~blocked).float().mean() < 1e-3  # but for cells within rounding of 0
    assert visible[0, 3].all() and visible[1, 2].all()
    assert not mask.FromLogits(predicted, size, empty="none").dense(q, k)[0, 0, 3].any()
    assert vitkern.attention(q, k, v, mask=modifier).isfinite().all()


def test_ties_and_nan_of_logits_and_the_block_of_eomt():
    flat = torch.tensor([0.0, math.nan, 1e-3, -1e-3]).view(1, 1, 2, 2).bfloat16()
    at = lambda **o: mask.FromLogits(flat, (2, 2), **o).dense(*qkv(1, 4, batch=1)[:2])[0, 0, 0].tolist()  # noqa: E731
    assert at() == [True, True, True, False] and at(inclusive=False) == [False, False, True, False]
    predicted = torch.randn(1, 2, 4, 4)
    q, k, _ = qkv(2 + 1 + 16, 2 + 1 + 16, batch=1)
    eomt = mask.FromLogits(predicted, (4, 4), inclusive=False, rows=(0, 2), cols=(3, 19), empty="none")
    visible = eomt.dense(q, k)[0, 0]
    assert visible[2:].all() and visible[:, :3].all() and torch.equal(visible[:2, 3:], predicted[0].flatten(1) > 0)
    opened = mask.FromLogits(predicted, (4, 4), rows=(0, 2), cols=(3, 19), open_rows=torch.ones(1, 2, dtype=torch.bool))
    assert opened.dense(q, k).all()


# modulations ------------------------------------------------------------------------------------------------------------


def test_talking_heads_are_those_of_cait():
    module = cait.TalkingHeadAttn(24, num_heads=3, qkv_bias=True).eval()
    with torch.no_grad():
        x = torch.randn(2, 11, 24)
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
        heads = modulation.TalkingHeads(
            module.proj_l.weight, module.proj_l.bias, module.proj_w.weight, module.proj_w.bias
        )
        torch.testing.assert_close(module.proj(vitkern.attention(q, k, v, modulation=heads).flatten(2)), module(x))


def test_the_offset_of_talking_heads_does_not_reach_hidden_keys():
    weights = [normal(2, 2), normal(2), normal(2, 2), normal(2)]
    visible = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    visible[2] = False
    q, k, v = qkv(5, 6, heads=2, kv_heads=1, d=4, dv=3)
    heads = modulation.TalkingHeads(*weights)
    got = vitkern.attention(q, k, v, mask=visible, modulation=heads)
    s = torch.einsum("gh,bhij->bgij", weights[0], logits(q, k)) + weights[1][:, None, None]
    p = s.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
    p = (torch.einsum("gh,bhij->bgij", weights[2], p) + weights[3][:, None, None]) * visible
    torch.testing.assert_close(got, output(p, v))
    check(5, 6, *weights, mask=visible, modulation=heads)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_soft_causal_is_not_renormalised(ratio):
    q, k, v = qkv(6, 6)
    r = torch.tensor(ratio, dtype=D, requires_grad=True)
    p = logits(q, k).softmax(-1)
    want = ratio * output(p, v) + (1 - ratio) * output(p.tril(), v)
    torch.testing.assert_close(vitkern.attention(q, k, v, modulation=modulation.SoftCausal(r)), want)
    check(6, 6, r, modulation=modulation.SoftCausal(r))


def test_gaussian_mixtures_multiply_scores_before_the_bias():
    sigma, alpha = (normal(3, 2) * 0.5 + 2).detach().requires_grad_(), normal(3, 2)
    mixture = modulation.GaussianMixture(sigma, alpha, (4, 5), prefix_tokens=1)
    q, k, v = qkv(21, 21, heads=2, kv_heads=2)
    factor = mixture.dense(q, k)
    (y, x), (w, u) = divmod(7, 5), divmod(18, 5)
    d2 = (y - w) ** 2 + (x - u) ** 2
    want = sum(alpha[n] * math.e ** (-d2 / (2 * (sigma[n].square() + 1e-5))) for n in range(3))
    torch.testing.assert_close(factor[:, 8, 19], want)
    assert factor[:, 0].eq(1).all() and factor[:, :, 0].eq(1).all()
    b = normal(1, 2, 21, 21, grad=False)
    got = vitkern.attention(q, k, v, modulation=mixture, bias=b)
    torch.testing.assert_close(got, output((logits(q, k) * factor + b).softmax(-1), v))
    wide = [
        modulation.GaussianMixture(torch.full((1, 1), 20.0), torch.ones(1, 1), (1, 12), mode=m)
        for m in modulation.MODES
    ]
    exact, published = (m.dense(*qkv(12, 12)[:2])[0, 0] for m in wide)
    assert published[11] == 0 and abs(float(exact[11]) - 0.86) < 0.01 and torch.equal(exact[:11], published[:11])
    check(21, 21, sigma, alpha, modulation=mixture)
    assert torch.autograd.grad(modulation.GaussianMixture(
        torch.zeros(1, 2, requires_grad=True), alpha[:1], (2, 2)).dense(q, k).sum(), alpha)[0].isfinite().all()  # fmt: skip


def test_elementwise_factors_on_scores_or_weights():
    q, k, v = qkv(5, 6)
    w = normal(1, 4, 5, 6)
    on = vitkern.attention(q, k, v, modulation=modulation.ElementwiseMask(w))
    torch.testing.assert_close(on, output((logits(q, k) * w).softmax(-1), v))
    after = vitkern.attention(q, k, v, modulation=modulation.ElementwiseMask(w, place="prob"))
    torch.testing.assert_close(after, output(logits(q, k).softmax(-1) * w, v))
    uniform = vitkern.attention(q, k, v, modulation=modulation.ElementwiseMask(torch.zeros(5, 6)))
    torch.testing.assert_close(uniform, v.mean(1, keepdim=True).repeat_interleave(2, 2).expand(-1, 5, -1, -1))


@pytest.mark.parametrize("keep", ["ones", "zeros", "some"])
def test_the_policy_of_dynamicvit(keep):
    """Its published softmax_with_policy, written anew: the own token always counts, dropped ones keep eps / N."""
    q, k, v = qkv(6, 6, heads=2, kv_heads=2)
    m = {"ones": torch.ones(2, 6), "zeros": torch.zeros(2, 6), "some": torch.tensor([[1.0, 0, 0.3, 1, 0, 1]] * 2)}[keep]
    m = m.double().requires_grad_()
    s = logits(q, k)
    m4 = m[:, None, None] + (1 - m[:, None, None]) * torch.eye(6, dtype=D)
    e = (s - s.amax(-1, keepdim=True)).exp() * m4
    want = output((e + 1e-6 / 6) / (e.sum(-1, keepdim=True) + 1e-6), v)
    got = vitkern.attention(q, k, v, modulation=modulation.Policy(m))
    torch.testing.assert_close(got, want)
    (a,), (b,) = (torch.autograd.grad(t.square().sum(), m) for t in (got, want))
    torch.testing.assert_close(a, b)


def test_modifiers_compose():
    """Biases add, masks intersect, modulations follow each other."""
    q, k, v = qkv(6, 6, heads=2, kv_heads=2)
    a, b, c = normal(1, 2, 6, 6, grad=False), normal(1, 1, 6, grad=False), normal(6, 6, grad=False)
    got = vitkern.attention(
        q, k, v,
        bias=[a, bias.KeyBias(b), bias.ManhattanDecay(torch.full((2,), -0.1, dtype=D), (2, 3))],
        mask=[mask.Causal(), torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.8],
        modulation=[modulation.ElementwiseMask(c), modulation.SoftCausal(0.4), modulation.ElementwiseMask(c, "prob")],
    )  # fmt: skip
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & (
        torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.8
    )
    far = bias.ManhattanDecay(torch.full((2,), -0.1, dtype=D), (2, 3)).dense(q, k)
    s = (logits(q, k) * c + a + b[:, :, None] + far).masked_fill(~visible, -math.inf)
    p = s.softmax(-1).nan_to_num(0.0) * torch.ones(6, 6, dtype=D).tril().clamp(min=0.4) * c
    torch.testing.assert_close(got, output(p, v))


@pytest.mark.parametrize("call", [c for c in registry.offsets() if c.seed in (24, 31, 36, 50)], ids=str)
def test_the_slots_of_offsets_and_mixtures_are_traced(call):
    torch._dynamo.reset()
    tensors = call.leaves(torch.float32, grad=True)
    leaves = [t for t in tensors.values() if t.requires_grad]
    loss = lambda t: sum(o.square().sum() for o in call.run(t))  # noqa: E731
    got, want = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)(tensors), loss(tensors)
    torch.testing.assert_close([got, *torch.autograd.grad(got, leaves)], [want, *torch.autograd.grad(want, leaves)])


POSITIONS = {
    "decomposed": "bias=bias.DecomposedRelativePosition(torch.randn(2 * s - 1, 16), torch.randn(2 * s - 1, 16), (s, s), (s, s))",
    "manhattan": "bias=bias.ManhattanDecay(-torch.rand(4), (s, s))",
    "path": "bias=bias.PolylinePath(-torch.rand(1, s, s, 4), -torch.rand(1, s, s, 4))",
    "distance": "bias=bias.EuclideanDistance(torch.rand(4), torch.randn(1, s * s, 2), torch.randn(1, s * s, 2))",
    "table": "bias=bias.RelativePosition(torch.randn((2 * s - 1) ** 2, 4), grid=(s, s))",
    "decay": "bias=bias.ManhattanDecay(-torch.rand(4), (s, s), 'prob')",
    "context": "bias=bias.ContextualPosition(torch.randn(9, 4, 16), torch.randn(9, 1, 16), torch.randn(9, 4, 16), "
    "torch.randint(0, 9, (s * s,), dtype=torch.int32).expand(s * s, -1))",
    "soft": "modulation=modulation.SoftCausal(torch.tensor(0.3))",
    "mixture": "modulation=modulation.GaussianMixture(torch.rand(2, 4) + 1, torch.randn(2, 4), (s, s))",
}
MEASURED = """
from vitkern import bias, modulation
def call(s):
    leaves = [torch.randn(1, s * s, 4, 16, requires_grad=True) for _ in range(3)]
    made = dict({made})
    for t in (t for m in made.values() for t in vars(m).values()):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    vitkern.attention(*leaves, **made, return_stats=("lse", "key_mean"))[0].sum().backward()
call(4)
"""


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_need_no_map_of_scores(name):
    """4 heads of 3136 tokens: one map of scores in float32 would be 157 MB, and backward would need more than one."""
    assert grown(MEASURED.replace("{made}", POSITIONS[name]), "call(56)") < 60e6
