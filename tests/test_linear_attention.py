"""linear_attention: traps, refusals. Published models are in test_linear_attention_models.py; what every op must do is in
tests/test_ops.py."""

import math

import pytest
import torch
import torch._dynamo.testing
from agreement import agree
from linear_cases import heads, mixed, weights
from memory import grown
from torch import nn

import vitkern
from vitkern import feature_map as maps
from vitkern import testing
from vitkern.ops import _linear_pairs
from vitkern.ops._linear_lowering import lower
from vitkern.testing import assert_close_to_oracle

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
F = torch.nn.functional


@ON
def test_a_dead_query_in_float16_gives_0(backend):
    q, k, v = (t.half() for t in heads())
    q[:, 4] = -q[:, 4].abs()
    out = vitkern.linear_attention(q, k, v, preset="efficientvit", backend=backend)
    assert (out[:, 4] == 0).all() and out.isfinite().all()


@ON
def test_mean_and_sum_differ_through_eps_alone(backend):
    q, k, v = heads()
    for factor in (1.0, 1e-6):
        scores = weights(factor * q.relu(), k.relu())
        den = scores.sum(-1).mT[..., None]
        one, other = (
            vitkern.linear_attention(factor * q, k, v, normalizer=n, eps=1e-6, backend=backend) for n in ("sum", "mean")
        )
        agree(one, mixed(scores, v) / (den + 1e-6), (q, k, v))
        agree(other, mixed(scores, v) / (den + 35 * 1e-6), (q, k, v))
    assert (other / one).median() < 0.9


@ON
@pytest.mark.parametrize("normalizer", ["mean", "subtract", "sum"])
def test_masked_keys_are_as_if_they_were_not_there(backend, normalizer):
    q, k, v = heads()
    valid = torch.arange(35) < 17
    hidden = [t.detach().clone() for t in (k, v)]
    for t in hidden:
        t[:, 17:] = math.nan
    options = {"feature_map": "elu1", "normalizer": normalizer, "backend": backend}
    got = vitkern.linear_attention(q, *hidden, key_mask=valid.expand(2, -1), **options)
    torch.testing.assert_close(got, vitkern.linear_attention(q, k[:, :17], v[:, :17], **options))
    none = vitkern.linear_attention(q, *hidden, key_mask=torch.zeros(2, 35, dtype=torch.bool), **options)
    assert (none == 0).all()


@ON
def test_exact_zeros_have_no_gradient_through_relu(backend):
    q, k, v = heads()
    with torch.no_grad():
        q[:, ::2, :, ::3] = 0
        k[:, ::3, :, ::2] = 0
    out = vitkern.linear_attention(q, k, v, backend=backend)
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert (dq[q == 0] == 0).all() and (dk[k == 0] == 0).all() and (dq[q > 0] != 0).all()


@ON
def test_the_order_of_the_rotation(backend):
    q, k, v = heads()
    angles = torch.randn(1, 35, 1, 3, dtype=torch.float64)
    rope = vitkern.Rope(angles.cos(), angles.sin(), "half")
    a, b = (rope.turn(F.elu(t) + 1, None) for t in (q, k))
    den = weights(F.elu(q) + 1, F.elu(k) + 1).sum(-1).mT[..., None] + 1e-6
    after = vitkern.linear_attention(q, k, v, feature_map="elu1", rope=rope, backend=backend)
    agree(after, mixed(weights(a, b), v) / den, (q, k, v))
    a, b = (F.elu(rope.turn(t, None)) + 1 for t in (q, k))
    before = vitkern.linear_attention(q, k, v, feature_map="elu1", rope=rope, rope_order="before", backend=backend)
    scores = weights(a, b)
    agree(before, mixed(scores, v) / (scores.sum(-1).mT[..., None] + 1e-6), (q, k, v))


@ON
def test_tokens_that_do_not_turn(backend):
    """A class token in front stays; the angles repeat over what follows."""
    q, k, v = heads(n=13)
    angles = torch.randn(1, 6, 1, 4, dtype=torch.float64)
    rope = vitkern.Rope(angles.cos(), angles.sin(), "interleaved", (1, 13), (1, 13))
    a, b = (rope.turn(F.elu(t) + 1, (1, 13)) for t in (q, k))
    den = weights(F.elu(q) + 1, F.elu(k) + 1).sum(-1).mT[..., None] + 1e-6
    got = vitkern.linear_attention(q, k, v, feature_map="elu1", rope=rope, backend=backend)
    agree(got, mixed(weights(a, b), v) / den, (q, k, v))


@ON
def test_small_values_survive_float16_at_65536_tokens(backend):
    q, k = (torch.randn(1, 65536, 1, 8).half() for _ in "qk")
    v = torch.full((1, 65536, 1, 8), 1.5e-3).half()
    out = vitkern.linear_attention(q, k, v, preset="mlla", backend=backend)
    assert_close_to_oracle("out", out, v.double(), v)


