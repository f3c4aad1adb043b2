"""neighborhood_attention and its halves: brute force, agreement with torch and with our other ops, edges and refusals."""

import itertools
import math

import memory
import pytest
import torch
import torch.nn.functional as F

import vitkern
from vitkern import testing
from vitkern.reference.neighborhood_attention import axis
from vitkern.testing.neighborhood_attention import make

ENTRY = testing.entries()["neighborhood_attention"]
ON = pytest.mark.parametrize("backend", ["reference", *testing.backends()])
nan, inf = math.nan, math.inf


def qkv(*shape, seed=0, dtype=torch.float64):
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind(0)


# the window --------------------------------------------------------------------------------------------------------------


def chosen(tokens, at, kernel, stride, causal):
    """The keys of the token at place `at` of its group, by search: those of its block's leader, K in a row about it."""
    block = tokens[at // stride * stride :][:stride]
    leader = tokens.index(block[-1]) if causal else min(at // stride * stride + stride // 2, len(tokens) - 1)
    if causal:
        return [t for t in tokens[: leader + 1][-kernel:] if t <= tokens[at]]
    start = min(range(len(tokens) - kernel + 1), key=lambda s: abs(s + kernel // 2 - leader))
    return tokens[start : start + kernel]


@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_those_of_a_search_over_all_small_maps(causal):
    for length in range(1, 13):
        for dilation in range(1, length + 1):
            for kernel in range(1, length // dilation + 1):
                for stride in range(1, kernel + 1):
                    key, seen, row = axis(length, kernel, dilation, stride, causal, False, "cpu")
                    for i in range(length):
                        group = list(range(i % dilation, length, dilation))
                        want = chosen(group, i // dilation, kernel, stride, causal)
                        assert key[i][seen[i]].tolist() == want, (length, kernel, dilation, stride, i)
                        steps = [(k - i) // dilation + kernel - 1 for k in want]
                        assert row[i][seen[i]].tolist() == steps


@pytest.mark.parametrize("backend", testing.backends())
def test_all_small_maps_match_the_definition(backend):
    x = torch.randn(3, 1, 12, 1, 3, dtype=torch.float64)
    for length, causal in itertools.product(range(1, 13), (False, True)):
        for dilation in range(1, length + 1):
            for kernel in range(1, length // dilation + 1):
                for stride in range(1, kernel + 1):
                    options = {"dilation": dilation, "stride": stride, "is_causal": causal}
                    q, k, v = x[:, :, :length]
                    want, got = (
                        vitkern.neighborhood_attention(q, k, v, kernel, **options, backend=b)
                        for b in ("reference", backend)
                    )
                    torch.testing.assert_close(got, want, msg=str((length, kernel, options)))


@ON
def test_a_kernel_as_large_as_the_map_is_full_attention(backend):
    q, k, v = qkv(2, 5, 4, 3, 6)
    rpb = torch.randn(3, 9, 7, dtype=torch.float64)
    y, x = (torch.arange(20) // 4, torch.arange(20) % 4)
    bias = rpb[:, y[None] - y[:, None] + 4, x[None] - x[:, None] + 3]  # key minus query
    full = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
    got = vitkern.neighborhood_attention(q, k, v, (5, 4), rpb=rpb, backend=backend)
    torch.testing.assert_close(got, full.transpose(1, 2).unflatten(1, (5, 4)))


@ON
def test_a_stride_as_large_as_the_kernel_is_attention_in_windows(backend):
    q, k, v = qkv(2, 8, 9, 2, 5)
    got = vitkern.neighborhood_attention(q, k, v, (4, 3), stride=(4, 3), backend=backend)
    torch.testing.assert_close(got, vitkern.window_attention(q, k, v, (4, 3), backend=backend))


@ON
def test_dilation_is_attention_in_each_group(backend):
    q, k, v = qkv(1, 12, 9, 2, 4)
    got = vitkern.neighborhood_attention(q, k, v, (3, 2), dilation=(4, 3), backend=backend)
    for a, b in itertools.product(range(4), range(3)):
        part = vitkern.neighborhood_attention(*(t[:, a::4, b::3] for t in (q, k, v)), (3, 2), backend=backend)
        torch.testing.assert_close(got[:, a::4, b::3], part)


@ON
def test_zeros_at_the_border_are_torchs_unfold(backend):
    q, k, v = qkv(2, 6, 7, 2, 4)
    near = [
        F.unfold(t.flatten(3).movedim(-1, 1), 3, padding=1).view(2, 2, 4, 9, 6, 7) for t in (k, v)
    ]  # [B, H, D, n, y, x]
    weight = torch.einsum("byxhd,bhdnyx->byxhn", q, near[0]).mul(0.5).softmax(-1)
    want = torch.einsum("byxhn,bhdnyx->byxhd", weight, near[1])
    torch.testing.assert_close(vitkern.neighborhood_attention(q, k, v, 3, border="zero", backend=backend), want)


@ON
@pytest.mark.parametrize(
    "options", [{}, {"dilation": 2}, {"is_causal": (True, False), "stride": 2}, {"border": "zero"}], ids=str
)
def test_the_two_halves_are_the_whole(options, backend):
    q, k, v = (t.requires_grad_() for t in qkv(2, 7, 8, 2, 5))
    rpb = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    whole = vitkern.neighborhood_attention(q, k, v, (3, 4), rpb=rpb, **options, backend=backend)
    scores = vitkern.neighborhood_qk(q, k, (3, 4), rpb=rpb, **options, backend=backend)
    options = {name: x for name, x in options.items() if name != "rpb"}
    halves = vitkern.neighborhood_av(scores.softmax(-1), v, (3, 4), **options, backend=backend)
    torch.testing.assert_close(halves, whole)
    weight = torch.randn_like(whole)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v, rpb)) for o in (whole, halves)), strict=True):
        torch.testing.assert_close(a, b)


# what a kernel does on the way -------------------------------------------------------------------------------------------

LARGE = [
    make(1, (14, 16), (12, 13), d=2, heads=1),  # more keys than are gathered at once
    make(2, (36, 34), (33, 32), d=1, heads=1, batch=1),  # a table of offsets too large to lay out by lanes
    make(3, (60, 9), (3, 3), heads=1, batch=1, extra=3),  # bands
    make(4, (5, 70), (2, 5), heads=2, kv_heads=1, batch=1, border="zero", dilation=(1, 2)),
    make(5, (10, 10), (2, 2), heads=1, batch=3, dilation=5, extra=2, extra_batch=True),  # more groups than tasks
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", LARGE, ids=lambda c: str(c.seed))
@pytest.mark.parametrize("backend", testing.backends())
def test_large_windows_and_bands_match(call, dtype, backend):
    testing.assert_matches(ENTRY, call, dtype, backend)


@ON
@pytest.mark.parametrize("what", ["k", "v"])
def test_what_is_not_finite_stays_with_those_who_see_it(what, backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 9, 9, 1, 4))
    spoilt = {"k": k, "v": v}[what].detach().clone()
    spoilt[0, 4, 4, 0, 1] = inf
    given = {"k": k, "v": v} | {what: spoilt}
    clean = vitkern.neighborhood_attention(q, k, v, 3, backend=backend)
    got = vitkern.neighborhood_attention(q, given["k"], given["v"], 3, backend=backend)
    sees = torch.zeros(9, 9, dtype=torch.bool)
    sees[3:6, 3:6] = True
    assert got[0, sees, 0, 1].isnan().all() and torch.equal(got[0, ~sees], clean[0, ~sees])
    (dq,) = torch.autograd.grad(got[0, ~sees].sum(), q)
    assert dq[0, ~sees].isfinite().all()


@ON
def test_gradients_of_what_is_not_finite_stay_with_what_it_sees(backend):
    q, k, v = (t.requires_grad_() for t in qkv(1, 9, 9, 1, 4))
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[3:6, 3:6] = True
    spoilt = q.detach().clone()
    spoilt[0, 4, 4, 0, 1] = nan
    out = vitkern.neighborhood_attention(spoilt, k, v, 3, backend=backend)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert grad[0, seen].isnan().all() and grad[0, ~seen].isfinite().all()
    weight = torch.ones_like(v)
    weight[0, 4, 4, 0, 1] = nan
    out = vitkern.neighborhood_attention(q, k, v, 3, backend=backend)
    dk, dv = torch.autograd.grad(out, (k, v), weight)
    assert dk[0, seen].isnan().all() and dk[0, ~seen].isfinite().all()
    assert dv[0, seen][..., 1].isnan().all() and dv[0, ~seen].isfinite().all()


@ON
def test_a_bias_that_hides_an_offset_hides_what_is_there(backend):
    q, k, v = qkv(1, 9, 9, 1, 4)
    rpb = torch.zeros(1, 5, 5, dtype=torch.float64)
    rpb[0, 2, 3] = -inf  # the key to the right
    clean = vitkern.neighborhood_attention(q, k, v, 3, rpb=rpb, backend=backend)
    k[0, 4, 4], v[0, 4, 4] = nan, inf
    got = vitkern.neighborhood_attention(q, k, v, 3, rpb=rpb, backend=backend)
    assert torch.equal(got[0, 4, 3], clean[0, 4, 3]) and got[0, 4, 5].isnan().all()


@ON
def test_a_key_that_is_hidden_may_be_anything(backend):
    q, k, v = (t.requires_grad_() for t in qkv(2, 6, 6, 2, 4))
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, 2:5, 1:4] = False
    nans = torch.where(mask[..., None, None], 0.0, nan)
    out, stats = vitkern.neighborhood_attention(
        q, k + nans, v + nans, 3, key_mask=mask, return_stats=("lse",), backend=backend
    )
    assert out.isfinite().all() and bool((out[0, 3, 2] == 0).all()) and bool((stats.lse[0, 3, 2] == -inf).all())
    for grad in torch.autograd.grad(out.sum() + stats.lse[stats.lse > -inf].sum(), (q, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", testing.backends())
def test_memory_is_that_of_inputs_and_outputs(backend):
    setup = f"""
torch.set_num_threads(2)
def call(n):
    q, k, v = (torch.randn(1, n, n, 4, 32, requires_grad=True) for _ in range(3))
    rpb = torch.randn(4, 13, 13, requires_grad=True)
    return vitkern.neighborhood_attention(q, k, v, 7, rpb=rpb, backend={backend!r}).sum()
call(16).backward()
"""
    grown = memory.grown(setup, "call(160).backward()")
    tensor = 160 * 160 * 4 * 32 * 4
    assert grown < 12 * tensor  # inputs, output, their gradients; the windows alone would be 49 of k and v each


# refusals ----------------------------------------------------------------------------------------------------------------

X = torch.zeros(1, 6, 6, 2, 4)


@pytest.mark.parametrize(
    "options, kind, sentence",
    [
        (
            {"kernel_size": 7},
            ValueError,
            r"kernel_size times dilation must not exceed the map, got 7 \* 1 for an axis of 6",
        ),
        ({"dilation": (1, 3)}, ValueError, r"kernel_size times dilation must not exceed the map, got 3 \* 3"),
        ({"stride": 4}, ValueError, r"stride must lie in \[1, kernel_size\] = \[1, 3\], got 4"),
        ({"kernel_size": (3, 0)}, ValueError, "kernel_size and dilation must be at least 1"),
        ({"kernel_size": (3, 3, 3)}, ValueError, r"kernel_size must be an int or have one entry per map axis \(2\)"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool or one per axis"),
        ({"border": "wrap"}, ValueError, "border must be 'shift' or 'zero', got 'wrap'"),
        ({"border": "zero", "is_causal": True}, ValueError, "border='zero' must come without is_causal"),
        (
            {"rpb": torch.zeros(2, 5, 4)},
            ValueError,
            r"rpb must have shape \[H, 2 K - 1 per axis\] = \[2, 5, 5\], got \[2, 5, 4\]",
        ),
        ({"key_mask": torch.zeros(1, 6, 6)}, TypeError, "key_mask must be bool, got torch.float32"),
        ({"extra_kv": torch.zeros(2, 1)}, TypeError, "extra_kv must be None or a pair of tensors, got Tensor"),
        (
            {"extra_kv": (torch.zeros(2, 1, 2, 4),) * 2},
            ValueError,
            r"must have shape \[B\|1, E, 2, 4\] with B = 1, got \[2, 1, 2, 4\]",
        ),
        ({"return_stats": ("row",)}, ValueError, r"return_stats must be \(\) or \('lse',\), got \('row',\)"),
    ],
)
def test_refusals_are_sentences(options, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.neighborhood_attention(X, X, X, **{"kernel_size": 3} | options)


def test_weights_must_fit_the_window():
    with pytest.raises(
        ValueError,
        match=r"attention must have shape \[B, \*spatial, H, n\] = \[1, 6, 6, 'H', 9\] with H a multiple of 2",
    ):
        vitkern.neighborhood_av(torch.zeros(1, 6, 6, 2, 8), X, 3)
