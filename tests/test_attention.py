"""attention: the order of its steps against torch and closed forms, statistics, edges, gradients. The modifiers
are in test_attention_modifiers.py."""

import math

import pytest
import torch
import torch.nn.functional as F

import vitkern
from vitkern import Rope, bias, mask, modulation, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def qkv(queries=7, keys=9, batch=2, heads=4, kv_heads=2, d=8, dv=6, dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = ((queries, heads, d), (keys, kv_heads, d), (keys, kv_heads, dv))
    return [torch.randn(batch, *s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def probabilities(s, visible=None):
    s = s if visible is None else s.masked_fill(~visible, -math.inf)
    return s.softmax(-1).nan_to_num(0.0)


def logits(q, k, scale=None):
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)


def output(p, v):
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(p.shape[1] // v.shape[2], 2))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 257), (65, 64), (197, 49)])
def test_scaled_dot_product_attention(queries, keys, dtype, masked):
    q, k, v = qkv(queries, keys, dtype=dtype)
    visible = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(0)) < 0.8 if masked else None
    if masked:
        visible[..., 0] = True
    turned = [t.transpose(1, 2) for t in (q, k, v)]
    oracle, eager = (
        F.scaled_dot_product_attention(*(t.to(d) for t in turned), attn_mask=visible, enable_gqa=True).transpose(1, 2)
        for d in (torch.float64, dtype)
    )
    testing.assert_close_to_oracle("out", vitkern.attention(q, k, v, mask=visible), oracle, eager)


@pytest.mark.parametrize("shape", [(a, b, c, d) for a in (1, 2) for b in (1, 4) for c in (1, 7) for d in (1, 9)])
def test_a_bias_broadcasts_over_any_axes_and_so_does_its_gradient(shape):
    q, k, v = qkv(grad=True)
    b = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    got = vitkern.attention(q, k, v, bias=b, scale=0.3)
    want = output(probabilities(logits(q, k, 0.3) + b), v)
    torch.testing.assert_close(got, want)
    go = torch.randn_like(got)
    for a, c in zip(*(torch.autograd.grad(out, (q, k, v, b), go) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, c)


def test_minus_infinity_in_a_bias_hides_as_a_mask_does():
    q, k, v = qkv()
    visible = torch.rand(2, 1, 7, 9) < 0.5
    visible[0, 0, 3] = False
    b = torch.zeros(2, 1, 7, 9, dtype=torch.float64).masked_fill(~visible, -math.inf)
    assert torch.equal(vitkern.attention(q, k, v, bias=b), vitkern.attention(q, k, v, mask=visible))


def test_a_row_without_keys_gives_zero_and_nothing_hidden_leaks():
    q, k, v = qkv()
    visible = torch.rand(2, 4, 7, 9) < 0.6
    visible[:, :, 2] = False  # an empty row
    visible[..., 5] = False  # a key that nobody sees
    k[:, 5], v[:, 5] = math.nan, math.inf
    q[:, 2] = math.nan
    sink = torch.randn(4, dtype=torch.float64)
    w = torch.rand(2, 7, dtype=torch.float64)
    for normalizer in ("softmax", "sigmoid", "relu", "none"):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, sink, w)]
        b, gauss = (torch.randn(1, 4, 7, 9, dtype=torch.float64).requires_grad_() for _ in range(2))
        options = {"sink": leaves[3]} if normalizer == "softmax" else {}
        stats = ("lse", "key_mean") if normalizer == "softmax" else ("key_mean",)
        out, found = vitkern.attention(
            *leaves[:3], bias=b, mask=visible, modulation=[modulation.ElementwiseMask(gauss)], normalizer=normalizer,
            return_stats=stats, query_weight=leaves[4], **options,
        )  # fmt: skip
        assert out.isfinite().all() and out[:, 2].eq(0).all() and found.key_mean.isfinite().all()
        if normalizer == "softmax":
            torch.testing.assert_close(found.lse[:, 2], sink.expand(2, 4))
        wanted = [t for t in (*leaves, b, gauss) if t is not leaves[3] or options]
        total = out.square().sum() + found.key_mean.square().sum() + (found.lse.square().sum() if options else 0)
        for grad in torch.autograd.grad(total, wanted):
            assert grad.isfinite().all()
    lse = vitkern.attention(q, k, v, mask=visible, return_stats="lse")[1].lse
    assert lse[:, 2].eq(-math.inf).all() and lse[:, [0, 1, 3, 4, 5, 6]].isfinite().all()


def test_a_visible_nan_is_seen_by_the_rows_that_see_it():
    q, k, v = qkv()
    visible = torch.ones(7, 9, dtype=torch.bool)
    visible[:3, 4] = False
    k[:, 4] = math.nan
    out = vitkern.attention(q, k, v, mask=visible)
    assert out[:, :3].isfinite().all() and out[:, 3:].isnan().all()


@pytest.mark.parametrize("normalizer", ["sigmoid", "relu", "none"])
def test_other_normalizers(normalizer):
    q, k, v = qkv(grad=True)
    visible = torch.rand(2, 1, 7, 9) < 0.7
    row = torch.full((1, 1, 7), -math.log(9), dtype=torch.float64, requires_grad=True)
    got = vitkern.attention(q, k, v, bias=bias.RowBias(row), mask=visible, normalizer=normalizer)
    f = {"sigmoid": torch.sigmoid, "relu": torch.relu, "none": lambda t: t}[normalizer]
    want = output(f(logits(q, k) + row[..., None]) * visible, v)
    torch.testing.assert_close(got, want)
    run = lambda *a: vitkern.attention(*a, bias=bias.RowBias(row), mask=visible, normalizer=normalizer)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_the_sink_is_a_column_that_holds_nothing_and_plus_one_is_sink_0():
    q, k, v = qkv(grad=True)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out, found = vitkern.attention(q, k, v, sink=sink, return_stats="lse")
    column = sink[:, None, None].expand(2, 4, 7, 1)
    s = torch.cat((logits(q, k), column), -1)
    torch.testing.assert_close(out, output(s.softmax(-1)[..., :-1], v))
    torch.testing.assert_close(found.lse, s.logsumexp(-1).transpose(1, 2))
    e = logits(q, k).exp()
    got = vitkern.attention(q, k, v, sink=torch.zeros(4))
    torch.testing.assert_close(got, output(e / (e.sum(-1, keepdim=True) + 1), v))
    assert torch.autograd.gradcheck(lambda *a: vitkern.attention(*a[:3], sink=a[3]), (q, k, v, sink), fast_mode=True)


def test_exactly_k_keys_stay_and_ties_go_to_the_lower_key():
    q, k, v = qkv(keys=12)
    k[:, 3:9] = k[:, 3:4]  # six equal keys
    for topk in (1, 4, 12):
        p = vitkern.attention(q, k, v, topk=topk, return_stats="probs")[1].probs
        assert (p > 0).sum(-1).eq(topk).all()
        s = logits(q, k)
        order = [sorted(range(12), key=lambda j: (-float(s[0, 1, 2, j]), j))[:topk]]
        assert sorted(order[0]) == (p[0, 1, 2] > 0).nonzero()[:, 0].tolist()
        torch.testing.assert_close(vitkern.attention(q, k, v, topk=topk), output(p, v))  # by the kernel
    visible = torch.zeros(7, 12, dtype=torch.bool)
    visible[:, :2] = True
    p = vitkern.attention(q, k, v, topk=5, mask=visible, return_stats="probs")[1].probs
    assert (p > 0).sum(-1).eq(2).all()
    torch.testing.assert_close(vitkern.attention(q, k, v, topk=5, mask=visible), output(p, v))


def test_hard_choices():
    q, k, v = qkv()
    k[:, 4] = k[:, 2]  # a tie: the first wins
    visible = torch.rand(2, 4, 7, 9) < 0.7
    visible[:, :, 3], visible[..., 6] = False, False
    s = logits(q, k).masked_fill(~visible, -math.inf)
    out, found = vitkern.attention(q, k, v, mask=visible, normalizer="argmax_k", return_stats="index")
    empty = torch.zeros(7, dtype=torch.bool)
    empty[3] = True
    best = s.max(-1).values
    first = torch.stack([(s[..., j] == best) for j in range(9)], -1).to(torch.int8).argmax(-1).masked_fill(empty, -1)
    assert torch.equal(found.index, first.transpose(1, 2).to(torch.int32)) and out[:, 3].eq(0).all()
    torch.testing.assert_close(out, output(F.one_hot(first.clamp(min=0), 9).double() * ~empty[:, None], v))
    columns = vitkern.attention(q, k, v, mask=visible, normalizer="argmax_q", return_stats="probs")[1].probs
    assert columns.sum(2)[..., [0, 1, 2, 4, 5, 7, 8]].le(1).all() and columns[..., 6].eq(0).all()
    seen = visible.any(2)
    assert torch.equal(columns.sum(2) == 1, seen)
    assert s.gather(2, columns.argmax(2, keepdim=True))[:, :, 0][seen].eq(s.amax(2)[seen]).all()


def test_cosine_scores_and_a_learned_scale():
    q, k, v = qkv(grad=True)
    tau = torch.tensor([0.5, 1.0, 9.0, 2.0], dtype=torch.float64, requires_grad=True)
    unit = [F.normalize(t, dim=-1) for t in (q, k)]
    s = logits(*unit, scale=1.0) * tau.clamp(max=math.log(100)).exp()[:, None, None]
    torch.testing.assert_close(vitkern.attention(q, k, v, cosine=vitkern.CosineScore(tau)), output(s.softmax(-1), v))
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    s = logits(q, k, scale=1.0) * scale[:, None, None]
    torch.testing.assert_close(vitkern.attention(q, k, v, scale=scale), output(s.softmax(-1), v))
    assert torch.autograd.gradcheck(lambda *a: vitkern.attention(*a[:3], scale=a[3]), (q, k, v, scale), fast_mode=True)


def test_statistics_against_the_matrix():
    q, k, v = qkv(grad=True)
    visible = torch.rand(2, 1, 7, 9) < 0.7
    visible[..., 0] = True
    w = torch.rand(2, 7, dtype=torch.float64)
    w[1] = 0  # nobody is asked
    w.requires_grad_()
    b = torch.randn(1, 4, 7, 9, dtype=torch.float64)
    names = ("lse", "key_mean", "row", "logits_mean", "probs", "logits")
    out, found = vitkern.attention(
        q,
        k,
        v,
        bias=b,
        mask=visible,
        return_stats=names,
        stat_rows=(0, -1),
        query_weight=w,
        dropout_p=0.3,
        dropout_seed=1,
    )
    s = logits(q, k)
    p = probabilities(s + b, visible)
    torch.testing.assert_close(found.lse, (s + b).masked_fill(~visible, -math.inf).logsumexp(-1).transpose(1, 2))
    torch.testing.assert_close(found.key_mean[0], torch.einsum("i,hij->jh", w[0] / w[0].sum(), p[0]))
    assert found.key_mean[1].eq(0).all()
    torch.testing.assert_close(found.row, p[:, :, [0, -1]])
    torch.testing.assert_close(found.logits_mean, s.mean(1))
    torch.testing.assert_close(found.probs, p)
    torch.testing.assert_close(found.logits, s)
    nothing, alone = vitkern.attention(q, k, None, bias=b, mask=visible, return_stats="row", stat_rows=(3,))
    assert nothing is None
    torch.testing.assert_close(alone.row, p[:, :, 3:4])

    def everything(q, k, w):
        _, found = vitkern.attention(q, k, None, mask=visible, return_stats=names[:4], stat_rows=(2,), query_weight=w)
        return found.lse, found.key_mean[0], found.row, found.logits_mean

    assert torch.autograd.gradcheck(everything, (q, k, w), fast_mode=True)


def test_further_keys_stand_behind_the_own_ones():
    q, k, v = qkv()
    more = tuple(torch.randn(1, 3, 2, d, dtype=torch.float64) for d in (8, 6))
    b, visible = torch.randn(1, 4, 7, 9, dtype=torch.float64), torch.rand(7, 9) < 0.6
    whole = [torch.cat((t, e.expand(2, -1, -1, -1)), 1) for t, e in zip((k, v), more, strict=True)]
    got, found = vitkern.attention(q, k, v, bias=b, mask=visible, extra_kv=more, return_stats="key_mean")
    want = vitkern.attention(q, *whole, bias=F.pad(b, (0, 3)), mask=F.pad(visible, (0, 3), value=True))
    torch.testing.assert_close(got, want)
    assert found.key_mean.shape == (2, 12, 4)
    wide = torch.randn(1, 4, 7, 12, dtype=torch.float64)
    assert torch.equal(vitkern.attention(q, k, v, bias=wide, extra_kv=more), vitkern.attention(q, *whole, bias=wide))


def test_dropout_is_a_function_of_its_seed_and_keeps_the_mean():
    q, k, v = qkv(64, 70, heads=2, dtype=torch.float32)
    run = lambda seed: vitkern.attention(q, k, v, dropout_p=0.4, dropout_seed=seed)  # noqa: E731
    assert torch.equal(run(3), run(torch.tensor([3]))) and not torch.equal(run(3), run(4))
    ones = torch.ones_like(v)
    kept = vitkern.attention(q, k, ones, dropout_p=0.4, dropout_seed=3)
    assert abs(float(kept.mean()) - 1) < 0.02 and vitkern.attention(q, k, ones).sub(1).abs().max() < 1e-5


def test_double_backward_compile_and_autocast():
    q, k, v = qkv(3, 4, batch=1, heads=2, d=2, dv=2, grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *a: vitkern.attention(*a[:3], sink=a[3]), (q, k, v, sink), fast_mode=True
    )
    options = {"mask": mask.Causal(1), "modulation": modulation.SoftCausal(0.5), "return_stats": ("lse", "key_mean")}
    compiled = torch.compile(
        lambda *a: vitkern.attention(*a, **options), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for queries, keys in ((3, 4), (5, 7)):
        a = qkv(queries, keys, heads=2)
        (got, stats), (want, expected) = compiled(*a), vitkern.attention(*a, **options)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(stats.lse, expected.lse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = qkv(dtype=torch.float32)
        out = vitkern.attention(*a)
    assert out.dtype == torch.bfloat16 and torch.equal(out, vitkern.attention(*(t.bfloat16() for t in a)))


@pytest.mark.parametrize("queries, keys, batch", [(0, 5, 2), (5, 0, 2), (5, 7, 0)])
def test_empty_inputs_pass_through(queries, keys, batch):
    q, k, v = qkv(queries, keys, batch, grad=True)
    out, found = vitkern.attention(q, k, v, return_stats=("lse", "key_mean"))
    assert out.shape == (batch, queries, 4, 6) and found.key_mean.shape == (batch, keys, 4)
    assert keys or (out.eq(0).all() and found.lse.eq(-math.inf).all())
    out.sum().backward()


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("width, prefix", [(8, 0), (4, 2)])
def test_rope_turns_pairs_as_complex_numbers(layout, width, prefix):
    q, k, v = qkv(7, 7, heads=2, grad=True)
    angle = torch.randn(1, 7 - prefix, 1, width // 2, dtype=torch.float64)
    rope = Rope(angle.cos(), angle.sin(), layout, (prefix, 7), (prefix, 7))

    def turned(x):
        pairs = x[:, prefix:, :, :width]
        split = pairs.unflatten(-1, (-1, 2)) if layout == "interleaved" else pairs.unflatten(-1, (2, -1)).mT
        spun = torch.view_as_real(
            torch.view_as_complex(split.contiguous()) * torch.polar(torch.ones_like(angle), angle)
        )
        spun = spun.flatten(-2) if layout == "interleaved" else spun.mT.flatten(-2)
        return torch.cat((x[:, :prefix], torch.cat((spun, x[:, prefix:, :, width:]), -1)), 1)

    torch.testing.assert_close(vitkern.attention(q, k, v, rope=rope), vitkern.attention(turned(q), turned(k), v))
    cos, sin = angle.cos().requires_grad_(), angle.sin().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, s: vitkern.attention(q, k, v, rope=Rope(c, s, layout, (prefix, 7), (prefix, 7))), (cos, sin)
    )