@ON
def test_the_largest_key_may_stand_last(backend):
    q, k, v = (t.detach().float() for t in heads(n=2000))
    k[:, -1] = 80.0
    got = vitkern.linear_attention(q, k, v, preset="efficient_attention", backend=backend)
    exact = mixed(weights(q.double().softmax(-1), k.double().softmax(1)), v.double())
    assert_close_to_oracle("out", got, exact, mixed(weights(q.softmax(-1), k.softmax(1)), v))


@ON
def test_every_window_has_its_own_sums(backend):
    q, k, v = (t.unflatten(1, (6, 10)) for t in heads(n=60))

    def cut(x):
        return x.unflatten(2, (2, 5)).unflatten(1, (2, 3)).transpose(2, 3).flatten(3, 4).flatten(0, 2)

    whole = vitkern.linear_attention(q, k, v, window_size=(3, 5), normalizer="mean", backend=backend)
    parts = vitkern.linear_attention(cut(q), cut(k), cut(v), normalizer="mean", backend=backend)
    torch.testing.assert_close(cut(whole), parts)


@ON
def test_overflow_of_an_unnormalised_sum_is_honest(backend):
    q = torch.full((1, 4096, 1, 8), 4.0).half()
    out = vitkern.linear_attention(q, q, q, normalizer="none", backend=backend)
    assert out.isposinf().all()


def turned(n):
    return vitkern.Rope(torch.ones(1, n, 1, 2), torch.zeros(1, n, 1, 2))


@pytest.mark.parametrize(
    ("shape", "options", "pairs"),
    [
        ((7, 7, 1), {}, True),
        ((8, 8, 1), {}, False),  # as many products as by a state
        ((3, 7, 2), {}, True),
        ((5, 7, 2), {}, False),  # two heads of q for each of k: ten queries
        ((1, 256, 1), {}, True),
        ((1, 257, 1), {}, False),
        ((5, 5, 1), {"feature_map": "softmax"}, False),
        ((5, 5, 1), {"rope": turned(5)}, False),
        ((5, 5, 1), {"rope": turned(5), "rope_order": "before"}, True),
        ((30, 30, 1), {"window_size": 5}, True),
    ],
)
def test_the_shape_chooses_the_order_of_the_sums(shape, options, pairs):
    queries, keys, group = shape
    q, k = torch.randn(2, queries, group, 8), torch.randn(2, keys, 1, 8)
    assert _linear_pairs.chosen(lower(q, k, k, **options)[0], None) is pairs


@ON
@pytest.mark.parametrize("normalizer", ["sum", "mean", "none", "max", "abs_max", "subtract"])
def test_both_orders_of_the_sums_give_the_same(backend, normalizer):
    q, k, v = heads(n=7)
    options = {"feature_map": "elu1", "normalizer": normalizer, "offset": 0.5, "backend": backend}
    by_state, _ = vitkern.linear_attention(q, k, v, return_state=True, **options)
    by_pairs = vitkern.linear_attention(q, k, v, **options)
    torch.testing.assert_close(by_pairs, by_state)
    weight = torch.randn_like(v)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (by_pairs, by_state)), strict=True):
        torch.testing.assert_close(a, b)


@ON
@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_no_queries_or_no_keys(backend, queries, keys):
    q, k = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (queries, keys))
    out = vitkern.linear_attention(q, k, k, normalizer="subtract", backend=backend)
    assert out.shape == q.shape and (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k)))


