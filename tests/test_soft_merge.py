"""soft_merge: published modules, edges and refusals. What every op must do is in tests/test_ops.py."""

import math

import pytest
import torch
from agreement import agree
from torch import nn

import vitkern
from vitkern import testing
from vitkern.testing.soft_merge import KINDS

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
F = torch.nn.functional


def tokens(batch=2, n=49, c=24):
    return torch.randn(batch, n, c, dtype=torch.float64, requires_grad=True)


@ON
def test_patch_merger(backend):
    """softmax(Q LN(x)ᵀ / √C) LN(x): attention of M learned queries, which torch has."""
    x, queries = tokens(), torch.randn(8, 24, dtype=torch.float64, requires_grad=True)
    values = F.layer_norm(x, (24,))
    want = F.scaled_dot_product_attention(queries.expand(2, -1, -1), values, values)
    got = vitkern.soft_merge(values, (queries @ values.mT).mT, scale=24**-0.5, backend=backend)
    agree(got, want, (x, queries))


@ON
def test_token_learner_1_1(backend):
    """Softmax over the tokens of MLP(LN(x)), one map a slot, times x."""
    x = tokens()
    mlp = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8)).double()
    selected = mlp(x).transpose(1, 2)  # [B, M, N]
    want = torch.einsum("bmn,bnc->bmc", selected.softmax(-1), x)
    agree(vitkern.soft_merge(x, mlp(x), backend=backend), want, (x, *mlp.parameters()))


@ON
@pytest.mark.parametrize("mean", [False, True])
def test_token_learner_1(backend, mean):
    """Sigmoid gates of a convolution, the gated map summed (or averaged) over its pixels."""
    x = torch.randn(2, 24, 7, 7, dtype=torch.float64, requires_grad=True)
    conv = nn.Conv2d(24, 8, 3, padding=1).double()
    gates = conv(x).sigmoid()
    gated = gates[:, :, None] * x[:, None]  # [B, M, C, H, W]
    want = gated.mean((-2, -1)) if mean else gated.sum((-2, -1))
    got = vitkern.soft_merge(x.flatten(2).mT, conv(x).flatten(2).mT, normalize="sigmoid", backend=backend)
    agree(got / 49 if mean else got, want, (x, *conv.parameters()))


@ON
def test_token_transforming_and_linformer(backend):
    """A learned matrix, or the softmax of one, from N to M tokens; several channel axes at once."""
    x, matrix = torch.randn(2, 49, 3, 8, dtype=torch.float64, requires_grad=True), torch.randn(10, 49).double()
    matrix.requires_grad_()
    expanded = matrix.mT.expand(2, -1, -1)
    want = torch.einsum("mn,bnhd->bmhd", matrix, x)
    agree(vitkern.soft_merge(x, expanded, normalize="none", backend=backend), want, (x, matrix))
    want = torch.einsum("mn,bnhd->bmhd", matrix.softmax(-1), x)
    agree(vitkern.soft_merge(x, expanded, backend=backend), want, (x, matrix))


@ON
def test_slot_attention_and_toma(backend):
    """Tokens choose among slots; a slot is the mean of those that chose it. At 1000 cos the choice is nearly hard."""
    x, slots = tokens(), torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)
    logits = x @ slots.mT * 24**-0.5
    attention = logits.softmax(-1)
    want = (attention / attention.sum(1, keepdim=True)).mT @ x
    got = vitkern.soft_merge(x, x @ slots.mT, axis="slot", scale=24**-0.5, renormalize=1e-8, backend=backend)
    torch.testing.assert_close(got, want)
    hard = 1000 * F.cosine_similarity(x[:, :, None], slots[:, None], dim=-1)
    weights = hard.softmax(-1)
    want = (weights / weights.sum(1, keepdim=True).clamp(min=1e-6)).mT @ x
    agree(vitkern.soft_merge(x, hard, axis="slot", renormalize=1e-6, backend=backend), want, (x, slots))


@ON
def test_mobilevit_v2_and_swiftformer(backend):
    """One score a token: its softmax, or its direction, weighs the sum."""
    x, score = tokens(), torch.randn(2, 49, 1, dtype=torch.float64, requires_grad=True)
    agree(vitkern.soft_merge(x, score, backend=backend), (score.softmax(1) * x).sum(1, keepdim=True), (x, score))
    got = vitkern.soft_merge(x, score, normalize="l2", backend=backend)
    agree(got, (F.normalize(score, dim=1) * x).sum(1, keepdim=True), (x, score))


