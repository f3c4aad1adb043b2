"""window_attention: agreement with code we did not write, values by hand, edges and refusals."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import vitkern
from vitkern import CosineScore, testing
from vitkern.bias import RelativePosition
from vitkern.testing.window_attention import make

ENTRY = testing.entries()["window_attention"]
BACKENDS = ["reference", *testing.backends()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
nan, inf = math.nan, math.inf


def qkv(*shape, seed=0, dtype=torch.float32):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind(0)


# agreement with torch ----------------------------------------------------------------------------------------------------


def by_sdpa(q, k, v, window, shift, bias, mask_value):
    """Roll, partition, torch's own attention with one mask per window, and back: maps that windows divide."""
    batch, height, width, heads, d = q.shape
    (wh, ww), (sh, sw) = window, shift
    region = torch.zeros(height, width)
    bounds = [
        [(0, n - w), (n - w, n - s), (n - s, n)] if s else [(0, n)] for n, w, s in ((height, wh, sh), (width, ww, sw))
    ]
    for code, ((top, bottom), (left, right)) in enumerate(itertools.product(*bounds)):
        region[top:bottom, left:right] = code

    def windows(x):  # [B, H, W, ...] to [B nW, N, ...]
        x = x.unflatten(2, (-1, ww)).unflatten(1, (-1, wh)).transpose(2, 3)
        return x.reshape(-1, wh * ww, *x.shape[5:])

    parts = [windows(x.roll((-sh, -sw), (1, 2))).transpose(1, 2) for x in (q, k, v)]
    codes = windows(region[None])
    mask = (codes[:, :, None] != codes[:, None, :]).to(q.dtype) * mask_value
    mask = bias[None] + mask.repeat(batch, 1, 1)[:, None]
    o = F.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)
    o = o.view(batch, height // wh, width // ww, wh, ww, heads, d).transpose(2, 3).reshape(q.shape)
    return o.roll((sh, sw), (1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window, shift", [((7, 7), (0, 0)), ((7, 7), (3, 3)), ((2, 5), (1, 4)), ((7, 5), (3, 0))])
def test_agrees_with_torchs_attention_on_rolled_windows(window, shift, backend):
    q, k, v = qkv(2, 14, 35, 3, 8, dtype=torch.float64)
    bias = torch.randn(3, math.prod(window), math.prod(window), dtype=torch.float64)
    want = by_sdpa(q, k, v, window, shift, bias, -100.0)
    got = vitkern.window_attention(q, k, v, window, shift, bias=bias, backend=backend)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_window_over_the_map_is_plain_attention_with_its_logsumexp(backend):
    q, k, v = qkv(2, 4, 6, 2, 8, dtype=torch.float64)
    out, stats = vitkern.window_attention(q, k, v, (4, 6), return_stats=("lse",), backend=backend)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), k.flatten(1, 2)) * 8**-0.5
    torch.testing.assert_close(stats.lse.flatten(1, 2), scores.logsumexp(-1).transpose(1, 2))
    want = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
    torch.testing.assert_close(out.flatten(1, 2), want.transpose(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cosine_scores_agree_with_normalize_and_the_clamp_passes_gradient_up_to_its_maximum(backend):
    q, k, v = qkv(1, 3, 3, 2, 8, dtype=torch.float64)
    for value, slope in ((math.log(100.0), 1), (5.0, 0), (1.0, 1)):
        tau = torch.full((2, 1, 1), value, dtype=torch.float64, requires_grad=True)
        got = vitkern.window_attention(q, k, v, 3, cosine=CosineScore(tau), backend=backend)
        heads = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
        s = F.normalize(heads[0], dim=-1) @ F.normalize(heads[1], dim=-1).mT
        theirs = torch.full((2, 1, 1), value, dtype=torch.float64, requires_grad=True)
        want = (s * theirs.clamp(max=math.log(100.0)).exp()).softmax(-1) @ heads[2]
        torch.testing.assert_close(got.flatten(1, 2), want.transpose(1, 2))
        (grad,) = torch.autograd.grad(got.square().sum(), tau)
        assert bool((grad != 0).all()) == bool(slope), value
        torch.testing.assert_close(grad, torch.autograd.grad(want.square().sum(), theirs)[0])


def test_philox_gives_the_published_words():
    from vitkern.reference.window_attention import philox

    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    assert [int(w) for w in philox([zero] * 4, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox([ones] * 4, torch.tensor([-1]))] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


# values by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_one_on_four_tokens_pairs_neighbours_across_the_window_border(backend):
    q = k = torch.zeros(1, 4, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    plain = vitkern.window_attention(q, k, v, 2, backend=backend).flatten().tolist()
    exact = vitkern.window_attention(q, k, v, 2, 1, mask_value=None, backend=backend).flatten().tolist()
    open_ = vitkern.window_attention(q, k, v, 2, 1, mask_value=0.0, backend=backend).flatten().tolist()
    assert plain == [1.5, 1.5, 6.0, 6.0]
    assert exact == [1.0, 3.0, 3.0, 8.0]  # tokens 3 and 0 meet in one window, in different regions
    assert open_ == [4.5, 3.0, 3.0, 4.5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_are_hidden_or_zero_or_given(backend):
    q = k = torch.zeros(1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    given = (torch.zeros(1, 1), torch.full((1, 1), 10.0))
    for pad_kv, last in ((None, 4.0), ("zero", 2.0), (given, 7.0)):
        out = vitkern.window_attention(q, k, v, 2, pad_kv=pad_kv, backend=backend)
        assert out.flatten().tolist() == [1.5, 1.5, last]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_pad_orders_differ_as_the_libraries_do(backend):
    q = k = torch.zeros(1, 3, 1, 1)
    v = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)

    def run(order):
        return (
            vitkern.window_attention(q, k, v, 2, 1, pad_order=order, mask_value=0.0, backend=backend).flatten().tolist()
        )

    assert run("pad_roll") == [1.0, 3.0, 3.0]  # working row: 1 2 | pad 0
    assert run("roll_pad") == [1.0, 3.0, 3.0]  # working row: 1 2 | 0 pad
    exact = {
        order: vitkern.window_attention(q, k, v, 2, 1, pad_order=order, pad_kv="zero", mask_value=None, backend=backend)
        for order in ("pad_roll", "roll_pad")
    }
    assert exact["pad_roll"].flatten().tolist() == [1.0, 3.0, 3.0]  # token 0 stands alone in region 2
    assert exact["roll_pad"].flatten().tolist() == [1.0, 3.0, 3.0]  # token 0 in region 1, the pad in region 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_zero_means_zero_and_scale_none_the_inverse_root(backend):
    q, k, v = qkv(1, 4, 1, 4)
    uniform = vitkern.window_attention(q, k, v, 4, scale=0.0, backend=backend)
    torch.testing.assert_close(uniform, v.mean(1, keepdim=True).expand_as(v))
    default = vitkern.window_attention(q, k, v, 4, backend=backend)
    torch.testing.assert_close(default, vitkern.window_attention(q, k, v, 4, scale=0.5, backend=backend))


# edges ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", testing.backends())
def test_the_shapes_of_the_specification(backend):
    shapes = [
        ((14, 14), (7, 7), (3, 3)), ((16, 16), (7, 7), (3, 3)), ((28, 30), (7, 7), (3, 3)), ((9, 20), (7, 7), (6, 6)),
        ((5, 14), (7, 7), (3, 0)), ((12, 9), (4, 7), (3, 3)), ((3, 17), (1, 17), (0, 0)), ((17, 3), (17, 1), (8, 0)),
        ((13, 12), (12, 12), (6, 6)), ((17, 16), (16, 16), (8, 8)), ((197,), (16,), (8,)), ((5, 9, 11), (2, 7, 7), (1, 3, 3)),
        ((8, 7, 7), (8, 7, 7), (0, 0, 0)), ((7, 7, 9), (7, 7, 7), (3, 3, 3)), ((2, 4, 6, 5), (2, 2, 3, 3), (1, 1, 1, 1)),
        ((24, 24), (24, 24), (0, 0)), ((56, 56), (7, 7), (3, 3)),
    ]  # fmt: skip
    for seed, (lengths, window, shift) in enumerate(shapes):
        heads = 2 if math.prod(window) < 200 else 1
        call = make(seed, lengths, window, shift, heads=heads, d=16, bias="table", pads="given", scale=0.3)
        testing.assert_matches(ENTRY, call, DTYPES[seed % 4], backend)


@pytest.mark.parametrize("backend", testing.backends())
def test_every_head_size(backend):
    for seed, d in enumerate((1, 8, 10, 15, 16, 24, 30, 32, 48, 64, 72, 80, 96, 128, 255, 256)):
        call = make(seed, (5, 6), (4, 4), (2, 2), d=d, dv=max(1, d // 2), bias="table", pads="given")
        testing.assert_matches(ENTRY, call, DTYPES[seed % 3], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_sees_no_key_is_zero_with_zero_gradients(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 1, 2))
    bias = torch.zeros(1, 4, 4)
    bias[:, 1] = -inf
    out, stats = vitkern.window_attention(q, k, v, 4, bias=bias, return_stats=("lse",), backend=backend)
    assert out[0, 1].tolist() == [[0.0, 0.0]] and stats.lse[0, 1].item() == -inf
    assert (out[0, [0, 2, 3]] != 0).all()
    out.square().sum().backward()
    assert q.grad[0, 1].tolist() == [[0.0, 0.0]] and all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_hidden_keys_and_values_never_leak(backend, poison):
    q, k, v = qkv(1, 4, 1, 8)
    k[0, 2], v[0, 2] = poison, poison
    bias = torch.zeros(1, 4, 4)
    bias[:, :, 2] = -inf
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = vitkern.window_attention(*leaves, 4, bias=bias, backend=backend)
    keep = [0, 1, 3]
    want = F.scaled_dot_product_attention(q[0, :, 0], k[0, keep, 0], v[0, keep, 0])
    torch.testing.assert_close(out[0, :, 0], want)
    out.square().sum().backward()
    assert all(t.grad[0, keep].isfinite().all() for t in leaves)
    assert (leaves[2].grad[0, 2] == 0).all()


@pytest.mark.parametrize("channel", [0, 1, 23])
def test_one_number_that_is_not_finite_stays_where_it_is_in_bfloat16(channel):
    leaves = [t.bfloat16().requires_grad_() for t in qkv(1, 7, 2, 24)]
    bias = torch.zeros(2, 7, 7)
    bias[:, :, 4] = -inf
    leaves[1].data[0, 4, :, channel] = nan
    leaves[2].data[0, 4, :, channel] = inf
    out = vitkern.window_attention(*leaves, 7, bias=bias)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("odd", ["q", "k", "v", "gradient", "expanded"])
def test_rows_at_odd_places_in_bfloat16(odd):
    """Eight keys with one score each: weights of 1 / 8, with which every product is exact."""
    names = ("q", "k", "v", "gradient")
    g = torch.Generator().manual_seed(0)
    given = {n: torch.randint(-1, 2, (1, 16, 2, 16), generator=g).bfloat16() * (n != "q") for n in names}
    if odd == "expanded":
        given["gradient"].fill_(1)
    found = []
    for place in ("", odd):
        t = {n: torch.cat((x, x[..., :1]), -1)[..., :-1] if n == place else x for n, x in given.items()}
        leaves = [t[n].detach().requires_grad_() for n in "qkv"]
        out = vitkern.window_attention(*leaves, 8, scale=1.0)
        if place == "expanded":
            t["gradient"] = torch.ones((), dtype=torch.bfloat16).expand(out.shape)
        found.append((out, torch.autograd.grad(out, leaves, t["gradient"])[2]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_visible_nan_spoils_its_own_region_only(backend):
    q, k, v = qkv(1, 4, 1, 2)
    v[0, 0, 0, 1] = nan
    out = vitkern.window_attention(q, k, v, 2, 1, mask_value=None, backend=backend)
    assert out[0, 0, 0].isnan().tolist() == [False, True] and out[0, 1:].isfinite().all()


@pytest.mark.parametrize("backend", testing.backends())
def test_large_scores_do_not_overflow(backend):
    for factor in (1e4, -1e4):
        call = make(0, (4, 4), (2, 2), (1, 1), d=8)
        call.tensors["q"].mul_(factor)
        testing.assert_matches(ENTRY, call, torch.float32, backend)
    call = make(1, (4, 4), (2, 2), (0, 0), d=8, bias="dense")
    call.tensors["bias"].add_(1e4)
    testing.assert_matches(ENTRY, call, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_query_is_finite_under_cosine_scores(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 4, 1, 4))
    with torch.no_grad():
        q[0, 1] = 0
    out = vitkern.window_attention(q, k, v, 4, cosine=CosineScore(torch.zeros(1)), backend=backend)
    torch.testing.assert_close(out[0, 1, 0], v[0, :, 0].mean(0))
    out.sum().backward()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_key_of_pads_is_finite_under_cosine_scores(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 3, 3, 2, 8))
    tau, zero, given = torch.zeros(2, requires_grad=True), torch.zeros(2, 8), torch.ones(2, 8)
    for same in (((zero, given), (None, given)), ((zero, zero), (zero, None), "zero")):
        found = []
        for pad_kv in same:
            out = vitkern.window_attention(q, k, v, 2, cosine=CosineScore(tau), pad_kv=pad_kv, backend=backend)
            found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, tau))))
        assert all(t.isfinite().all() for t in found[0])
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_bfloat16_biases_are_summed_over_thousands_of_windows_in_float32(backend):
    """Every window gives 2 or -2, which bfloat16 stops adding at 512."""
    q = torch.zeros(4096, 2, 1, 8, dtype=torch.bfloat16)
    v = torch.tensor([1.0, 0.0], dtype=torch.bfloat16).view(1, 2, 1, 1).expand_as(q)
    bias, table = (torch.zeros(n, dtype=torch.bfloat16, requires_grad=True) for n in ((1, 2, 2), (3, 1)))
    for given, leaf, want in (
        (bias, bias, [8192, -8192, 8192, -8192]),
        (RelativePosition(table), table, [-8192, 0, 8192]),
    ):
        out = vitkern.window_attention(q, q, v, 2, bias=given, backend=backend)
        assert torch.autograd.grad(out.float().sum(), leaf)[0].flatten().tolist() == want


@pytest.mark.parametrize("backend", testing.backends())
@pytest.mark.parametrize("tau, mask_value", [*itertools.product((50.0, 100.0), (-100.0, -200.0, None))])
def test_leaking_cosine_masks_are_plain_arithmetic(tau, mask_value, backend):
    """Keys above look one way, keys below the other: in the window that holds both, scores differ by up to 2 tau."""
    calls = [make(0, (8, 8), (4, 4), (2, 2), heads=1, d=16, cosine=True, mask_value=m) for m in (mask_value, None)]
    for call in calls:
        t = call.tensors
        t["logit_scale"].fill_(math.log(tau))
        towards = F.normalize(torch.ones(16, dtype=torch.float64), dim=0)
        t["q"].mul_(0.05).add_(towards)
        t["k"].mul_(0.05)[:, :4].add_(towards)
        t["k"][:, 4:].sub_(towards)
    testing.assert_matches(ENTRY, calls[0], torch.float32, backend)
    out, exact = (call.run(call.leaves(torch.float32), backend)[0] for call in calls)
    assert ((out - exact).abs().max() > 1e-3) == (mask_value is not None and 2 * tau + mask_value >= 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_value_none_equals_a_very_negative_one(backend):
    q, k, v = qkv(2, 9, 11, 2, 8)
    exact = vitkern.window_attention(q, k, v, 4, 2, mask_value=None, backend=backend)
    torch.testing.assert_close(vitkern.window_attention(q, k, v, 4, 2, mask_value=-1e9, backend=backend), exact)


@pytest.mark.parametrize("backend", testing.backends())
def test_a_map_shifted_by_whole_windows_gives_the_shifted_result(backend):
    q, k, v = qkv(1, 12, 8, 2, 8)
    moved = [t.roll((4, 4), (1, 2)) for t in (q, k, v)]
    out = vitkern.window_attention(q, k, v, 4, backend=backend)
    assert torch.equal(vitkern.window_attention(*moved, 4, backend=backend), out.roll((4, 4), (1, 2)))


@pytest.mark.parametrize("backend", testing.backends())
def test_offsets_beyond_two_to_the_31(backend):
    storage = torch.empty(1, dtype=torch.bfloat16).expand(1)
    try:
        storage = torch.zeros((1 << 31) + 4096, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB are not to be had")
    q = storage.as_strided((2, 4, 1, 8), (1 << 31, 8, 8, 1))
    small = torch.randn(2, 4, 1, 8).bfloat16()
    q.copy_(small)
    out = vitkern.window_attention(q, q, q, 2, backend=backend)
    assert torch.equal(out, vitkern.window_attention(small, small, small, 2, backend=backend))


@pytest.mark.parametrize("backend", testing.backends())
def test_dropout_draws_the_same_pattern_everywhere_and_another_for_another_seed(backend):
    q, k, v = qkv(2, 6, 6, 2, 8)

    def run(seed, backend):
        return vitkern.window_attention(q, k, v, 3, dropout_p=0.5, dropout_seed=seed, backend=backend)

    torch.testing.assert_close(run(7, backend), run(7, "reference"))
    torch.testing.assert_close(run(torch.tensor([7]), backend), run(7, backend))
    assert not torch.allclose(run(7, backend), run(8, backend))
    torch.manual_seed(0)
    first = run(None, backend)
    torch.manual_seed(0)
    assert torch.equal(run(None, backend), first)


# refusals ------------------------------------------------------------------------------------------------------------------

Q = torch.zeros(2, 6, 6, 2, 8)
REFUSALS = [
    ("rank", TypeError, "q must be a tensor, got NoneType", lambda: (None, Q, Q, 3), {}),
    ("rank 3", ValueError, r"q must have shape .* got \[2, 6, 8\]", lambda: (torch.zeros(2, 6, 8),) * 3 + (3,), {}),
    ("rank of k", ValueError, r"k must have the rank of q \(5\), got 4", lambda: (Q, Q[:, 0], Q, 3), {}),
    ("map of k", ValueError, r"v must have the batch and map of k, \[2, 5, 6\], got \[2, 6, 6\]", lambda: (Q, Q[:, :5], Q, 3), {}),
    ("heads", ValueError, r"heads of k must divide the heads of q \(2\), got 3", lambda: (Q, torch.zeros(2, 6, 6, 3, 8), Q, 3), {}),
    ("heads of v", ValueError, r"v must have the heads of k \(2\), got 1", lambda: (Q, Q, Q[..., :1, :], 3), {}),
    ("head size", ValueError, r"k must have the head size of q \(8\), got 4", lambda: (Q, Q[..., :4], Q, 3), {}),
    ("wide head", ValueError, r"head size of v must be 1 to 256, got 257", lambda: (Q, Q, torch.zeros(2, 6, 6, 2, 257), 3), {}),
    ("device", ValueError, r"v must be on the device of q \(cpu\), got meta", lambda: (Q, Q, Q.to("meta"), 3), {}),
    ("integers", TypeError, r"q must be float32.*got torch.int64", lambda: (Q.long(),) * 3 + (3,), {}),
    ("mixed dtypes", TypeError, r"k must have the dtype of q \(torch.float32\), got torch.bfloat16", lambda: (Q, Q.bfloat16(), Q, 3), {}),
    ("window 0", ValueError, r"window_size must be at least 1 on every axis, got 0", lambda: (Q, Q, Q, 0), {}),
    ("window -1", ValueError, r"window_size must be at least 1 on every axis, got \(3, -1\)", lambda: (Q, Q, Q, (3, -1)), {}),
    ("window axes", ValueError, r"one entry per map axis \(2\), got \(3, 3, 3\)", lambda: (Q, Q, Q, (3, 3, 3)), {}),
    ("window type", TypeError, r"window_size must hold ints, got 2.5", lambda: (Q, Q, Q, 2.5), {}),
    ("shift", ValueError, r"shift_size must be .* less than window_size \[3, 3\], got 3", lambda: (Q, Q, Q, 3, 3), {}),
    ("negative shift", ValueError, r"shift_size must be at least 0 .*got -1", lambda: (Q, Q, Q, 3, -1), {}),
    ("bias shape", ValueError, r"bias must broadcast to \[heads, N, N\] = \[2, 9, 9\], got \[2, 9, 8\]", None, {"bias": torch.zeros(2, 9, 8)}),
    ("bias dtype", TypeError, r"bias must be float32.*got torch.int32", None, {"bias": torch.zeros(2, 9, 9, dtype=torch.int32)}),
    ("bias type", TypeError, r"bias must be a tensor, a modifier of vitkern.bias or a list of these, got str", None, {"bias": "table"}),
    ("table rows", ValueError, r"bias.table must have 25 rows .* got 24", None, {"bias": RelativePosition(torch.zeros(24, 2))}),
    ("table heads", ValueError, r"bias.table must have shape \[rows, heads=2\], got \[25, 3\]", None, {"bias": RelativePosition(torch.zeros(25, 3))}),
    ("sign", ValueError, r"bias.sign must be one of .* got 'q-k'", None, {"bias": RelativePosition(torch.zeros(25, 2), sign="q-k")}),
    ("index dtype", TypeError, r"bias.index must be int32, got torch.int64", None,
     {"bias": RelativePosition(torch.zeros(25, 2), torch.zeros(9, 9, dtype=torch.int64))}),
    ("index shape", ValueError, r"bias.index must have shape \[N, N\] = \[9, 9\], got \[9, 8\]", None,
     {"bias": RelativePosition(torch.zeros(25, 2), torch.zeros(9, 8, dtype=torch.int32))}),
    ("cosine type", TypeError, r"cosine must be a CosineScore or None, got float", None, {"cosine": 2.0}),
    ("cosine heads", ValueError, r"one element per head \(2\), got \[3\]", None, {"cosine": CosineScore(torch.zeros(3))}),
    ("cosine scale", ValueError, r"scale must be None with cosine", None, {"cosine": CosineScore(torch.zeros(2)), "scale": 1.0}),
    ("scale type", TypeError, r"scale must be a number or None, got str", None, {"scale": "8"}),
    ("pads", ValueError, r"pad_kv must be None, 'zero' or a pair", None, {"pad_kv": "mean"}),
    ("pad shape", ValueError, r"v_pad must have shape .* = \[2, 8\], got \[2, 7\]", None, {"pad_kv": (torch.zeros(2, 8), torch.zeros(2, 7))}),
    ("pad order", ValueError, r"pad_order must be 'pad_roll' or 'roll_pad', got 'roll'", None, {"pad_order": "roll"}),
    ("mask value", ValueError, r"mask_value must be None or a number that is not positive, got 5.0", None, {"mask_value": 5.0}),
    ("dropout", ValueError, r"dropout_p must be in \[0, 1\), got 1.0", None, {"dropout_p": 1.0}),
    ("seed", ValueError, r"dropout_seed must be an int or one int64 element", None, {"dropout_p": 0.5, "dropout_seed": torch.zeros(2)}),
    ("back-end", ValueError, r"backend must be one of reference, cpu, triton, cuda, got 'gpu'", None, {"backend": "gpu"}),
]  # fmt: skip


@pytest.mark.parametrize("name, error, sentence, args, options", REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals_name_the_argument_what_it_got_and_what_it_wanted(name, error, sentence, args, options):
    with pytest.raises(error, match=sentence):
        vitkern.window_attention(*(args() if args else (Q, Q, Q, 3)), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", [25, -1])
def test_an_index_out_of_the_table_is_refused(backend, entry):
    index = torch.full((9, 9), entry, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"bias.index must lie in \[0, 25\).*got entries from"):
        vitkern.window_attention(Q, Q, Q, 3, bias=RelativePosition(torch.zeros(25, 2), index), backend=backend)


def test_a_named_back_end_that_cannot_run_gives_the_reasons_of_each():
    with pytest.raises(ValueError, match=r"backend='triton' cannot run") as refusal:
        vitkern.window_attention(Q, Q, Q, 3, backend="triton")
    text = str(refusal.value)
    assert (
        "reference: can run" in text
        and "triton: the tensors are on cpu" in text
        and "cuda: the tensors are on cpu" in text
    )
    assert "runs on" in vitkern.explain(vitkern.window_attention, Q, Q, Q, 3)


def test_qkvpacked_refuses_a_tensor_that_is_not_packed():
    with pytest.raises(ValueError, match=r"qkv must have shape .* got \[2, 6, 6, 2, 8\]"):
        vitkern.window_attention_qkvpacked(Q, 3)
