"""select_tokens: a brute force, published meanings, edges and refusals. What every op must do is in tests/test_ops.py."""

import math

import pytest
import torch
import torch._dynamo.testing

import vitkern
from vitkern import testing
from vitkern.ops import _call

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def brute_force(score, k, protect, order):
    """The kept positions of one sample, by Python's stable sort."""
    key = [-math.inf if math.isnan(s) else s for s in score.tolist()]
    ranked = sorted(range(protect, len(key)), key=lambda i: -key[i])[:k]
    return [*range(protect), *(ranked if order == "score" else sorted(ranked))]


@ON
@pytest.mark.parametrize("order", ["position", "score"])
def test_ties_infinities_and_nan_against_a_stable_sort(backend, order):
    g = torch.Generator().manual_seed(0)
    for tokens, protect, dtype in ((1, 0, torch.float32), (33, 1, torch.bfloat16), (197, 2, torch.float64)):
        x = torch.randn(4, tokens, 5, generator=g)
        score = torch.randint(-3, 4, (4, tokens), generator=g).to(dtype)
        score[1, ::5], score[1, 2::7], score[2] = torch.nan, torch.inf, 1.0
        score[3, ::2], score[3, 1::4] = -0.0, -torch.inf
        for k in {0, 1, tokens // 3, tokens - protect}:
            k = min(k, tokens - protect)
            y, index = vitkern.select_tokens(x, score, k, protect=protect, order=order, backend=backend)
            assert index.dtype == torch.int32
            for b in range(4):
                want = brute_force(score[b], k, protect, order)
                assert index[b].tolist() == want and torch.equal(y[b], x[b, want])


def evit(x, keep_rate, score):
    """EViT's step as published: class token first, kept tokens by descending score, the rest fused without a divisor."""
    left = math.ceil(keep_rate * (x.shape[1] - 1))
    order = score.argsort(1, descending=True)
    kept, rest = order[:, :left], order[:, left:]
    patches, wide = x[:, 1:], (-1, -1, x.shape[2])
    extra = (patches.gather(1, rest[..., None].expand(wide)) * score.gather(1, rest)[..., None]).sum(1, keepdim=True)
    parts = [x[:, :1], patches.gather(1, kept[..., None].expand(wide))]
    return torch.cat((*parts, extra) if rest.shape[1] else parts, 1)


@ON
def test_two_layers_of_evit(backend):
    g = torch.Generator().manual_seed(1)
    x = want = torch.randn(3, 50, 8, generator=g, dtype=torch.float64)
    for _ in range(2):  # the fused token counts among those of the next layer
        score = torch.rand(3, x.shape[1], generator=g, dtype=torch.float64).requires_grad_()
        x = x.detach().requires_grad_()
        want = evit(x, 0.7, score[:, 1:])
        k = math.ceil(0.7 * (x.shape[1] - 1))
        got, index = vitkern.select_tokens(x, score, k, fuse_rest=True, order="score", backend=backend)
        assert got.shape == (3, k + 2, 8) and index.shape == (3, k + 1)
        torch.testing.assert_close(got, want)
        weight = torch.randn(got.shape, generator=g, dtype=torch.float64)
        for a, b in zip(*(torch.autograd.grad((t * weight).sum(), (x, score)) for t in (got, want)), strict=True):
            torch.testing.assert_close(a, b)
        x = got
    full, _ = vitkern.select_tokens(x, score[:, : x.shape[1]], x.shape[1] - 1, fuse_rest=True, backend=backend)
    assert torch.equal(full, x)  # nothing is left out: no fused token


@ON
def test_the_fused_mean_is_weighted_by_the_scores(backend):
    x, score = torch.randn(2, 20, 6, dtype=torch.float64), torch.rand(2, 20, dtype=torch.float64)
    y, index = vitkern.select_tokens(x, score, 5, fuse_rest="mean", backend=backend)
    rest = torch.ones(2, 20).scatter(1, index.long(), 0.0).double() * score
    torch.testing.assert_close(y[:, -1], (rest[..., None] * x).sum(1) / rest.sum(1, keepdim=True))
    total, _ = vitkern.select_tokens(x, score, 5, fuse_rest="sum", backend=backend)
    torch.testing.assert_close(total[:, -1], (rest[..., None] * x).sum(1))


@ON
def test_masked_and_nan_tokens_take_no_part_in_the_fused_token(backend):
    x, score = torch.randn(1, 8, 3), torch.tensor([[0.0, 9.0, 1.0, 2.0, torch.nan, 3.0, 4.0, 5.0]])
    x[0, [4, 6]] = torch.nan
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 6] = False
    x.requires_grad_(), score.requires_grad_()
    y, index = vitkern.select_tokens(x, score, 2, fuse_rest=True, mask=mask, backend=backend)
    assert index.tolist() == [[0, 1, 7]]
    torch.testing.assert_close(y[0, 3], x[0, 2] + 2 * x[0, 3] + 3 * x[0, 5])
    dx, dscore = torch.autograd.grad(y.square().sum(), (x, score))
    assert dx.isfinite().all() and dscore.isfinite().all()
    assert dx[0, [4, 6]].eq(0).all() and dscore[0, [0, 1, 4, 6, 7]].eq(0).all() and dscore[0, 2] != 0