def test_a_graph_for_any_number_of_tokens_is_compiled_once():
    """Few tokens take the state there; a graph for few tokens alone does not."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(_Twice(), backend=counter, fullgraph=True, dynamic=True)
    compiled(torch.randn(2, 5, 2, 8))
    once = counter.frame_count
    for n in (20, 7, 300):
        q = torch.randn(2, n, 2, 8)
        torch.testing.assert_close(compiled(q), _Twice()(q))
    assert counter.frame_count == once
    torch._dynamo.reset()
    q = torch.randn(2, 5, 2, 8)
    program = torch.export.export(_Twice(), (q,), strict=False)
    call = next(n for n in program.graph.nodes if "linear_attention" in str(n.target))
    assert call.args[22] is True
    tokens = torch.export.Dim("tokens", min=2, max=500)
    program = torch.export.export(_Twice(), (q,), dynamic_shapes=({1: tokens},), strict=False)
    torch.testing.assert_close(program.module()(q), _Twice()(q))


def test_peak_memory_is_linear_in_the_tokens():
    """The output is all that grows; the sums of a part do not."""
    setup = "q = torch.randn(1, 65536, 4, 32)\nvitkern.linear_attention(q[:, :256], q[:, :256], q[:, :256])"
    assert grown(setup, "vitkern.linear_attention(q, q, q)") < 65536 * 4 * 32 * 4 + (16 << 20)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"preset": "swin"}, ValueError, "preset must be one of efficientvit, timm, .*, got 'swin'"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of 'relu', .* or an object .* got 'gelu'"),
        ({"feature_map": 3}, TypeError, "feature_map must be a name or an object of vitkern.feature_map, got int"),
        ({"preset": "flatten"}, ValueError, r"preset='flatten' needs feature_map=vitkern.feature_map.Focused\(...\)"),
        (
            {"feature_map": maps.Focused(torch.ones(5))},
            ValueError,
            r"scale of Focused must have H D = 24 elements, got \[5\]",
        ),
        (
            {"preset": "hedgehog_exp", "feature_map": maps.Hedgehog(torch.ones(3, 8, 8))},
            ValueError,
            r"needs Hedgehog\(form='exp'\), got 'joint'",
        ),
        (
            {"feature_map": maps.Hedgehog(torch.ones(3, 8, 8), form="sum")},
            ValueError,
            r"form of Hedgehog must be one of \('joint', 'split', 'exp'\), got 'sum'",
        ),
        (
            {"feature_map": maps.Focused(torch.ones(24), norm="token")},
            ValueError,
            r"norm of Focused must be one of \('width', 'head'\), got 'token'",
        ),
        (
            {"feature_map": maps.Favor(torch.ones(2, 8)), "rope": vitkern.Rope(*torch.ones(2, 1, 35, 1, 2))},
            ValueError,
            "rope turns at most the 2 features of the map, got 4",
        ),
        ({"feature_map": maps.Focused(3.0)}, TypeError, "feature_map Focused.scale must be a tensor, got float"),
        ({"lepe": 3}, TypeError, "linear_attention: lepe must be a vitkern.DepthwiseValue or None, got int"),
        ({"normalizer": "softmax"}, ValueError, "normalizer must be one of 'sum', .* got 'softmax'"),
        ({"key_mask": torch.ones(2, 35)}, TypeError, "key_mask must be bool, .* got torch.float32"),
        (
            {"key_mask": torch.ones(2, 34, dtype=torch.bool)},
            ValueError,
            r"key_mask must have shape .* = \[2, 35\], got \[2, 34\]",
        ),
        ({"key_weight": torch.ones(2, 35)}, ValueError, r"key_weight must have the shape of k without channels"),
        ({"window_size": (3, 3)}, ValueError, "window_size must be an int or have one entry per map axis"),
        ({"window_size": 4}, ValueError, r"window_size must divide the map, \[35\], got 4"),
        ({"rope_order": "never"}, ValueError, "rope_order must be 'before' or 'after', got 'never'"),
        ({"rope": torch.ones(3)}, TypeError, "rope must be a vitkern.Rope, got Tensor"),
        (
            {"rope": vitkern.Rope(torch.ones(1, 35, 1, 5), torch.ones(1, 35, 1, 5))},
            ValueError,
            "rope turns 10 channels, q has 8",
        ),
        (
            {"rope": vitkern.Rope(torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 2))},
            ValueError,
            "rope must have angles for the tokens 0 to 35",
        ),
        ({"eps": math.inf}, ValueError, "eps must be finite, got inf"),
        ({"scale": torch.ones(1)}, TypeError, "scale must be a float"),
        (
            {"cu_seqlens_k": torch.tensor([0, 35], dtype=torch.int32)},
            ValueError,
            "cu_seqlens_k must go with cu_seqlens",
        ),
        ({"backend": "triton"}, ValueError, "backend='triton' cannot run this call"),
    ],
)
def test_refusals_are_sentences(options, error, text):
    q, k, v = (t.detach().float() for t in heads())
    with pytest.raises(error, match=text):
        vitkern.linear_attention(q, k, v, **options)


def test_bounds_of_packed_sequences_are_checked():
    q = torch.randn(10, 2, 4)
    for bounds, text in (([0, 6, 4, 10], "must ascend"), ([0, 4, 9], "must ascend from 0 to the 10 tokens")):
        with pytest.raises(ValueError, match=text):
            vitkern.linear_attention(q, q, q, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32 \[sequences \+ 1\], got torch.int64"):
        vitkern.linear_attention(q, q, q, cu_seqlens=torch.tensor([0, 10]))


def test_packed_lengths_of_hashed_and_random_features_are_their_own():
    """Maps that look at all tokens of a sequence see that sequence alone."""
    q = torch.randn(71, 2, 8, dtype=torch.float64)
    cu = torch.tensor([0, 1, 8, 71], dtype=torch.int32)
    favor = maps.Favor(torch.randn(12, 8, dtype=torch.float64))
    got = vitkern.linear_attention(q, q, q, feature_map=favor, cu_seqlens=cu)
    parts = [vitkern.linear_attention(*(q[None, i:j],) * 3, feature_map=favor)[0] for i, j in ((0, 1), (1, 8), (8, 71))]
    torch.testing.assert_close(got, torch.cat(parts))


class _Twice(nn.Module):
    def forward(self, q):
        return vitkern.linear_attention(q, q, q, preset="slab")


def test_compiles_and_names_its_back_end():
    q = torch.randn(2, 20, 2, 8)
    compiled = torch.compile(_Twice(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), _Twice()(q))
    assert "linear_attention runs on: cpu" in vitkern.explain(vitkern.linear_attention, q, q, q, preset="slab")
