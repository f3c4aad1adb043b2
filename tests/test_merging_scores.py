"""token_energy and attention_rank: brute force over the whole matrix, published uses, edges and refusals."""

import math

import pytest
import torch
from memory import grown

import vitkern
from vitkern import merging, testing
from vitkern.merging import attention_rank, token_energy


def brute_energy(keys, margin, alpha):
    m = torch.nn.functional.normalize(keys, dim=-1)
    t = torch.einsum("bic,bjc->bij", m, m) - margin
    return torch.where(t > 0, t, alpha * (t.exp() - 1)).mean(-1)


@pytest.mark.parametrize("tokens", [1, 5, 256, 600])
def test_energy_against_the_whole_matrix(tokens):
    keys = torch.randn(2, tokens, 3, 16, dtype=torch.float64)
    for margin, alpha in ((0.9, 1.0), (0.0, 1.0), (0.45, 0.5)):
        want = brute_energy(keys.mean(2), margin, alpha)
        got = token_energy(keys, margin, alpha=alpha)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float())
        torch.testing.assert_close(token_energy(keys.mean(2), margin, alpha=alpha), want.float())


def test_half_precision_is_summed_in_float32_and_nothing_has_a_gradient():
    keys = torch.randn(2, 300, 16).bfloat16().requires_grad_()
    got = token_energy(keys, 0.5)
    oracle, eager = (brute_energy(keys.detach().to(dtype), 0.5, 1.0) for dtype in (torch.float64, torch.float32))
    testing.assert_close_to_oracle("energy", got, oracle, eager)
    assert not got.requires_grad


def test_masked_tokens_are_nobodys_company():
    keys = torch.randn(2, 300, 16)
    mask = torch.rand(2, 300) < 0.6
    keys = torch.where(mask[..., None], keys, torch.nan)
    got = token_energy(keys, 0.3, mask=mask)
    for b in range(2):
        torch.testing.assert_close(got[b, mask[b]], token_energy(keys[b : b + 1, mask[b]], 0.3)[0])
    assert got[~mask].eq(-math.inf).all()


def test_pitome_merges_redundant_tokens_and_protects_lonely_ones():
    """Twenty near-copies of one direction and ten lonely tokens: energy alone tells them apart (PiToMe's pair of lists)."""
    g = torch.Generator().manual_seed(0)
    crowd = torch.randn(1, 1, 32, generator=g) + 0.05 * torch.randn(1, 20, 32, generator=g)
    keys = torch.cat((crowd, torch.randn(1, 10, 32, generator=g)), 1)
    order = token_energy(keys, 0.5).argsort(1, descending=True)
    assert order[0, :20].lt(20).all()
    r = 8
    match = vitkern.bipartite_match(keys, protect=0, partition=(order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]))
    plan = vitkern.merge_plan(match, r=r)
    assert plan.n_out == 30 - r and plan.source()[:, :, 20:].sum((1, 2)).eq(10).all()


def brute_rank(q, k, rounds, low, high):
    p = torch.einsum("bihd,bjhd->bhij", q, k).mul(q.shape[3] ** -0.5).softmax(-1)
    s = torch.full(p.shape[:3], 1.0 / q.shape[1], dtype=p.dtype)
    for _ in range(rounds):
        s = torch.einsum("bhi,bhij->bhj", s, p)
    out = []
    for b in range(q.shape[0]):
        heads = [h for h in s[b] if low <= float((h * q.shape[1]).var(unbiased=False)) <= high] or list(s[b])
        out.append(torch.stack(heads).square().mean(0).sqrt())
    return torch.stack(out), s


@pytest.mark.parametrize("tokens", [1, 7, 200])
def test_rank_against_the_whole_matrix(tokens):
    q, k = (torch.randn(2, tokens, 3, 16, dtype=torch.float64) for _ in range(2))
    k[:, :, 1] *= 0.01  # a head that attends everywhere alike: too little variance
    q[:, :, 2] *= 6  # a head that attends to few: too much
    for rounds in (1, 20):
        want, s = brute_rank(q, k, rounds, 0.01, 0.7)
        torch.testing.assert_close(attention_rank(q, k, rounds=rounds), want.float())
        torch.testing.assert_close(attention_rank(q, k, rounds=rounds, variance=None).square().double(),
                                   s.square().mean(1))  # fmt: skip
        torch.testing.assert_close(s.sum(-1), torch.ones(2, 3).double())
    if tokens > 100:
        assert not torch.equal(attention_rank(q, k), attention_rank(q, k, variance=None))


def test_rank_chooses_tokens_and_takes_a_scale():
    q, k = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 4, 8)
    k[:, 17] = 4 * q.mean(1) + 1  # what everyone looks at
    q = q + 1
    x = torch.randn(2, 50, 32)
    _, index = vitkern.select_tokens(x, attention_rank(q, k, rounds=5, variance=None), 10, protect=0)
    assert (index == 17).any(1).all()
    torch.testing.assert_close(attention_rank(q, k, scale=0.0, variance=None), torch.full((2, 50), 0.02))


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    run = """
from vitkern.merging import attention_rank, token_energy
def both(tokens):
    keys = torch.randn(1, tokens, 8)
    assert token_energy(keys, 0.5).isfinite().all()
    assert attention_rank(keys[:, :, None], keys[:, :, None], rounds=1).isfinite().all()
both(100)
"""
    assert grown(run, "both(16000)") < 300e6  # 1 GB for the whole matrix


def test_scores_indices_and_applied_models_compile_whole():
    x, q = torch.randn(2, 20, 8), torch.randn(2, 20, 2, 8)
    calls = {
        "token_energy": (lambda x: token_energy(x, 0.5), x),
        "attention_rank": (lambda q: attention_rank(q, q, rounds=3), q),
        "random2d_index": (lambda: merging.random2d_index((6, 8), (2, 2), seed=4),),
        "kth_index": (lambda: merging.kth_index(20, 4),),
        "frame_index": (lambda: merging.frame_index(5, 12, [0, 3]),),
    }
    for name, (run, *args) in calls.items():
        torch._dynamo.reset()
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(*args)
        torch.testing.assert_close(got, run(*args), msg=name)


X, Q = torch.randn(2, 6, 4), torch.randn(2, 6, 2, 4)


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (
            lambda: token_energy(X[0], 0.5),
            ValueError,
            r"metric must have shape \[B, N, C\] or \[B, N, H, C\], got \[6, 4\]",
        ),
        (lambda: token_energy(X.int(), 0.5), TypeError, "metric must be float32, float64, bfloat16 or float16"),
        (lambda: token_energy(X, "0.5"), TypeError, "margin must be a float, got '0.5'"),
        (lambda: token_energy(X, 0.5, alpha=None), TypeError, "alpha must be a float, got None"),
        (lambda: token_energy(X, 0.5, mask=X[..., 0]), TypeError, "mask must be bool, got torch.float32"),
        (lambda: attention_rank(X, X), ValueError, r"q must have shape \[B, N, H, D\] with at least one token"),
        (lambda: attention_rank(Q, Q[:, :5]), ValueError, r"k must have shape \[B, N, H, D\] of q = \[2, 6, 2, 4\]"),
        (lambda: attention_rank(Q, Q, rounds=0), ValueError, "rounds must be at least 1, got 0"),
        (lambda: attention_rank(Q, Q, variance=0.1), ValueError, r"variance must be a pair \(least, most\) or None"),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
