"""sampled_window_attention: agreement with torch's grid_sample and with window_attention, places, edges and refusals."""

import math

import memory
import pytest
import torch
import torch.nn.functional as F

import vitkern
from vitkern import testing
from vitkern.bias import DecomposedRelativePosition, RelativePosition
from vitkern.testing.sampled_window_attention import make

ENTRY = testing.entries()["sampled_window_attention"]
ON = pytest.mark.parametrize("backend", ["reference", *testing.backends()])
nan, inf = math.nan, math.inf


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(batch, counts, samples, groups, size, seed=0):
    """Places on and around a map of `size` (height, width)."""
    drawn = torch.rand(
        (batch, *counts, samples, groups, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return drawn * torch.tensor([size[1] + 3.0, size[0] + 3.0], dtype=torch.float64) - 2


def identity(batch, height, width, w):
    """The places of every window's own cells: [B, nWy, nWx, w w, 1, 2]."""
    rows, columns = -(-height // w[0]), -(-width // w[1])
    y = (torch.arange(rows)[:, None] * w[0] + torch.arange(w[0])).view(rows, 1, w[0], 1)
    x = (torch.arange(columns)[:, None] * w[1] + torch.arange(w[1])).view(1, columns, 1, w[1])
    both = torch.stack((x.expand(rows, columns, *w), y.expand(rows, columns, *w)), -1).flatten(2, 3)
    return both[None, ..., None, :].expand(batch, -1, -1, -1, -1, -1).double()


def by_grid_sample(q, k, v, w, coords, coords_v=None, scale=None):
    """As the papers' repositories do it: the samples of every head by grid_sample, then SDPA in windows."""
    batch, height, width, heads, _ = q.shape
    counts, samples, groups = coords.shape[1:3], *coords.shape[3:5]

    def sampled(x, where):
        parts = max(groups // heads, 1)
        size = torch.tensor([x.shape[2] - 1, x.shape[1] - 1], dtype=x.dtype)
        grid = (2 * where / size - 1).expand(-1, -1, -1, -1, heads * parts, -1).permute(0, 4, 1, 2, 3, 5)
        grid = grid.reshape(-1, counts[0] * counts[1], samples, 2)
        maps = x.permute(0, 3, 4, 1, 2).reshape(batch * heads * parts, -1, *x.shape[1:3])
        found = F.grid_sample(maps, grid, align_corners=True, padding_mode="zeros")  # [B heads parts, c, windows, K]
        return found.reshape(batch, heads, -1, *found.shape[2:]).permute(0, 3, 1, 4, 2)  # [B, windows, heads, K, C]

    padded = F.pad(q, (0, 0, 0, 0, 0, -width % w[1], 0, -height % w[0]))
    rows = padded.reshape(batch, counts[0], w[0], counts[1], w[1], heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
    rows = rows.reshape(batch, -1, heads, w[0] * w[1], q.shape[-1])
    values = sampled(v, coords if coords_v is None else coords_v)
    out = F.scaled_dot_product_attention(rows, sampled(k, coords), values, scale=scale)
    out = out.reshape(batch, *counts, heads, *w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(*padded.shape[:4], -1)[:, :height, :width]


# what others compute -----------------------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_it_is_grid_sample_and_sdpa(groups, apart, backend):
    q = normal(2, 7, 10, 2, 6).requires_grad_()
    k, v = (normal(2, 9, 5, 2, 6, seed=s).requires_grad_() for s in (1, 2))
    places = [spread(2, (2, 3), 7, groups, (9, 5), seed=s).requires_grad_() for s in (3, 4)[: 1 + apart]]
    inputs = (q, k, v, *places)
    got = vitkern.sampled_window_attention(
        q, k, v, (4, 4), places[0], scale=0.7, coords_v=places[1] if apart else None, backend=backend
    )
    want = by_grid_sample(q, k, v, (4, 4), places[0], places[1] if apart else None, scale=0.7)
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), inputs) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@ON
@pytest.mark.parametrize("size", [(8, 12), (9, 10), (3, 2)], ids=str)
def test_the_places_of_the_cells_themselves_are_attention_in_windows(size, backend):
    q, k, v = (normal(2, *size, 4, 6, seed=s) for s in range(3))
    k, v = k[:, :, :, :2], v[:, :, :, :2]
    table = normal(35, 4, seed=3)
    places = identity(2, *size, (4, 3))
    for choice, pads in (("zero", "zero"), ("mask", None)):
        want = vitkern.window_attention(q, k, v, (4, 3), bias=RelativePosition(table), pad_kv=pads, backend=backend)
        got = vitkern.sampled_window_attention(
            q, k, v, (4, 3), places, bias=RelativePosition(table), out_of_range=choice, backend=backend
        )
        torch.testing.assert_close(got, want)


@ON
def test_decomposed_positions_are_those_of_attention(backend):
    q, k, v = (normal(1, 6, 6, 2, 4, seed=s) for s in range(3))
    rel_h, rel_w = (normal(5, 4, seed=s) for s in (4, 5))
    bias = DecomposedRelativePosition(rel_h, rel_w, (3, 3), (3, 3))
    got = vitkern.sampled_window_attention(q, k, v, 3, identity(1, 6, 6, (3, 3)), bias=bias, backend=backend)
    for y in (0, 3):
        for x in (0, 3):
            window = (t[:, y : y + 3, x : x + 3].flatten(1, 2) for t in (q, k, v))
            part = vitkern.attention(*window, bias=bias).unflatten(1, (3, 3))
            torch.testing.assert_close(got[:, y : y + 3, x : x + 3], part)


@ON
def test_a_map_of_another_size_and_any_number_of_samples(backend):
    """The window being the map: every query sees the same samples (S2LIC)."""
    q, k, v = normal(1, 4, 5, 2, 4), normal(1, 8, 3, 2, 4, seed=1), normal(1, 8, 3, 2, 4, seed=2)
    places = identity(1, 8, 3, (8, 3))
    got = vitkern.sampled_window_attention(q, k, v, (4, 5), places, backend=backend)
    rows = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    want = F.scaled_dot_product_attention(*rows).transpose(1, 2).unflatten(1, (4, 5))
    torch.testing.assert_close(got, want)


# places ------------------------------------------------------------------------------------------------------------------


@ON
def test_places_stay_exact_beside_half_precision(backend):
    """One in float16 would be off by up to 0.06 of a cell here."""
    q, k, v = (normal(1, 2, 200, 1, 4, seed=s) for s in range(3))
    places = spread(1, (1, 50), 6, 1, (2, 200)).float()
    low = [t.to(torch.float16) for t in (q, k, v)]
    out = vitkern.sampled_window_attention(*low, (2, 4), places, backend=backend)
    want = vitkern.sampled_window_attention(*(t.double() for t in low), (2, 4), places.double(), backend="reference")
    rounded = vitkern.sampled_window_attention(
        *(t.double() for t in low), (2, 4), places.half().double(), backend="reference"
    )
    assert (out - want).abs().max() < 0.1 * (rounded - want).abs().max()


@ON
@pytest.mark.parametrize("choice", ["zero", "mask"])
@pytest.mark.parametrize("where", [nan, inf, -inf, 1e20, -1.0, 6.0])
def test_a_place_outside_is_a_zero_or_hidden(where, choice, backend):
    q, k, v = (normal(1, 2, 2, 1, 4, seed=s).requires_grad_() for s in range(3))
    k, v = (F.pad(t.detach(), (0, 0, 0, 0, 0, 4)).requires_grad_() for t in (k, v))  # a map of 2 x 6
    places = (
        torch.tensor([[0.25, 0.5], [where, 1.0], [1.0, 0.0]], dtype=torch.float64)
        .view(1, 1, 1, 3, 1, 2)
        .requires_grad_()
    )
    out = vitkern.sampled_window_attention(q, k, v, 2, places, out_of_range=choice, backend=backend)
    seen = places[:, :, :, ::2]
    kept = vitkern.sampled_window_attention(q, k, v, 2, seen, backend="reference")
    if choice == "zero":  # one more key and value of zeros
        s = torch.einsum("byxhd,bjhd->byxhj", q, by_hand(k, seen)) / 2
        share = s.exp().sum(-1) / (s.exp().sum(-1) + 1)
        kept = kept * share[..., None]
    torch.testing.assert_close(out, kept)
    grads = torch.autograd.grad(out.sum(), (q, k, v, places))
    wants = torch.autograd.grad(kept.sum(), (q, k, v, places))
    for a, b in zip(grads, wants, strict=True):
        torch.testing.assert_close(a, b)
    assert bool((grads[3][:, :, :, 1] == 0).all())


def by_hand(k, places):
    """The samples [B, K, H, D] at the places (x, y) of one window, inside the map."""
    x, y = places[0, 0, 0, :, 0].unbind(-1)
    left, top = x.detach().floor().clamp(max=k.shape[2] - 2).long(), y.detach().floor().clamp(max=k.shape[1] - 2).long()
    fx, fy = (x - left)[:, None, None], (y - top)[:, None, None]
    corner = [[k[0, top + a, left + b] for b in (0, 1)] for a in (0, 1)]
    upper, lower = ((1 - fx) * row[0] + fx * row[1] for row in corner)
    return ((1 - fy) * upper + fy * lower)[None]


@ON
def test_groups_of_a_head_are_hidden_only_together(backend):
    q, k, v = (normal(1, 2, 2, 1, 4, seed=s) for s in range(3))
    places = torch.zeros(1, 1, 1, 2, 2, 2, dtype=torch.float64)
    places[0, 0, 0, 0, 1] = 50.0  # half of sample 0 outside
    places[0, 0, 0, 1] = 50.0  # sample 1 as a whole
    out = vitkern.sampled_window_attention(q, k, v, 2, places, out_of_range="mask", backend=backend)
    want = torch.cat((v[0, 0, 0, 0, :2], torch.zeros(2, dtype=torch.float64)))
    torch.testing.assert_close(out, want.expand_as(out))
    places[:] = 50.0
    assert bool((vitkern.sampled_window_attention(q, k, v, 2, places, out_of_range="mask", backend=backend) == 0).all())


@ON
def test_the_places_of_values_hide_nothing(backend):
    q, k, v = (normal(1, 2, 2, 1, 4, seed=s) for s in range(3))
    own = identity(1, 2, 2, (2, 2))
    out = vitkern.sampled_window_attention(q, k, v, 2, own, coords_v=own + 50, out_of_range="mask", backend=backend)
    assert bool((out == 0).all())
    hidden = vitkern.sampled_window_attention(q, k, v, 2, own + 50, coords_v=own, out_of_range="mask", backend=backend)
    assert bool((hidden == 0).all())


# what is not finite ------------------------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("what", ["k", "v"])
def test_what_is_not_finite_stays_with_those_who_see_it(what, backend):
    q, k, v = (normal(1, 4, 4, 1, 4, seed=s).requires_grad_() for s in range(3))
    bias = torch.zeros(1, 4, 4, dtype=torch.float64)
    bias[0, 2, 0] = -inf  # query 2 of a window does not see sample 0, the only one that reads the first cell
    spoilt = {"k": k, "v": v}[what].detach().clone()
    spoilt[0, 0, 0, 0, 3] = inf
    given = {"k": k, "v": v} | {what: spoilt}
    places = identity(1, 4, 4, (2, 2))
    clean = vitkern.sampled_window_attention(q, k, v, 2, places, bias=bias, backend=backend)
    got = vitkern.sampled_window_attention(q, given["k"], given["v"], 2, places, bias=bias, backend=backend)
    sees = torch.zeros(4, 4, dtype=torch.bool)
    sees[0, 0] = sees[0, 1] = sees[1, 1] = True
    assert got[0, sees, 0, 3].isnan().all() and torch.equal(got[0, ~sees], clean[0, ~sees])
    (dq,) = torch.autograd.grad(got[0, ~sees].sum(), q)
    assert dq[0, ~sees].isfinite().all()


@ON
def test_cells_that_no_place_reads_may_be_anything(backend):
    q, k, v = (normal(2, 4, 6, 2, 4, seed=s).requires_grad_() for s in range(3))
    nans = torch.zeros(2, 4, 6, 1, 1, dtype=torch.float64)
    nans[:, :, 3:] = nan
    places = spread(2, (2, 3), 5, 2, (2, 1)).requires_grad_()
    inputs = (q, k, v, places)
    for choice in ("zero", "mask"):
        out = vitkern.sampled_window_attention(q, k + nans, v + nans, 2, places, out_of_range=choice, backend=backend)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("backend", testing.backends())
def test_gradients_of_what_is_not_finite_stay_with_what_it_sees(backend):
    q, k, v = (normal(1, 2, 2, 1, 4, seed=s).requires_grad_() for s in range(3))
    bias = torch.zeros(1, 4, 4, dtype=torch.float64)
    bias[0, 2, 0] = -inf
    places, unseen, seen = identity(1, 2, 2, (2, 2)), (0, 0, 0), (0, 0, 1)
    spoilt = q.detach().clone()
    spoilt[0, 1, 0, 0, 1] = nan  # query 2
    for given, weight in ((spoilt, None), (q, nan)):
        out = vitkern.sampled_window_attention(given, k, v, 2, places, bias=bias, backend=backend)
        upstream = torch.ones_like(out)
        if weight is not None:
            upstream[0, 1, 0, 0, 1] = weight
        dk, dv = torch.autograd.grad(out, (k, v), upstream)
        assert dk[unseen].isfinite().all() and dv[unseen].isfinite().all()
        assert dv[seen].isnan().any() and dk[seen].isnan().any()


# what a kernel does on the way -------------------------------------------------------------------------------------------

LARGE = [
    make(1, (12, 13), (12, 13), heads=1, d=5, samples=70, bias="dense"),  # several blocks of queries
    make(2, (9, 20), (9, 10), heads=2, kv_heads=1, d=7, batch=1, bias="both", groups=2),
    make(3, (4, 4), (2, 2), batch=70, heads=2, d=3, bias="table"),  # more images than sums of a bias
    make(4, (16, 18), (2, 2), batch=1, heads=1, d=3, bias="dense", groups=3, places="one"),  # slices of windows
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", LARGE, ids=lambda c: str(c.seed))
@pytest.mark.parametrize("backend", testing.backends())
def test_large_windows_and_many_images_match(call, dtype, backend):
    testing.assert_matches(ENTRY, call, dtype, backend)


@ON
def test_images_do_not_mix(backend):
    q, k, v = (normal(3, 4, 5, 2, 4, seed=s) for s in range(3))
    places = spread(3, (2, 2), 6, 2, (4, 5))
    together = vitkern.sampled_window_attention(q, k, v, (2, 3), places, backend=backend)
    for b in range(3):
        alone = vitkern.sampled_window_attention(
            *(t[b : b + 1] for t in (q, k, v)), (2, 3), places[b : b + 1], backend=backend
        )
        assert torch.equal(together[b : b + 1], alone)


def test_vmap_over_images_places_and_a_bias():
    q, k, v = (normal(3, 2, 4, 4, 2, 4, seed=s) for s in range(3))
    places, bias = spread(6, (2, 2), 4, 2, (4, 4)).unflatten(0, (3, 2)), normal(5, 2, 4, 4, seed=4)
    got = torch.func.vmap(lambda *t: vitkern.sampled_window_attention(*t[:3], 2, t[3]))(q, k, v, places)
    each = [vitkern.sampled_window_attention(*t[:3], 2, t[3]) for t in zip(q, k, v, places, strict=True)]
    torch.testing.assert_close(got, torch.stack(each))
    got = torch.func.vmap(lambda b: vitkern.sampled_window_attention(q[0], k[0], v[0], 2, places[0], bias=b))(bias)
    each = [vitkern.sampled_window_attention(q[0], k[0], v[0], 2, places[0], bias=b) for b in bias]
    torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("backend", testing.backends())
def test_memory_is_that_of_inputs_and_outputs(backend):
    setup = f"""
torch.set_num_threads(2)
def call(n):
    q, k, v = (torch.randn(1, n, n, 4, 32, requires_grad=True) for _ in range(3))
    coords = torch.rand(1, n // 8, n // 8, 64, 4, 2).mul_(n).requires_grad_()
    return vitkern.sampled_window_attention(q, k, v, 8, coords, backend={backend!r}).sum()
call(16).backward()
"""
    grown = memory.grown(setup, "call(160).backward()")
    tensor = 160 * 160 * 4 * 32 * 4
    assert grown < 20 * tensor  # inputs, output, gradients, and four partial sums of the maps of k and v


# refusals ----------------------------------------------------------------------------------------------------------------

X = torch.zeros(1, 4, 6, 2, 4)
C = torch.zeros(1, 2, 2, 6, 1, 2)


@pytest.mark.parametrize(
    "options, kind, sentence",
    [
        ({"window_size": (2, 0)}, ValueError, "window_size must be at least 1 on every axis"),
        ({"window_size": (2, 3, 1)}, ValueError, r"window_size must be an int or have one entry per map axis \(2\)"),
        (
            {"coords": C[:, :1]},
            ValueError,
            r"coords must have shape \[B, nWy, nWx, K, G, 2\] = \[1, 2, 2, 'K', 'G', 2\]",
        ),
        ({"coords": C.long()}, TypeError, "coords must be float32"),
        (
            {"coords": C.expand(-1, -1, -1, -1, 3, -1)},
            ValueError,
            r"groups of coords must be 1, heads \(2\) or heads \* r",
        ),
        ({"coords": C.repeat(1, 1, 1, 1, 6, 1)}, ValueError, "r dividing the head sizes 4 and 4, got 6"),
        ({"coords_v": C[:, :, :, :3]}, ValueError, "coords_v must have shape that of coords"),
        ({"out_of_range": "clamp"}, ValueError, "out_of_range must be 'zero' or 'mask', got 'clamp'"),
        ({"scale": "big"}, TypeError, "scale must be a number or None, got 'big'"),
        (
            {"bias": torch.zeros(3, 6, 6)},
            ValueError,
            r"bias must broadcast to \[heads, N, K\] = \[2, 6, 6\], got \[3, 6, 6\]",
        ),
        ({"bias": RelativePosition(torch.zeros(7, 2))}, ValueError, "bias.table must have 15 rows"),
        (
            {"bias": RelativePosition(torch.zeros(15, 2)), "coords": C[:, :, :, :4]},
            ValueError,
            r"as many samples as a window has queries \(6\), got 4",
        ),
        (
            {"bias": DecomposedRelativePosition(torch.zeros(3, 4), torch.zeros(5, 4), (2, 3), (2, 2))},
            ValueError,
            r"bias.k_grid its samples \(6\)",
        ),
        (
            {"bias": DecomposedRelativePosition(torch.zeros(3, 4), torch.zeros(3, 4), (2, 3), (2, 3))},
            ValueError,
            "bias.rel_w must have shape",
        ),
        (
            {"bias": DecomposedRelativePosition(torch.zeros(1, 6, 3, 2), torch.zeros(1, 6, 2, 3), None, (2, 3))},
            ValueError,
            "bias.rel_h must have shape",
        ),
        ({"bias": [torch.zeros(6, 6)] * 2}, ValueError, "at most one DecomposedRelativePosition and one other"),
        ({"v": X[:, :2]}, ValueError, "v must have the batch and map of k"),
        ({"k": X[..., :3]}, ValueError, "k must have the head size of q"),
    ],
)
def test_refusals_are_sentences(options, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.sampled_window_attention(**{"q": X, "k": X, "v": X, "window_size": (2, 3), "coords": C} | options)


@ON
def test_an_index_beyond_the_table_raises(backend):
    index = torch.full((6, 6), 5, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"bias.index must lie in \[0, 5\)"):
        vitkern.sampled_window_attention(
            X, X, X, (2, 3), C, bias=RelativePosition(torch.zeros(5, 2), index), backend=backend
        )