def sinkhorn(cost, eps, iters):
    """The published iteration on [B, M, N]: potentials of both sides against uniform measures of mass 1 a row."""
    u, v = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    for _ in range(iters):
        u = -torch.logsumexp(cost / eps + v[:, None], 2)
        v = -torch.logsumexp(cost / eps + u[:, :, None], 1)
    return (cost / eps + u[:, :, None] + v[:, None]).exp()


@ON
@pytest.mark.parametrize("iters, eps", [(1, 1.0), (3, 1.0), (6, 0.3)])
def test_sinkhorn_ends_on_the_token_marginal(backend, iters, eps):
    x, cost = tokens(), torch.randn(2, 8, 49, dtype=torch.float64, requires_grad=True)
    weights = sinkhorn(cost, eps, iters)
    options = {"normalize": "sinkhorn", "eps": eps, "iters": iters, "backend": backend}
    agree(vitkern.soft_merge(x, cost.mT, **options), weights @ x, (x, cost))
    ones = torch.ones(2, 49, 1, dtype=torch.float64)
    mass = vitkern.soft_merge(ones, cost.mT, **options)
    torch.testing.assert_close(mass.sum(1), torch.full((2, 1), 49.0).double())  # a token's weights sum to 1
    spread = vitkern.soft_merge(torch.eye(49).double().expand(2, -1, -1), cost.mT, **options)
    torch.testing.assert_close(spread.sum(1), torch.ones(2, 49).double())
    settled = vitkern.soft_merge(ones, cost.mT, **options | {"iters": 500})
    torch.testing.assert_close(settled, torch.full_like(settled, 49 / 8))  # a slot holds N / M: a sum and not a mean


@ON
def test_sizes_as_weights_are_repeated_tokens(backend):
    x, logits = tokens(1, 5), torch.randn(1, 5, 3, dtype=torch.float64)
    counts = torch.tensor([3, 1, 2, 0, 4])
    got = vitkern.soft_merge(x, logits, weight=counts[None].double(), backend=backend)
    many = [t.detach().repeat_interleave(counts, 1) for t in (x, logits)]
    torch.testing.assert_close(got, vitkern.soft_merge(*many, backend=backend))


@ON
@pytest.mark.parametrize("axis, normalize", KINDS)
@pytest.mark.parametrize(
    "renormalize, slots, across", [(None, 5, False), (1e-6, 5, False), (1e-6, 1, False), (None, 1, True)]
)
def test_masked_tokens_are_as_if_they_were_not_there(backend, axis, normalize, renormalize, slots, across):
    x, logits = tokens(2, 70, 9), torch.randn(2, 70, slots, dtype=torch.float64).abs().requires_grad_()
    mask = torch.rand(2, 70) < 0.6
    bad = [torch.where(mask[..., None], t, torch.nan) for t in (x, logits)]
    if across:
        bad[0] = bad[0].mT.contiguous().mT
    options = {"axis": axis, "normalize": normalize, "renormalize": renormalize, "backend": backend}
    got = vitkern.soft_merge(*bad, mask=mask, **options)
    alone = [vitkern.soft_merge(x[b : b + 1, mask[b]], logits[b : b + 1, mask[b]], **options) for b in range(2)]
    agree(got, torch.cat(alone), (x, logits))
    leaves = [t.detach().requires_grad_() for t in bad]
    nothing = vitkern.soft_merge(*leaves, mask=mask & False, **options)
    assert nothing.eq(0).all() and all(g.eq(0).all() for g in torch.autograd.grad(nothing.sum(), leaves))


@ON
def test_minus_infinity_hides_a_token_from_a_slot(backend):
    x, logits = tokens(1, 6), torch.randn(1, 6, 3, dtype=torch.float64)
    logits[0, 2, 1] = -torch.inf
    logits[0, :, 2] = -torch.inf
    logits.requires_grad_()
    for options in ({}, {"normalize": "sinkhorn"}, {"axis": "slot"}):
        y = vitkern.soft_merge(x, logits, backend=backend, **options)
        dx, dlogits = torch.autograd.grad(y.square().sum(), (x, logits))
        assert y[0, 2].eq(0).all() and y[0, :2].ne(0).any(-1).all()
        assert (
            dx.isfinite().all() and dlogits[0, 2, 1] == 0 and dlogits[0, :, 2].eq(0).all() and dlogits.isfinite().all()
        )