@ON
def test_masked_tokens_are_kept_last(backend):
    x = torch.arange(10.0)[None, :, None]
    score = torch.tensor([[9.0, 1.0, 2.0, math.nan, 2.0, 2.0, 0.0, -math.inf, 3.0, math.inf]])
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[0, 9] = False

    def pick(k, **options):
        return vitkern.select_tokens(x, score, k, backend=backend, **options)[1][0].tolist()

    assert pick(3) == [0, 2, 8, 9] and pick(4) == [0, 2, 4, 8, 9] and pick(3, order="score") == [0, 9, 8, 2]
    assert pick(2, protect=3) == [0, 1, 2, 8, 9] and pick(0) == [0] and pick(9) == list(range(10))
    assert pick(2, mask=mask) == [0, 2, 8] and pick(7, mask=mask) == [0, 1, 2, 3, 4, 5, 6, 8]
    fused, _ = vitkern.select_tokens(x, score, 5, mask=mask, fuse_rest=True, backend=backend)
    assert fused[0, -1, 0] == 0.0  # token 6 has score 0, 3 and 7 are not finite, 9 is hidden


@ON
def test_a_sample_does_not_depend_on_the_others_of_its_batch(backend):
    g = torch.Generator().manual_seed(4)
    x, score = torch.randn(8, 50, 6, generator=g), torch.randint(-3, 4, (8, 50), generator=g).float()
    for options in ({"k": 9, "fuse_rest": "mean"}, {"k": 20, "order": "score"}, {"threshold": 0.5, "n_max": 30}):
        together = vitkern.select_tokens(x, score, backend=backend, **options)
        for b in (0, 5):
            alone = vitkern.select_tokens(x[b : b + 1], score[b : b + 1], backend=backend, **options)
            assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


