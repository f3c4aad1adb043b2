"""channel_attention: published modules, edges and refusals. What every op must do is in tests/test_ops.py."""

import math

import libraries  # noqa: F401
import pytest
import torch
from agreement import agree

import vitkern
from vitkern import testing
from vitkern.testing.oracle import assert_close_to_oracle

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
F = torch.nn.functional


def tokens(*shape):
    generator = torch.Generator().manual_seed(len(shape))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))


def restormer(q, k, v, temperature):
    """MDTA between its projections: [B, H, C, N] normalised over the pixels."""
    q, k, v = (t.movedim(1, -1) for t in (q, k, v))
    p = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * temperature
    return (p.softmax(-1) @ v).movedim(-1, 1)


@ON
@pytest.mark.parametrize("fused", [False, True])
def test_xca_of_timm(backend, fused):
    xcit = pytest.importorskip("timm.models.xcit")
    module = xcit.XCA(24, 3, qkv_bias=True).double()
    module.fused_attn = fused  # trap 27: the temperature goes into q there
    torch.nn.init.uniform_(module.temperature, 0.5, 2.0)
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
    got = module.proj(vitkern.channel_attention(q, k, v, temperature=module.temperature, backend=backend).flatten(2))
    agree(got, module(x), (x, *module.parameters()))


@ON
def test_cross_covariance_of_edgenext(backend):
    module = pytest.importorskip("timm.models.edgenext").CrossCovarianceAttn(24, 4, qkv_bias=True).double()
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = module.qkv(x).unflatten(-1, (3, 4, 6)).unbind(2)
    got = module.proj(vitkern.channel_attention(q, k, v, temperature=module.temperature, backend=backend).flatten(2))
    agree(got, module(x), (x, *module.parameters()))


@ON
def test_davit_of_timm(backend):
    davit = pytest.importorskip("timm.models.davit")
    x = torch.randn(2, 17, 24, dtype=torch.float64, requires_grad=True)
    module = davit.ChannelAttention(24, 3).double()
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
    out = vitkern.channel_attention(k, v, q, normalize=False, scale=8**-0.5, backend=backend)
    agree(module.proj(out.flatten(2)), module(x), (x, *module.parameters()))
    for dynamic in (True, False):
        module = davit.ChannelAttentionV2(24, 3, dynamic_scale=dynamic).double()
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 8)).unbind(2)
        scale = 17**-0.5 if dynamic else 8**-0.5
        out = vitkern.channel_attention(q, k, v, normalize=False, scale=scale, backend=backend)
        agree(module.proj(out.flatten(2)), module(x), (x, *module.parameters()))


@ON
@pytest.mark.parametrize("first", [False, True])
def test_restormer_on_channel_first_maps(backend, first):
    """The output lies as q does: a convolution behind it copies nothing, nor does the one before it in the backward."""
    shape = (2, 2, 12, 5, 7) if first else (2, 5, 7, 2, 12)
    leaves = tokens(*shape)
    q, k, v = (t.movedim((1, 2), (-2, -1)) if first else t for t in leaves)
    temperature = torch.rand(2, 1, 1, dtype=torch.float64).requires_grad_()
    got = vitkern.channel_attention(q, k, v, temperature=temperature, backend=backend)
    want = restormer(*(t.flatten(1, 2) for t in (q, k, v)), temperature).unflatten(1, (5, 7))
    agree(got, want, (*leaves, temperature))
    assert (got.movedim((-2, -1), (1, 2)) if first else got).is_contiguous()


@ON
def test_drsformer_mixes_top_k_softmaxes(backend):
    q, k, v = tokens(2, 15, 2, 12)
    weight = torch.rand(4, dtype=torch.float64).requires_grad_()
    kept = (6, 8, 9, 9)
    got = vitkern.channel_attention(q, k, v, topk=kept, topk_weight=weight, backend=backend)
    logits = F.normalize(q, dim=1).movedim(1, -1) @ F.normalize(k, dim=1).movedim(1, -1).mT
    want = 0
    for count, w in zip(kept, weight, strict=True):
        hidden = torch.full_like(logits, -math.inf)
        index = logits.topk(count, -1).indices
        want = want + w * (hidden.scatter(-1, index, logits.gather(-1, index)).softmax(-1) @ v.movedim(1, -1))
    agree(got, want.movedim(-1, 1), (q, k, v, weight))


