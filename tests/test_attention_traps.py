"""attention where other implementations have been wrong: lengths, large and small logits, gradients of a bias alone, strides of
zero, rotations of libraries, padded queries, very many scores."""

import math
from dataclasses import replace

import libraries  # noqa: F401
import pytest
import torch
from masked_systems import normal, qkv
from test_attention_varlen import bounds, one_by_one, packed

import vitkern
from vitkern import Rope, bias, mask, modulation, testing
from vitkern.testing import attention as registry
from vitkern.testing.registry import Call

ENTRY = testing.entries()["attention"]


def check(name, tensors, build, dtype=torch.float32, parameters=(), function=vitkern.attention):
    """build(t): the arguments and options of a call, by the oracle rule."""
    call = Call(name, function, build, tensors, frozenset(parameters), seed=len(name))
    testing.assert_matches(ENTRY, call, dtype, "cpu")


def of(t, **options):
    return (t["q"], t["k"], t["v"]), options


# scores of any size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [192, 320, 704])
def test_rows_whose_logsumexp_is_far_below_zero(n, dtype):
    """Half a tile of 128 at the end: exp(0 - lse) of what lies behind it is infinite."""
    made = registry.make(n, 1, n, n, heads=1, d=16, bias=(0, 1, 1, 1), masks="empty", return_stats=("lse",))
    low = replace(made, tensors=made.tensors | {"bias": made.tensors["bias"] - 100})
    testing.assert_matches(ENTRY, low, dtype, "cpu")