def test_selection_and_restoring_compile_into_one_graph_for_all_sizes():
    def run(x, score, k):
        y, index = vitkern.select_tokens(x, score, k, fuse_rest=True)
        return vitkern.restore_tokens(y[:, :-1], index, x.shape[1], 1.0)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    for tokens, k in ((17, 5), (30, 7), (41, 20)):
        x, score = torch.randn(3, tokens, 4), torch.rand(3, tokens)
        assert torch.equal(compiled(x, score, k), run(x, score, k))
    assert counter.frame_count <= 2


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_rows_past_2_to_the_31_elements():
    """Untouched pages of x cost nothing: only the rows that are kept are read."""
    tokens, width = 2**21 + 9, 1025
    x = torch.empty(1, tokens, width, dtype=torch.bfloat16)
    where = [0, 7, tokens // 2, tokens - 2, tokens - 1]
    score = torch.zeros(1, tokens)
    score[0, where] = 1.0
    x[0, where] = torch.arange(1.0, 6.0)[:, None].bfloat16()
    y, index = vitkern.select_tokens(x, score, 4)
    assert x.numel() > 2**31 and index[0].tolist() == where
    assert torch.equal(y[0], torch.arange(1.0, 6.0)[:, None].bfloat16().expand(5, width))


@ON
def test_thresholds_keep_a_different_number_in_every_sample(backend):
    x = torch.randn(4, 9, 3)
    score = torch.arange(9.0).repeat(4, 1)
    least = torch.tensor([-torch.inf, torch.inf, torch.nan, 5.0])
    y, index, lengths = vitkern.select_tokens(x, score, threshold=least, n_max=9, backend=backend)
    assert lengths.tolist() == [9, 1, 1, 5]
    assert index[3].tolist() == [0, 5, 6, 7, 8, 9, 9, 9, 9] and index[1].tolist() == [0] + [9] * 8
    assert torch.equal(y[0], x[0]) and torch.equal(y[3, :5], x[3, [0, 5, 6, 7, 8]]) and y[3, 5:].eq(0).all()
    packed, where, starts = vitkern.select_tokens(x, score, threshold=least, backend=backend)
    assert starts.tolist() == [0, 9, 10, 11, 16] and where[-5:].tolist() == [0, 5, 6, 7, 8]
    assert torch.equal(packed, torch.cat([y[b, :n] for b, n in enumerate(lengths.tolist())]))
    some = vitkern.select_tokens(x, score, 2, threshold=least, order="score", backend=backend)
    assert some[1].tolist() == [0, 8, 7, 0, 0, 0, 8, 7] and some[2].tolist() == [0, 3, 4, 5, 8]
    back = vitkern.restore_tokens(y, index, 9, x, backend=backend)
    assert torch.equal(back, x)
    tight = vitkern.select_tokens(x, score, threshold=3.0, n_max=4, backend=backend)
    assert tight[1].tolist() == [[0, 6, 7, 8]] * 4 and tight[2].tolist() == [4] * 4


@ON
def test_a_sample_does_not_depend_on_its_batch(backend):
    x, score = torch.randn(8, 50, 7), torch.rand(8, 50)
    y, index = vitkern.select_tokens(x, score, 20, fuse_rest="mean", backend=backend)
    for b in range(8):
        alone = vitkern.select_tokens(x[b : b + 1], score[b : b + 1], 20, fuse_rest="mean", backend=backend)
        assert torch.equal(alone[0][0], y[b]) and torch.equal(alone[1][0], index[b])


@ON
def test_routing_round_trip(backend):
    """Token routing: the chosen tokens run a block, the others pass by."""
    x = torch.randn(2, 12, 4, dtype=torch.float64, requires_grad=True)
    score = torch.rand(2, 12)
    y, index = vitkern.select_tokens(x, score, 5, protect=0, backend=backend)
    out = vitkern.restore_tokens(y * 2, index, 12, x, backend=backend)
    chosen = torch.zeros(2, 12).scatter(1, index.long(), 1.0).double()[..., None]
    torch.testing.assert_close(out, x + chosen * x)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, (1 + chosen).expand_as(x))


@ON
def test_nothing_to_do_passes_through(backend):
    for shape, k, protect in (
        ((2, 1, 4), 0, 1),
        ((0, 9, 4), 8, 1),
        ((2, 5, 4), 0, 9),
        ((2, 5), 5, 0),
        ((2, 0, 4), 0, 1),
    ):
        x = torch.randn(shape)
        y, index = vitkern.select_tokens(x, torch.rand(shape[:2]), k, protect=protect, fuse_rest=True, backend=backend)
        assert torch.equal(y, x) and index.tolist() == [list(range(shape[1]))] * shape[0]
        assert torch.equal(vitkern.restore_tokens(y, index, shape[1], backend=backend), x)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_explain_names_the_back_end():
    text = vitkern.explain(vitkern.select_tokens, torch.randn(1, 5, 2), torch.rand(1, 5), 2)
    assert text.startswith("select_tokens runs on: cpu")