@ON
def test_ties_of_top_k_go_to_the_first_channels(backend):
    q, _, v = (t.detach() for t in tokens(1, 9, 1, 6))
    k = q[..., :1].expand(-1, -1, -1, 6)
    out = vitkern.channel_attention(q, k, v, topk=2, backend=backend)
    torch.testing.assert_close(out, v[..., :2].mean(-1, keepdim=True).expand_as(out))


@ON
def test_hit_sr_in_windows_and_dlgsanet(backend):
    x, y, _ = tokens(2, 8, 12, 1, 6)
    got = vitkern.channel_attention(
        x, y, y, normalize=False, normalizer="none", scale=1 / 16, window_size=4, backend=backend
    )
    q, v = (t.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3).flatten(1, 2).flatten(2, 3) for t in (x, y))
    want = (v[..., 0, :] @ ((q[..., 0, :].mT @ v[..., 0, :]) / 16).mT)[..., None, :]
    want = want.unflatten(2, (4, 4)).unflatten(1, (2, 3)).transpose(2, 3).flatten(1, 2).flatten(2, 3)
    agree(got, want, (x, y))
    relu = vitkern.channel_attention(x, y, y, normalizer="relu", backend=backend)
    q, k = (F.normalize(t.flatten(1, 3), dim=1) for t in (x, y))
    agree(relu.flatten(1, 3), y.flatten(1, 3) @ (q.mT @ k).relu().mT, (x, y))


@ON
def test_histoformer_counts_bins_along_an_order(backend):
    q, k, v = tokens(2, 12, 2, 6)
    order = v.detach().sum((-1, -2)).argsort(1)
    options = {"normalizer": "plus1", "backend": backend}
    got = vitkern.channel_attention(q, k, v, order=order.int(), window_size=4, **options)
    rows = torch.arange(2)[:, None]
    back = order.argsort(1)
    q4, k4, v4 = (t[rows, order].unflatten(1, (3, 4)).transpose(2, 3) for t in (q, k, v))
    e = (F.normalize(q4, dim=3).mT @ F.normalize(k4, dim=3)).exp()
    want = v4 @ (e / (e.sum(-1, keepdim=True) + 1)).mT
    agree(got, want.transpose(2, 3).flatten(1, 2)[rows, back], (q, k, v))


@ON
def test_plus1_does_not_overflow(backend):
    q, k, v = (t.detach() for t in tokens(1, 9, 1, 4))
    for scale in (300.0, -300.0):
        out = vitkern.channel_attention(
            q.float(), k.float(), v.float(), normalizer="plus1", scale=scale, backend=backend
        )
        assert out.isfinite().all()
    none = vitkern.channel_attention(-q.abs(), q.abs(), v, normalizer="plus1", scale=1e4, backend=backend)
    assert none.eq(0).all()  # every logit is far below 0, the one that is added


@ON
def test_packed_sequences_are_separate_calls(backend):
    lengths = (5, 0, 1, 1200, 3)
    total = sum(lengths)
    q, k, v = tokens(total, 2, 6)
    cu = torch.tensor((0, *lengths)).cumsum(0).int()
    got = vitkern.channel_attention(q, k, v, cu_seqlens=cu, backend=backend)
    parts = [
        vitkern.channel_attention(*(t[None, a:b] for t in (q, k, v)), backend=backend)[0]
        for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)
    ]
    agree(got, torch.cat(parts), (q, k, v))


