"""reconstruct_tokens: the published form, gradients by their formulas, edges and refusals. What every op must do is in
tests/test_ops.py."""

import pytest
import torch
from memory import grown

import vitkern
from vitkern import testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def published(y, x, centers, k, temperature, norm):
    """Liang et al. 2022 in plain PyTorch: all weights, a top-k mask with ties, rows divided by a norm of torch's."""
    weights = torch.exp(-temperature * torch.cdist(x, centers).square())
    kept = weights >= weights.topk(min(k, weights.shape[2]), dim=2).values[..., -1:]
    return torch.nn.functional.normalize(weights * kept, p={"l1": 1, "l2": 2}[norm], dim=2) @ y


@ON
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("k", [1, 4, 20, 100])
def test_the_published_reconstruction_and_its_gradients(backend, norm, k):
    y, x, c = (torch.randn(2, n, w, dtype=torch.float64, requires_grad=True) for n, w in ((30, 5), (50, 7), (30, 7)))
    got = vitkern.reconstruct_tokens(y, x, c, k=k, temperature=0.2, norm=norm, backend=backend)
    want = published(y, x, c, k, 0.2, norm)
    torch.testing.assert_close(got, want)
    up = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (y, x, c), up), torch.autograd.grad(want, (y, x, c), up), strict=True):
        torch.testing.assert_close(a, b)


@ON
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_rows_do_not_vanish_where_the_exponential_underflows(backend, spread):
    """exp(-0.01 d) is 0 in float32 for deviations of 3 in 768 channels; the published rows are 0 there."""
    x, c = torch.randn(1, 64, 768) * spread, torch.randn(1, 40, 768) * spread
    ones = torch.ones(1, 40, 1)
    plain = torch.exp(-0.01 * torch.cdist(x, c).square())
    l1 = vitkern.reconstruct_tokens(ones, x, c, backend=backend)
    l2 = vitkern.reconstruct_tokens(ones, x, c, norm="l2", backend=backend)
    torch.testing.assert_close(l1, torch.ones_like(l1))  # a convex combination
    assert (l2 >= 0.999).all() and (l2 <= 20**0.5 + 1e-3).all()
    if spread == 3.0:
        assert plain.eq(0).all()
    else:
        want = published(ones.double(), x.double(), c.double(), 20, 0.01, "l2")
        eager = vitkern.reconstruct_tokens(ones, x, c, norm="l2", backend="reference")
        testing.assert_close_to_oracle("l2", l2, want, eager)
        assert spread == 1.0 or 4.0 < float(l2.mean()) < 4.5  # the sums of unit rows: about the root of k


@ON
def test_all_ties_with_the_last_entry_stay(backend):
    x = torch.zeros(1, 3, 2)
    c = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 0.5]]])
    y = torch.eye(5)[None]
    rows = vitkern.reconstruct_tokens(y, x, c, k=2, temperature=0.5, backend=backend)[0]
    assert rows[0].gt(0).tolist() == [True, True, True, False, True]
    assert vitkern.reconstruct_tokens(y, x, c, k=2, temperature=0.0, backend=backend)[0].eq(0.2).all()


@ON
def test_the_gradient_of_a_clamped_distance_is_zero(backend):
    """Equal tokens and centres, whose distance rounds below 0: it counts 0, and so does what it pulls."""
    x = torch.randn(1, 6, 64).mul(30).requires_grad_()
    c = torch.cat((x.detach(), x.detach() + torch.randn(1, 6, 64)), 1).requires_grad_()
    y, go = torch.randn(1, 12, 4), torch.randn(1, 6, 4)
    found = []
    for dtype, where in ((torch.float32, backend), (torch.float64, "reference"), (torch.float32, "reference")):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (y, x, c)]
        out = vitkern.reconstruct_tokens(*leaves, k=5, temperature=0.02, backend=where)
        found.append(torch.autograd.grad(out, leaves, go.to(dtype)))
    for name, got, oracle, eager in zip(("dy", "dx", "dc"), *found, strict=True):
        assert oracle.abs().max() > 0
        testing.assert_close_to_oracle(name, got, oracle, eager, gradient=True)