X, S = torch.randn(2, 6, 4), torch.rand(2, 6)


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (lambda: vitkern.select_tokens(X, S, 6), ValueError, r"k must lie in \[0, N - protect\] = \[0, 5\], got 6"),
        (lambda: vitkern.select_tokens(X, S, -1), ValueError, "k must lie in"),
        (lambda: vitkern.select_tokens(X, S, 2.0), TypeError, "k must be an int, got 2.0"),
        (lambda: vitkern.select_tokens(X, S), ValueError, "k must be an int where there is no threshold"),
        (lambda: vitkern.select_tokens(X, S[:, :5], 2), ValueError, r"score must have shape \[B, N\] = \[2, 6\]"),
        (lambda: vitkern.select_tokens(X, S.int(), 2), TypeError, "score must be float32"),
        (lambda: vitkern.select_tokens(X[0, 0], S, 2), ValueError, r"x must have shape \[B, N, ...\], got \[4\]"),
        (lambda: vitkern.select_tokens(X, S, 2, protect=-1), ValueError, "protect must be at least 0"),
        (lambda: vitkern.select_tokens(X, S, 2, protect=True), TypeError, "protect must be an int"),
        (lambda: vitkern.select_tokens(X, S, 2, order="split"), ValueError, "order must be 'position' or 'score'"),
        (lambda: vitkern.select_tokens(X, S, 2, fuse_rest="max"), ValueError, "fuse_rest must be False, True, 'sum'"),
        (
            lambda: vitkern.select_tokens(X, S, 2, threshold=0.5, fuse_rest=True),
            ValueError,
            "fuse_rest must be False with a threshold",
        ),
        (lambda: vitkern.select_tokens(X, S, 2, n_max=4), ValueError, "n_max must go with a threshold"),
        (
            lambda: vitkern.select_tokens(X, S, threshold=0.5, n_max=7),
            ValueError,
            r"n_max must lie in \[0, N\] = \[0, 6\], got 7",
        ),
        (
            lambda: vitkern.select_tokens(X, S, threshold=0.5, n_max=1, protect=2),
            ValueError,
            "n_max must hold the 2 protected tokens",
        ),
        (lambda: vitkern.select_tokens(X, S, threshold="a"), TypeError, "threshold must be a float or a tensor"),
        (lambda: vitkern.select_tokens(X.to("meta"), S, 2), ValueError, r"score must be on the device of x \(meta\)"),
        (lambda: vitkern.select_tokens(X.int(), S, 2), TypeError, "x must be float32, float64, bfloat16 or float16"),
        (lambda: vitkern.select_tokens(3, S, 2), TypeError, "x must be a tensor, got int"),
        (
            lambda: vitkern.select_tokens(X, S, 2, mask=S[:, :5] > 0),
            ValueError,
            r"mask must have shape \[B, N\] = \[2, 6\], got \[2, 5\]",
        ),
        (
            lambda: vitkern.select_tokens(X, S, threshold=S[:1, 0]),
            ValueError,
            r"threshold must have shape \[B\] = \[2\], got \[1\]",
        ),
        (lambda: vitkern.select_tokens(X, S, 2, mask=S), TypeError, "mask must be bool, got torch.float32"),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()


@pytest.mark.parametrize("named", [None, "triton", "cuda", "reference"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_off_the_cpu_a_named_back_end_moves_and_the_op_finds_its_own_to_choose(monkeypatch, named, everywhere):
    seen = []

    def dispatch(op, args, wanted):
        seen.append((op.name, wanted))
        return op.fake(*args)

    monkeypatch.setattr(_call, "dispatch", dispatch)
    monkeypatch.setattr(_call, "reasons", lambda op, args: {"reference": [], "triton": [], "cuda": []})
    x, score = torch.empty(2, 9, 4, device="meta"), torch.empty(2, 9, device="meta")
    with vitkern.use_backend(named if everywhere else None):
        vitkern.select_tokens(x, score, 3, backend=None if everywhere else named)
    chooses = named if named == "reference" else None
    assert seen == [("select_tokens", chooses), ("merge_tokens", named)]