@pytest.mark.parametrize("shift", [-6e4, -1e5, -1e6, -1e30, 1e4, 1e30])
def test_no_finite_number_hides(shift):
    """A shift of a whole row changes nothing, but one that swallows the scores makes them equal; a mask hides beside it."""
    seen = torch.arange(40) < 33
    tensors = qkv(5, 40) | {"bias": torch.full((40,), shift, dtype=torch.float64)}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check("shifted", tensors, lambda t: of(t, bias=t["bias"], mask=seen, return_stats="lse"), dtype, ("bias",))
    q, k, v = (tensors[n] for n in "qkv")
    want = vitkern.attention(q, k, v, mask=seen)
    if abs(shift) == 1e30:
        want = v[:, :33].mean(1, keepdim=True).expand_as(want)
    torch.testing.assert_close(vitkern.attention(q, k, v, bias=tensors["bias"], mask=seen), want)
    if shift < 0:  # as a mask where other keys of the row are seen
        least = torch.where(seen, 0.0, shift).double()
        torch.testing.assert_close(vitkern.attention(q, k, v, bias=least), vitkern.attention(q, k, v, mask=seen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_sigmoids_are_exact_weight_by_weight(dtype):
    """sigmoid(s - log 4096) by way of tanh has an error as large as itself. Values are unit vectors, so that the output is P."""
    q, k, _ = (t.to(dtype) for t in qkv(70, 64, heads=1, d=16, batch=1).values())
    v = torch.eye(64, dtype=dtype)[None, :, None]
    low = bias.RowBias(torch.full((1, 1, 70), -math.log(4096), dtype=dtype))
    p, eager, oracle = (
        vitkern.attention(*(t.to(d) for t in (q, k, v)), bias=low, normalizer="sigmoid", backend=b)
        for d, b in ((dtype, "cpu"), (torch.float32, "reference"), (torch.float64, "reference"))
    )
    assert p.median() < 1e-3
    p, eager = (t.div(oracle).to(t.dtype) for t in (p, eager))
    testing.assert_close_to_oracle("P", p, torch.ones_like(oracle), eager)


@pytest.mark.parametrize("mode", modulation.MODES)
@pytest.mark.parametrize("count, prefix", [(1, 0), (3, 1), (5, 1)])
def test_gaussians_beyond_what_the_published_code_reaches(count, prefix, mode):
    """Squares of distances above 104 on a grid that is not square, one width of zero."""
    grid = (2, 14)
    n = math.prod(grid) + prefix
    tensors = qkv(n) | {"sigma": normal(count, 2, seed=3) * 5 + 8, "alpha": normal(count, 2, seed=4) + 1}
    tensors["sigma"][0, 1] = 0.0

    def build(t):
        return of(t, modulation=modulation.GaussianMixture(t["sigma"], t["alpha"], grid, prefix, mode=mode))

    for dtype in (torch.float32, torch.bfloat16):
        check("gaussians", tensors, build, dtype, ("sigma", "alpha"))
    far = build(tensors)[1]["modulation"].dense(tensors["q"], tensors["k"])[0, prefix, prefix + 13]
    assert (far == 0) == (mode == "published")


# gradients of a bias alone, and lse ----------------------------------------------------------------------------------------

ALONE = {
    "tensor": lambda t: t,
    "key bias": lambda t: bias.KeyBias(t[:, :, 0]),
    "row bias": lambda t: bias.RowBias(t[..., 0]),
    "table": lambda t: bias.RelativePosition(t.flatten()[:98].view(49, 2), grid=(4, 4)),
    "axes": lambda t: bias.DecomposedRelativePosition(t[0, 0, :7, :8], t[0, 1, :7, :8], (4, 4), (4, 4)),
    "decay": lambda t: bias.ManhattanDecay(t[0, :, 0, 0], (4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_a_bias_that_alone_learns_has_the_same_gradient(name, dtype):
    """Through the output, and through lse alone."""
    tensors = [t.to(dtype) for t in qkv(16).values()]
    values = normal(1, 2, 16, 16, seed=6).to(dtype)
    found = []
    for all_learn in (False, True):
        leaves = [t.clone().requires_grad_(all_learn) for t in tensors]
        learned = values.clone().requires_grad_()
        options = {"normalizer": "sigmoid"} if name == "row bias" else {"return_stats": ("lse",)}
        got = vitkern.attention(*leaves, bias=ALONE[name](learned), scale=0.3, **options)
        parts = (got,) if name == "row bias" else (got[0], got[1].lse)
        found.append([torch.autograd.grad(t.sin().sum(), learned, retain_graph=True)[0] for t in parts])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.any()


def test_logsumexp_of_empty_rows_and_sequences_is_minus_infinity_and_learns_nothing():
    arguments = packed(((3, 0), (4, 5), (0, 3), (2, 0)), grad=True)
    out, stats = vitkern.attention_varlen(*arguments, return_stats="lse")
    empty = torch.tensor([True] * 3 + [False] * 4 + [True] * 2)
    assert stats.lse[empty].eq(-math.inf).all() and stats.lse[~empty].isfinite().all() and out[empty].eq(0).all()
    q, k, v = (t.requires_grad_() for t in qkv(6).values())
    seen = (torch.arange(6) != 2)[:, None].expand(6, 6)
    _, dense = vitkern.attention(q, k, v, mask=seen, return_stats="lse")
    for lse, leaves in ((stats.lse, arguments[:2]), (dense.lse, (q, k))):
        grads = torch.autograd.grad(lse.masked_fill(lse == -math.inf, 0.0).sin().sum(), leaves, retain_graph=True)
        straight = torch.autograd.grad(lse, leaves, torch.ones_like(lse))
        assert all(g.isfinite().all() and g.any() for g in (*grads, *straight))
    assert not torch.autograd.grad(vitkern.attention(q, k, v, mask=seen).sum(), q)[0][:, 2].any()


def test_longer_maxima_than_sequences_leave_lse_and_gradients_finite():
    """A mask for 128 tokens, sequences of 5 and 100."""
    arguments = packed(((5, 5), (100, 100)), grad=True)[:5]
    exact = packed(((5, 5), (100, 100)), grad=True)
    found = []
    for given in ((*arguments, 128, 128), exact):
        seen = torch.ones(given[5], given[6], dtype=torch.bool).tril()
        out, stats = vitkern.attention_varlen(*given, mask=seen, return_stats="lse")
        found.append((out, stats.lse, *torch.autograd.grad((out.sin().sum() + stats.lse.sin().sum()), given[:3])))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


# strides and integers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [33, 65])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_keys_and_values_of_stride_zero(axis, keys, dtype):
    """All samples, all tokens or all heads of one storage."""
    tensors = qkv(7, keys, heads=4)
    tensors |= {n: tensors[n].narrow(axis, 0, 1) for n in "kv"}

    def build(t):
        k, v = (t[n].expand(*(m if i == axis else -1 for i, m in enumerate((2, keys, 4, 8)))) for n in "kv")
        assert k.stride(axis) == 0
        return (t["q"], k, v), {"mask": mask.Causal(keys - 7)}

    check("expanded", tensors, build, dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 37), (2, 1, 1, 37), (1, 1, 18, 1), (1, 4, 1, 37), (2, 1, 18, 37)], ids=str)
def test_masks_of_stride_zero(shape):
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.7
    q, k, v = (t.requires_grad_() for t in qkv(18, 37, heads=4).values())
    found = []
    for given in (seen.expand(2, 4, 18, 37), seen.expand(2, 4, 18, 37).contiguous()):
        out = vitkern.attention(q, k, v, mask=given)
        found.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_integers_of_64_bits_are_those_of_32():
    q, k, v = qkv(9, 9).values()
    g = torch.Generator().manual_seed(4)
    index, ids = torch.randint(0, 7, (9, 9), generator=g), torch.randint(0, 3, (1, 9), generator=g)
    named, table = torch.randint(-1, 9, (2, 9, 4), generator=g), normal(7, 2)
    context = [normal(7, 1, 8, seed=i) for i in range(3)]
    for make in (
        lambda i: {"bias": bias.RelativePosition(table, index.to(i)), "mask": mask.Segments(ids.to(i), ids.to(i))},
        lambda i: {
            "bias": bias.ContextualPosition(*context, index.to(i)),
            "mask": mask.BlockCausal(ids.to(i), ids.to(i)),
        },
        lambda i: {"key_index": named.to(i)},
    ):
        assert torch.equal(
            vitkern.attention(q, k, v, **make(torch.int64)), vitkern.attention(q, k, v, **make(torch.int32))
        )


def test_more_than_two_to_the_31_scores():
    """64 heads of 8192 tokens, of which every query sees 32; the bias is one row of storage for all of them."""
    n, heads, step = 8192, 64, 32
    q, k, v = (normal(1, n, heads, 4, seed=i).float() for i in range(3))
    row = normal(1, 1, 1, n, seed=3).float()
    ids = (torch.arange(n) // step)[None]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = vitkern.attention(*leaves, bias=row.expand(1, heads, n, n), mask=mask.Segments(ids, ids))
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    last = [t.detach()[:, -step:, -1:].clone().requires_grad_() for t in leaves]
    results = []
    for dtype in (torch.float64, torch.float32):
        given = [t.detach().to(dtype).requires_grad_() for t in last]
        part = vitkern.attention(*given, bias=row[..., -step:].to(dtype), backend="reference")
        results.append((part, *torch.autograd.grad(part.sin().sum(), given)))
    for name, got, oracle, eager in zip(("out", "q", "k", "v"), (out, *grads), *results, strict=True):
        testing.assert_close_to_oracle(name, got[:, -step:, -1:], oracle, eager, gradient=name != "out")


# padded queries ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_padded_queries_do_not_count_in_the_means_of_keys(normalizer):
    """Their weight is zero: the means are those of the shorter call, and they learn nothing."""
    tensors = qkv(9, 11)
    q, k, v = (t.requires_grad_() for t in tensors.values())
    weight = torch.ones(2, 9, dtype=q.dtype)
    weight[:, 6:] = 0.0
    options = {"normalizer": normalizer, "return_stats": ("key_mean",)}
    _, stats = vitkern.attention(q, k, v, query_weight=weight, **options)
    _, short = vitkern.attention(q[:, :6], k, v, **options)
    torch.testing.assert_close(stats.key_mean, short.key_mean)
    of_q, of_k = torch.autograd.grad(stats.key_mean.square().sum(), (q, k))
    want_q, want_k = torch.autograd.grad(short.key_mean.square().sum(), (q, k))
    torch.testing.assert_close(of_q, want_q)
    torch.testing.assert_close(of_k, want_k)
    assert not of_q[:, 6:].any() and of_q[:, :6].any()


def test_fit_lets_padding_see_padding_and_multiplies_by_the_mask():
    """Segments with -1 give the same outputs and the same gradient of a loss on tokens that are none."""
    real = torch.arange(12) < torch.tensor([[12], [7]])
    q, k, v = (t.requires_grad_() for t in qkv(12).values())
    ids = torch.where(real, 0, -1)
    ours = vitkern.attention(q, k, v, mask=mask.Segments(ids, ids))
    same = real[:, :, None] == real[:, None]  # padding sees padding
    theirs = vitkern.attention(q, k, v, mask=same[:, None], backend="reference") * real[..., None, None]
    torch.testing.assert_close(ours, theirs)
    weight = normal(2, 12, 2, 8, seed=9)
    for a, b in zip(*(torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_sigmoid_counts_the_keys_of_every_sequence():
    """-log n per row, n the length of its own sequence, in one packed call."""
    lengths = ((3, 5), (64, 40), (1, 1))
    arguments = packed(lengths, grad=True)
    row = torch.cat([torch.full((n,), -math.log(m), dtype=torch.float64) for n, m in lengths])[None, None]
    each = lambda s, rows, columns: {"bias": torch.tensor(-math.log(lengths[s][1]), dtype=torch.float64)}  # noqa: E731
    got = vitkern.attention_varlen(*arguments, bias=bias.RowBias(row), normalizer="sigmoid")
    want = one_by_one(arguments, each, normalizer="sigmoid")
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), arguments[:3]) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_offsets_that_repeat_are_empty_sequences():
    """Qwen's windows of nothing but padding, left in."""
    q, k, v, cu, _, most, _ = packed([(n, n) for n in (16, 7, 16)])
    twice = bounds((16, 0, 7, 0, 0, 16, 0))
    got = vitkern.attention_varlen(q, k, v, twice, twice, most, most)
    assert torch.equal(got, vitkern.attention_varlen(q, k, v, cu, cu, most, most))


# rotations of libraries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
def test_rotations_are_those_of_eva(half):
    """timm concatenates sines before cosines, every one twice; two prefix tokens do not turn."""
    eva = pytest.importorskip("timm.models.eva")
    angle = normal(1, 12, 4, seed=5)[0]
    module = eva.EvaAttention(16, 2, num_prefix_tokens=2, rotate_half=half, qk_norm=False, scale_norm=False).double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(normal(*p.shape, seed=i))
    wide = angle.repeat(1, 2) if half else angle.repeat_interleave(2, 1)
    x = normal(2, 14, 16, seed=6).requires_grad_()
    q, k, v = torch.nn.functional.linear(
        x, module.qkv.weight, torch.cat((module.q_bias, module.k_bias, module.v_bias))
    ).unflatten(-1, (3, 2, 8)).unbind(2)  # fmt: skip
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    rope = Rope(cos, sin, "half" if half else "interleaved", (2, 14), (2, 14))
    got = module.proj(vitkern.attention(q, k, v, rope=rope).flatten(2))
    want = module(x, rope=torch.cat((wide.sin(), wide.cos()), -1))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.sin().sum(), x)[0] for t in (got, want)))


def test_rotations_are_those_of_sam2s_memory():
    """Keys of three frames, turned alike, and five object pointers behind them that do not turn."""
    sam = pytest.importorskip("transformers.models.sam2_video.modeling_sam2_video")
    q, k, v = (t.float().requires_grad_() for t in qkv(6, 6 * 3 + 5).values())
    angle = normal(6, 4, seed=5).float()
    cos, sin = (t.repeat_interleave(2, 1)[None, None] for t in (angle.cos(), angle.sin()))
    a, b = sam.apply_rotary_pos_emb_2d(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 5, True)
    want = torch.nn.functional.scaled_dot_product_attention(a, b, v.transpose(1, 2)).transpose(1, 2)
    rope = Rope(angle.cos()[None, :, None], angle.sin()[None, :, None], k_range=(0, 18))
    got = vitkern.attention(q, k, v, rope=rope)
    torch.testing.assert_close(got, want)
    for x, y in zip(*(torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (got, want)), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_angles_of_fewer_tokens_repeat_and_learn(layout):
    """The angles of a frame serve three; queries turn from the second token on, keys but for the last two."""
    tensors = qkv(8, 8) | {"cos": normal(1, 2, 1, 3, seed=5), "sin": normal(1, 2, 2, 3, seed=6)}
    tensors["cos"] = tensors["cos"].expand(1, 2, 2, 3).clone()

    def build(t):
        return of(t, rope=Rope(t["cos"], t["sin"], layout, (2, 8), (0, 6)))

    for dtype in (torch.float32, torch.bfloat16):
        check("angles", tensors, build, dtype, ("cos", "sin"))


# what must not matter ------------------------------------------------------------------------------------------------------


def test_a_constant_of_every_row_changes_nothing_under_softmax():
    q, k, v = (t.requires_grad_() for t in qkv(18, 37).values())
    row = (normal(2, 2, 18, seed=3) * 5).requires_grad_()
    got, want = vitkern.attention(q, k, v, bias=bias.RowBias(row)), vitkern.attention(q, k, v)
    torch.testing.assert_close(got, want)
    *grads, of_row = torch.autograd.grad(got.sin().sum(), (q, k, v, row))
    for a, b in zip(
        (*grads, of_row), (*torch.autograd.grad(want.sin().sum(), (q, k, v)), torch.zeros_like(row)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_tokens_in_another_order_with_their_places_give_the_same():
    """Coordinates, ids, levels and biases of keys move with their tokens: further tiles, other sums."""
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    tensors = qkv(70, 70, heads=4, kv=2)
    slope, xy, own = normal(4, seed=3).abs(), normal(1, 70, 2, seed=4), normal(2, 4, 70, seed=5)
    ids = torch.randint(-1, 4, (1, 70), generator=torch.Generator().manual_seed(2))
    found = []
    for at in (torch.arange(70), order):
        leaves = [t[:, at].clone().requires_grad_() for t in tensors.values()]
        biases = [bias.EuclideanDistance(slope, xy[:, at], xy[:, at]), bias.KeyBias(own[..., at])]
        segments = mask.Segments(ids[:, at], ids[:, at])
        out = vitkern.attention(*leaves, bias=biases, mask=segments)
        back = at.argsort()
        found.append([t[:, back] for t in (out, *torch.autograd.grad(out.square().sum(), leaves))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keys", [5, 20, 32])
def test_a_bias_of_minus_infinity_hides_a_product_that_overflows(keys):
    g = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(1, n, 1, 8, generator=g) for n in (3, keys, keys))
    q[0, 0], k[0, keys - 1] = 1e20, 1e20
    added = torch.zeros(1, 1, 3, keys)
    added[..., keys - 1] = -math.inf
    of_rows, of_columns = torch.zeros(1, 3, 1, 1), added.transpose(1, 2)
    seen = torch.arange(keys) < keys - 1
    want = vitkern.attention(q, k, v, mask=seen, backend="reference")
    for given in (added, bias.DecomposedRelativePosition(of_rows, of_columns, None, (1, keys))):
        torch.testing.assert_close(vitkern.attention(q, k, v, bias=given, backend="cpu"), want)


def test_what_is_not_finite_shows_beside_a_bias():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8, generator=g) for _ in range(3))
    rows, columns = torch.randn(1, 20, 1, 4, generator=g), torch.randn(1, 20, 1, 5, generator=g)
    for given in (torch.randn(2, 20, 20, generator=g), bias.DecomposedRelativePosition(rows, columns, None, (4, 5))):
        for place in range(3):
            tensors = [t.clone() for t in (q, k, v)]
            tensors[place][0, 3, 1, 2] = math.nan
            want, got = (vitkern.attention(*tensors, bias=given, backend=b).isnan() for b in ("reference", "cpu"))
            assert want.any() and torch.equal(got, want)


@pytest.mark.parametrize("grid", [(5, 3), (4, 16), (17, 2)], ids=str)
def test_tables_of_positions_in_the_dtype_of_the_queries(grid):
    """Where bfloat16 is multiplied in pairs, such tables are too."""
    g = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys("qkv", (2, math.prod(grid), 2, 16)) | {
        "h": (2 * grid[0] - 1, 16),
        "w": (2 * grid[1] - 1, 16),
    }
    tensors = {n: torch.randn(shape, generator=g).bfloat16().requires_grad_() for n, shape in shapes.items()}

    def build(t):
        return (t["q"], t["k"], t["v"]), {"bias": bias.DecomposedRelativePosition(t["h"], t["w"], grid, grid)}

    check(f"tables {grid}", tensors, build, torch.bfloat16)