@ON
def test_it_inverts_a_clustering_of_repeated_tokens(backend):
    tokens = torch.randn(1, 8, 16)
    x = tokens.repeat(1, 5, 1)
    centers, plan, _ = vitkern.cluster_tokens(x, 8, method="dpc_knn", backend=backend)
    y = vitkern.merge_tokens(x, plan, backend=backend)[0]
    back = vitkern.reconstruct_tokens(y, x, centers, k=1, backend=backend)
    torch.testing.assert_close(back, x)


def test_given_weights_are_a_product_summed_in_float32():
    y, weights = torch.randn(2, 30, 6).bfloat16().requires_grad_(), torch.rand(2, 50, 30, requires_grad=True)
    out = vitkern.reconstruct_tokens(y, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, torch.einsum("bnm,bmc->bnc", weights, y.float()).bfloat16())
    dy, dw = torch.autograd.grad(out.float().sum(), (y, weights))
    torch.testing.assert_close(dw, y.float().sum(-1)[:, None, :].expand(-1, 50, -1))
    assert dy.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", testing.backends())  # a library product may round differently for another batch
def test_a_sample_does_not_depend_on_its_batch(backend):
    y, x, c = torch.randn(4, 20, 8), torch.randn(4, 65, 16), torch.randn(4, 20, 16)
    whole = vitkern.reconstruct_tokens(y, x, c, k=5, backend=backend)
    for b in range(4):
        one = vitkern.reconstruct_tokens(y[b : b + 1], x[b : b + 1], c[b : b + 1], k=5, backend=backend)
        assert torch.equal(one[0], whole[b])


@pytest.mark.skipif("cpu" not in testing.backends(), reason="the CPU library is not built")
def test_memory_grows_with_the_tokens_and_not_with_their_square():
    setup = """
def both(tokens):
    y, c = (torch.randn(1, tokens // 4, 8, requires_grad=True) for _ in range(2))
    x = torch.randn(1, tokens, 8, requires_grad=True)
    vitkern.reconstruct_tokens(y, x, c, k=5).sum().backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()
both(100)
"""
    more = grown(setup, "both(16384)")
    assert more < 64e6, f"{more} bytes; a matrix would take {16384 * 4096 * 4}"


Y, X, C = torch.randn(2, 5, 4), torch.randn(2, 9, 3), torch.randn(2, 5, 3)


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        ((Y[0], X, C), {}, r"y must have shape \[B, rows, channels\] with the batch of y, got \[5, 4\]"),
        ((Y, X[:1], C), {}, r"x must have shape \[B, rows, channels\] with the batch of y, got \[1, 9, 3\]"),
        ((Y, X, C[:, :4]), {}, r"centers must have shape \[B, M, E\] of y and x = \[2, 5, 3\], got \[2, 4, 3\]"),
        ((Y, X, C.half()), {}, "centers must have the dtype of x"),
        ((Y.double(), X, C), {}, "x must be float64 exactly where y is"),
        ((Y.int(), X, C), {}, "y must be float32, float64, bfloat16 or float16, got torch.int32"),
        ((Y[:, :0], X, C[:, :0]), {}, r"y must have at least one cluster, got \[2, 0, 4\]"),
        ((Y, X, C), dict(k=0), "k must be at least 1, got 0"),
        ((Y, X, C), dict(k=1.5), "k must be an int, got 1.5"),
        ((Y, X, C), dict(temperature=-1.0), "temperature must be at least 0, got -1.0"),
        ((Y, X, C), dict(temperature="hot"), "temperature must be a float, got 'hot'"),
        ((Y, X, C), dict(norm="max"), "norm must be 'l1' or 'l2', got 'max'"),
        ((Y, X), {}, r"weights must have shape \[B, N, M\] with the M = 5 of y, got \[2, 9, 3\]"),
        ((Y, X, C), dict(backend="cuda"), "cuda: the tensors are on cpu"),
    ],
)
def test_refusals_are_sentences(args, options, sentence):
    with pytest.raises((ValueError, TypeError), match=f"reconstruct_tokens: .*{sentence}|{sentence}"):
        vitkern.reconstruct_tokens(*args, **options)


def test_explain_names_the_back_end():
    assert "triton: the tensors are on cpu" in vitkern.explain(vitkern.reconstruct_tokens, Y, X, C)
    assert "weights are multiplied by PyTorch" in vitkern.explain(
        vitkern.reconstruct_tokens, Y, X[..., [0]].expand(2, 9, 5)
    )