@ON
@pytest.mark.parametrize("window", [None, 3, (2, 5)])
def test_masked_tokens_are_as_if_they_were_not_there(backend, window):
    """NaN among them never leaks, not even into gradients."""
    q, k, v = tokens(2, 5, 9, 2, 6)
    mask = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    bad = [torch.where(mask[..., None, None], t, torch.nan) for t in (q, k, v)]
    zero = [torch.where(mask[..., None, None], t, 0.0) for t in (q, k, v)]
    got = vitkern.channel_attention(*bad, key_mask=mask, window_size=window, backend=backend)
    want = vitkern.channel_attention(*zero, window_size=window, backend="reference")
    agree(got, want, (q, k, v))
    leaves = [t.detach().requires_grad_() for t in bad]
    out = vitkern.channel_attention(*leaves, key_mask=mask, window_size=window, backend=backend)
    assert all(g[~mask].eq(0).all() for g in torch.autograd.grad(out.square().sum(), leaves))
    if window is None:
        alone = [restormer(*(t[b : b + 1, mask[b]] for t in (q, k, v)), torch.ones(2, 1, 1).double()) for b in range(2)]
        torch.testing.assert_close(torch.cat([got[b, mask[b]] for b in range(2)]), torch.cat([a[0] for a in alone]))


@ON
def test_zero_channels_and_one_token(backend):
    """Trap 25: eps clamps the norm; a zero channel gives a uniform row and gradients that are finite."""
    q, k, v = (t.detach().clone() for t in tokens(1, 7, 1, 4))
    q[..., 1] = 0
    k[..., 2] = 0
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = vitkern.channel_attention(*leaves, backend=backend)
    torch.testing.assert_close(out[..., 1], v.mean(-1))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), leaves))
    one = [t[:, :1] for t in (q, k, v)]
    got = vitkern.channel_attention(*one, eps=0.5, backend=backend)
    clamped = [t / t.abs().clamp(min=0.5) for t in one[:2]]
    agree(got, v[:, :1] @ (clamped[0].mT @ clamped[1]).softmax(-1).mT, leaves)


@ON
def test_float16_sums_of_squares_do_not_overflow(backend):
    """Trap 26: |q| = 30 at 16 384 tokens is 1.5e7 before the root."""
    q, k, v = (t.detach().half() * 0 + s for t, s in zip(tokens(1, 16384, 1, 8), (30, -30, 1), strict=True))
    v = v * torch.arange(1, 9).half()
    out = vitkern.channel_attention(q, k, v, backend=backend)
    assert out.dtype == torch.float16 and out.eq(4.5).all()


def test_the_saved_outputs_have_gradients_too():
    """Those of the op that Python keeps to itself."""
    q, k, v = (t[:, None] for t in tokens(2, 9, 2, 5))
    args = (q, k, v, None, None, None, None, None, True, "softmax", [], [1, 4], 1.0, 1e-12)
    found = []
    for run in (torch.ops.vitkern.channel_attention, vitkern.ops.channel_attention.definition):
        out, gram, squares = run(*args, "")
        loss = out.square().sum() + gram.sin().sum() + squares.sqrt().sum()
        found.append((out, gram, squares, *torch.autograd.grad(loss, (q, k, v))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("tokens_", [4096, 65537])
def test_many_tokens_are_as_exact_as_eager(tokens_, backend):
    g = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, tokens_, 1, 16, generator=g) + 1 for _ in range(3))
    exact = restormer(q.double(), k.double(), v.double(), 1.0)
    got = vitkern.channel_attention(q, k, v, backend=backend)
    assert_close_to_oracle("out", got, exact, restormer(q, k, v, 1.0))


@ON
@pytest.mark.parametrize("width", [6, 100])
def test_heads_that_share_keys_and_values(backend, width):
    q, k, v, heat = (
        torch.randn(s, dtype=torch.float64) for s in ((2, 40, 6, width), (2, 40, 2, 5), (2, 40, 2, 5), (6,))
    )
    given = [t.requires_grad_() for t in (q, k, v, heat)]
    got = vitkern.channel_attention(q, k, v, temperature=heat, backend=backend)
    a, b = F.normalize(q, dim=1), F.normalize(k, dim=1).repeat_interleave(3, 2)
    p = (torch.einsum("bnhd,bnhe->bhde", a, b) * heat[:, None, None]).softmax(-1)
    agree(got, torch.einsum("bhde,bnhe->bnhd", p, v.repeat_interleave(3, 2)), given)