@ON
def test_half_precision_is_rounded_once(backend):
    """A bfloat16 sum of 4096 ones would stop at 256, exp(20) overflows float16, and large logits do no harm."""
    x, logits = torch.ones(1, 4096, 3, dtype=torch.bfloat16), torch.zeros(1, 4096, 2, dtype=torch.bfloat16)
    assert vitkern.soft_merge(x, logits + 1, normalize="none", backend=backend).eq(4096).all()
    assert vitkern.soft_merge(x, logits, backend=backend).eq(1).all()
    steep = torch.tensor([[[3e4], [2.9e4]]], dtype=torch.float16)
    rows = torch.tensor([[[2.0], [3.0]]], dtype=torch.float16)
    assert vitkern.soft_merge(rows, steep, backend=backend).eq(2).all()
    mixed = vitkern.soft_merge(x, logits.float(), backend=backend)
    assert mixed.dtype == torch.bfloat16


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_the_sums_of_the_weights_have_a_gradient_too():
    """The op's first output, which Python keeps to itself."""
    x, logits = tokens(2, 9, 5), torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    for normalize, renormalize in (("softmax", 0.0), ("sigmoid", 0.5), ("l2", 0.0), ("sinkhorn", 1e-6)):
        args = (x, logits, None, None, "token", normalize, 1.0, renormalize, 1.0, 2)
        found = []
        for run in (torch.ops.vitkern.soft_merge, vitkern.ops.soft_merge.definition):
            total, y = run(*args, "")
            found.append((total, y, *torch.autograd.grad((total * total.detach()).sum() + y.sum(), (x, logits))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_a_float64_reference_of_every_branch_agrees_with_a_plain_softmax():
    x, logits = tokens(), torch.randn(2, 49, 5, dtype=torch.float64)
    torch.testing.assert_close(vitkern.soft_merge(x, logits, backend="reference"), logits.softmax(1).mT @ x)
    torch.testing.assert_close(
        vitkern.soft_merge(x, logits, axis="slot", backend="reference"), logits.softmax(2).mT @ x
    )


X, L = torch.randn(2, 6, 4), torch.randn(2, 6, 3)


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (lambda: vitkern.soft_merge(X, L[:, :5]), ValueError, r"logits must have shape \[B, N, M\] = \[2, 6, 'M'\]"),
        (lambda: vitkern.soft_merge(X, L[..., 0]), ValueError, "logits must have shape"),
        (lambda: vitkern.soft_merge(X, L[..., :0]), ValueError, "logits must have at least one slot"),
        (lambda: vitkern.soft_merge(X[:, :0], L[:, :0]), ValueError, "x must have at least one token"),
        (lambda: vitkern.soft_merge(X, L.int()), TypeError, "logits must be float32, float64, bfloat16 or float16"),
        (lambda: vitkern.soft_merge(X[0, 0], L), ValueError, r"x must have shape \[B, N, ...\], got \[4\]"),
        (
            lambda: vitkern.soft_merge(X, L.to("meta")),
            ValueError,
            r"logits must be on the device of x \(cpu\), got meta",
        ),
        (lambda: vitkern.soft_merge(X, L, axis="row"), ValueError, "axis must be 'token' or 'slot', got 'row'"),
        (
            lambda: vitkern.soft_merge(X, L, normalize="l1"),
            ValueError,
            "normalize must be 'softmax', 'sigmoid', 'none'",
        ),
        (lambda: vitkern.soft_merge(X, L, axis="slot", normalize="l2"), ValueError, "axis must be 'token' with"),
        (lambda: vitkern.soft_merge(X, L, scale="big"), TypeError, "scale must be a float, got 'big'"),
        (lambda: vitkern.soft_merge(X, L, scale=math.nan), ValueError, "scale must be finite, got nan"),
        (
            lambda: vitkern.soft_merge(X, L, renormalize=0.0),
            ValueError,
            "renormalize must be positive and finite, got 0.0",
        ),
        (lambda: vitkern.soft_merge(X, L, eps=-1.0), ValueError, "eps must be positive and finite, got -1.0"),
        (lambda: vitkern.soft_merge(X, L, iters=0), ValueError, "iters must be at least 1, got 0"),
        (lambda: vitkern.soft_merge(X, L, weight=X), ValueError, r"weight must have shape \[B, N\] = \[2, 6\]"),
        (
            lambda: vitkern.soft_merge(X, L, weight=X[..., 0], axis="slot"),
            ValueError,
            "weight must go with axis='token'",
        ),
        (lambda: vitkern.soft_merge(X, L, mask=X[..., 0]), TypeError, "mask must be bool, got torch.float32"),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