def test_nothing_and_an_empty_batch():
    for shape in ((0, 4, 2, 3), (2, 0, 2, 3), (2, 0, 5, 2, 3)):
        x = torch.randn(shape, requires_grad=True)
        out = vitkern.channel_attention(x, x, x)
        out.sum().backward()
        assert out.shape == x.shape and x.grad.shape == x.shape
    x = torch.randn(0, 2, 3)
    assert vitkern.channel_attention(x, x, x, cu_seqlens=torch.zeros(4, dtype=torch.int32)).shape == x.shape


X = torch.randn(2, 6, 2, 4)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "changed, kind, sentence",
    [
        ({"q": X[0, 0]}, ValueError, r"q must have shape \[B, N, H, D\] or \[B, Hs, Ws, H, D\], got \[2, 4\]"),
        ({"k": X[:, :5]}, ValueError, r"k must have the tokens of q, \[2, 6\], got \[2, 5, 2, 4\]"),
        ({"v": X[:, :, :1]}, ValueError, r"a number that divides those of q \(2\), got 2 and 1"),
        ({"k": X.repeat(1, 1, 2, 1), "v": X.repeat(1, 1, 2, 1)}, ValueError, r"divides those of q \(2\), got 4 and 4"),
        ({"v": X[..., :3]}, ValueError, r"v must have the head size of k \(4\), got 3"),
        ({"k": X.double()}, TypeError, "k must have the dtype of q"),
        ({"q": X.int(), "k": X.int(), "v": X.int()}, TypeError, "q must be float32, float64, bfloat16 or float16"),
        ({"v": X.to("meta")}, ValueError, r"v must be on the device of q \(cpu\), got meta"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \[H\] or \[H, 1, 1\] = \[2, 1, 1\]"),
        ({"normalize": 1}, TypeError, "normalize must be a bool, got 1"),
        ({"normalizer": "tanh"}, ValueError, "normalizer must be 'softmax', 'relu', 'none' or 'plus1', got 'tanh'"),
        ({"topk": 5}, ValueError, r"topk must lie in \[1, E\] = \[1, 4\], got 5"),
        ({"topk": 2.0}, TypeError, "topk must be an int or a tuple of ints, got 2.0"),
        ({"topk": (1, 2)}, ValueError, "topk must come with topk_weight"),
        ({"topk": (1, 2), "topk_weight": torch.ones(3)}, ValueError, r"topk_weight must have shape \[T\], one entry"),
        ({"topk_weight": torch.ones(1)}, ValueError, "topk_weight must have shape"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"key_mask": torch.ones(2, 6)}, TypeError, "key_mask must be bool, got torch.float32"),
        ({"key_mask": torch.ones(2, 5).bool()}, ValueError, r"key_mask must have shape .* = \[2, 6\], got \[2, 5\]"),
        ({"cu_seqlens": CU}, ValueError, r"q must have shape \[T, H, D\], got \[2, 6, 2, 4\]"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": (2, 3)}, ValueError, "window_size must be an int or have one entry per map axis"),
        ({"order": torch.zeros(6, dtype=torch.int32)}, ValueError, "order must be a permutation of the 6 tokens"),
        ({"order": torch.arange(6)}, TypeError, "order must be int32, got torch.int64"),
        ({"order": CU}, ValueError, r"order must have shape \[N\] or \[B, N\] = \[2, 6\]"),
    ],
)
def test_refusals_are_sentences(changed, kind, sentence):
    q, k, v = (changed.pop(name, X) for name in "qkv")
    with pytest.raises(kind, match=sentence):
        vitkern.channel_attention(q, k, v, **changed)


def test_refusals_of_packed_sequences():
    x = X[0]
    for cu, kind, sentence in (
        (CU.long(), TypeError, r"cu_seqlens must be int32 \[S \+ 1\]"),
        (CU - 1, ValueError, "cu_seqlens must ascend from 0 to the 6 tokens"),
    ):
        with pytest.raises(kind, match=sentence):
            vitkern.channel_attention(x, x, x, cu_seqlens=cu)
    with pytest.raises(ValueError, match="window_size must be None with cu_seqlens, got 2"):
        vitkern.channel_attention(x, x, x, cu_seqlens=CU, window_size=2)
