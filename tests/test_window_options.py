"""window_attention with further options: against loops over windows, models' formulas, and itself. What every op must do is in
tests/test_ops.py."""

import itertools
import math

import patch_cases
import pytest
import torch
from agreement import agree
from window_maps import BACKENDS, D, draw, maps

import vitkern
from vitkern import bias, mask
from vitkern.ops._window_places import Axis, places
from vitkern.ops.window_rows import window_rows, window_sum


def looped(q, k, v, queries, keys, pad=None, score=lambda s, image, w, i, j: s, rule=lambda s: s.softmax(-1)):
    """Attention window by window: `queries[w]` and `keys[w]` are lists of coordinates. A key may be a pair (key, value) of tensors
    [H, D], or None, a pad, which is the pair `pad` or hidden. `score` changes a score [H] or hides it by None."""
    heads = q.shape[-2]
    out = {}
    for image, w in itertools.product(range(len(k)), range(len(queries))):
        found = [
            pad if c is None else c if isinstance(c[0], torch.Tensor) else (k[(image, *c)], v[(image, *c)])
            for c in keys[w]
        ]
        for i, c in enumerate(queries[w]):
            own = q[(image, *c)]
            pairs = [(j, pair) for j, pair in enumerate(found) if pair is not None]
            scores = [(score((own * a).sum(-1) * own.shape[-1] ** -0.5, image, w, i, j), b) for j, (a, b) in pairs]
            kept = [(s, b) for s, b in scores if s is not None]
            out[(image, *c)] = torch.zeros(heads, v.shape[-1], dtype=D)
            if kept:
                p = rule(torch.stack([s for s, _ in kept], -1))  # [H, keys]
                out[(image, *c)] = sum(p[:, n, None] * b for n, (_, b) in enumerate(kept))
    sides = q.shape[1:-2]
    rows = [out[(image, *c)] for image in range(len(k)) for c in itertools.product(*(range(n) for n in sides))]
    return torch.stack(rows).view(len(k), *sides, heads, v.shape[-1])


def axis_block(length, w):
    return [[p for p in range(i, i + w)] for i in range(0, length, w)]


def axis_grid(length, w):
    count = -(-length // w)
    return [[i + j * count for j in range(w)] for i in range(count)]


def axis_halo(length, w, c, clamp=False):
    starts = [i - (c - w) // 2 for i in range(0, length, w)]
    if clamp:
        starts = [min(max(s, 0), length - c) for s in starts]
    return [list(range(s, s + c)) for s in starts]


def windows(lengths, *axes):
    """The coordinates in every window, row-major, None beyond the map."""
    found = []
    for sides in itertools.product(*axes):
        cells = itertools.product(*sides)
        found.append([c if all(0 <= x < n for x, n in zip(c, lengths, strict=True)) else None for c in cells])
    return found


def without_pads(found):
    return [[c for c in one if c is not None] for one in found]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(4, 6), (5, 7)])
def test_grid_windows_are_strided(lengths, backend):
    q, k, v = maps(*lengths)
    found = windows(lengths, axis_grid(lengths[0], 2), axis_grid(lengths[1], 3))
    want = looped(q, k, v, without_pads(found), found)
    agree(vitkern.window_attention(q, k, v, (2, 3), partition="grid", backend=backend), want, (q, k, v))
    pad = (draw(2, 4, seed=8), draw(2, 4, seed=9))
    want = looped(q, k, v, without_pads(found), found, pad=pad)
    agree(vitkern.window_attention(q, k, v, (2, 3), partition="grid", pad_kv=pad, backend=backend), want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context, clamp", [(4, False), (5, False), (1, False), (3, True), (5, True)])
@pytest.mark.parametrize("lengths", [(5, 6), (6, 6)])
def test_halos_begin_before_their_window(lengths, context, clamp, backend):
    q, k, v = maps(*lengths)
    queries = without_pads(windows(lengths, *(axis_block(n, 2) for n in lengths)))
    keys = windows(lengths, *(axis_halo(n, 2, context, clamp) for n in lengths))
    border = "shift" if clamp else "pad"
    options = {"context_size": context, "context_border": border, "backend": backend}
    agree(vitkern.window_attention(q, k, v, 2, **options), looped(q, k, v, queries, keys), (q, k, v))
    zero, given = (torch.zeros(2, 4, dtype=D),) * 2, tuple(draw(2, 4, seed=s) for s in (8, 9))
    for pad_kv, pad in (("zero", zero), (given, given)):
        want = looped(q, k, v, queries, keys, pad=pad)
        agree(vitkern.window_attention(q, k, v, 2, pad_kv=pad_kv, **options), want, (q, k, v))


@pytest.mark.parametrize("sign", ["query-key", "key-query"])
def test_a_table_without_index_counts_the_offsets_of_a_halo(sign):
    """table[row, column of the offset]: distinct entries, so that every pair shows its own."""
    q, k, v = (torch.zeros(1, 4, 6, 1, 1, dtype=D) for _ in range(3))
    table = torch.arange((2 + 4 - 1) * (3 + 5 - 1), dtype=D)[:, None]
    stats = vitkern.window_attention(
        q, k, v, (2, 3), context_size=(4, 5), bias=bias.RelativePosition(table, sign=sign), pad_kv="zero",
        return_stats=("probs",),
    )[1]  # fmt: skip
    logits = stats.probs.log()[0, 0]  # but for a constant of each query

    def row(y, x, b, a):
        down, right = b - 1 - y, a - 1 - x  # from the query to the key: the halo begins 1 before the window
        return (2 - down) * 7 + 3 - right if sign == "query-key" else (down + 2) * 7 + right + 3

    pairs = list(itertools.product(range(2), range(3), range(4), range(5)))
    for y, x, b, a in pairs:
        got = float(logits[y * 3 + x, b * 5 + a] - logits[y * 3 + x, 0])
        assert math.isclose(got, row(y, x, b, a) - row(y, x, 0, 0), abs_tol=1e-9), (y, x, b, a)
    assert {row(*pair) for pair in pairs} == set(range(35))


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_on_a_grid_of_their_own(backend):
    """HiSViT and Hiera: a window of 2 x 3 queries has the 1 x 1 pooled cell, or 4 x 3 finer ones, of the same place."""
    q = maps(4, 6)[0]
    for lengths, sides in (((2, 2), (1, 1)), ((8, 6), (4, 3))):
        _, k, v = maps(*lengths, seed=5)
        queries = windows((4, 6), axis_block(4, 2), axis_block(6, 3))
        keys = windows(lengths, axis_block(lengths[0], sides[0]), axis_block(lengths[1], sides[1]))
        agree(vitkern.window_attention(q, k, v, (2, 3), backend=backend), looped(q, k, v, queries, keys), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_units_of_pooled_queries(backend):
    """Hiera's first block of a stage: tokens of a unit lie nW apart, queries are the maxima over its fourths."""
    tokens, units = maps(48, heads=1)[0], 6
    q = tokens.unflatten(1, (2, 24)).amax(1)  # [B, 24, H, D]: 4 queries of each unit of 8 tokens
    got = vitkern.window_attention(q, tokens, tokens, 4, partition="unit", backend=backend)
    rows, own = (
        t.unflatten(1, (-1, units)).transpose(1, 2).transpose(2, 3) for t in (tokens, q)
    )  # [B, units, H, ., D]
    want = torch.nn.functional.scaled_dot_product_attention(own, rows, rows)  # [B, units, H, 4, D]
    agree(got, want.transpose(2, 3).transpose(1, 2).flatten(1, 2), (tokens,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("many", [1, 2])
def test_every_window_sees_the_further_keys(many, backend):
    q, k, v = maps(4, 6)
    extra = [draw(many, 2, 2, 4, seed=s).requires_grad_() for s in (7, 8)]
    wide = draw(2, 6, 8, seed=9)
    found = windows((4, 6), axis_block(4, 2), axis_block(6, 3))
    want = []
    for image in range(2):
        own = [(extra[0][image % many, e], extra[1][image % many, e]) for e in range(2)]
        one = (t[image : image + 1] for t in (q, k, v))
        want.append(looped(*one, found, [keys + own for keys in found], score=lambda s, _, w, i, j: s + wide[:, i, j]))
    got = vitkern.window_attention(q, k, v, (2, 3), extra_kv=tuple(extra), bias=wide, backend=backend)
    agree(got, torch.cat(want), (q, k, v, *extra))
    narrow = vitkern.window_attention(q, k, v, (2, 3), extra_kv=tuple(extra), bias=wide[..., :6], backend=backend)
    zero = torch.cat((wide[..., :6], torch.zeros(2, 6, 2, dtype=D)), -1)
    torch.testing.assert_close(
        narrow, vitkern.window_attention(q, k, v, (2, 3), extra_kv=tuple(extra), bias=zero, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_queries_do_not_mix_images(backend):
    """GC ViT with two different images: one set of queries for each."""
    _, k, v = maps(4, 6)
    q = draw(2, 2, 3, 2, 4, seed=6).requires_grad_()
    tiled = q.repeat(1, 2, 2, 1, 1)  # the same queries in each of 2 x 2 windows
    want = vitkern.window_attention(tiled, k, v, (2, 3), backend="reference")
    agree(vitkern.window_attention(q, k, v, (2, 3), shared_q=True, backend=backend), want, (q, k, v))
    table = draw(3 * 5, 2, seed=7).requires_grad_()
    options = {"bias": bias.RelativePosition(table), "return_stats": ("lse",), "backend": backend}
    for lengths in ((4, 6), (3, 5)):  # the latter with windows that are gathered
        k, v = maps(*lengths)[1:]
        tiled = q.repeat(1, 2, 2, 1, 1)[:, : lengths[0], : lengths[1]]
        got = vitkern.window_attention(q, k, v, (2, 3), shared_q=True, **options)
        want = vitkern.window_attention(tiled, k, v, (2, 3), **options)
        agree(got[0], want[0], (q, k, v, table))
        agree(got[1].lse, want[1].lse, (q, k, table))
    strided = vitkern.window_attention(q, *maps(4, 6)[1:], (2, 3), shared_q=True, partition="grid", backend=backend)
    tiled = q.repeat_interleave(2, 1).repeat_interleave(2, 2)
    want = vitkern.window_attention(tiled, *maps(4, 6)[1:], (2, 3), partition="grid", backend=backend)
    torch.testing.assert_close(strided, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_keys_and_masks_of_positions(backend):
    q, k, v = maps(5, 6)
    seen = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[:, 0, 0] = False  # no pad may take this for its own
    found = windows((5, 6), axis_block(5, 2), axis_block(6, 3))

    def score(s, image, w, i, j):
        token = found[w][j]
        return s if token is not None and seen[(image, *token)] and j <= i + 1 and i != j else None

    want = looped(q, k, v, without_pads(found), found, score=score)
    got = vitkern.window_attention(
        q, k, v, (2, 3), key_mask=seen, mask=[mask.Causal(1), mask.NoSelf()], backend=backend
    )
    agree(got, want, (q, k, v))
    pads = (draw(2, 4, seed=8), draw(2, 4, seed=9))

    def with_pads(s, image, w, i, j):
        return s if found[w][j] is None or seen[(image, *found[w][j])] else None

    want = looped(q, k, v, without_pads(found), found, pad=pads, score=with_pads)
    got = vitkern.window_attention(q, k, v, (2, 3), key_mask=seen, pad_kv=pads, backend=backend)
    agree(got, want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_softmax(backend):
    """HiT-SR: plain products, weights without a normaliser."""
    q, k, v = maps(4, 6)
    found = windows((4, 6), axis_block(4, 2), axis_block(6, 3))
    want = looped(q, k, v, found, found, rule=lambda s: s)
    agree(vitkern.window_attention(q, k, v, (2, 3), normalizer="none", backend=backend), want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_order_is_applied_on_load_and_store(backend):
    q, k, v = maps(9)
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    back = order.argsort(1)
    turned = [torch.stack([t[b, order[b]] for b in range(2)]) for t in (q, k, v)]
    plain = vitkern.window_attention(*turned, 4, 1, backend="reference")
    want = torch.stack([plain[b, back[b]] for b in range(2)])
    agree(vitkern.window_attention(q, k, v, 4, 1, order=order, backend=backend), want, (q, k, v))
    one = torch.stack(
        [plain[0][back[0]], vitkern.window_attention(*(t[1:, order[0]] for t in (q, k, v)), 4, 1)[0][back[0]]]
    )
    agree(vitkern.window_attention(q, k, v, 4, 1, order=order[0], backend=backend), one, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, -100.0, -1.5, None])
def test_every_sample_has_its_shift(value, backend):
    q, k, v = maps(4, 6)
    shifts = [(1, 2), (1, 0)]
    want = [
        vitkern.window_attention(*(t[b : b + 1] for t in (q, k, v)), (2, 3), shifts[b], mask_value=value)
        for b in range(2)
    ]
    got = vitkern.window_attention(q, k, v, (2, 3), torch.tensor(shifts), mask_value=value, backend=backend)
    agree(got, torch.cat(want), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["pad_roll", "roll_pad"])
@pytest.mark.parametrize("value", [-100.0, -1.5, None])
def test_shifted_windows_are_those_of_the_window_kernels(order, value, backend):
    """A mask that hides nothing leads to gathered windows, with the same result."""
    q, k, v = maps(5, 7)
    pads = tuple(draw(2, 4, seed=s).requires_grad_() for s in (8, 9))
    table = draw(3 * 5, 2, seed=10).requires_grad_()
    options = {"bias": bias.RelativePosition(table), "pad_kv": pads, "pad_order": order, "mask_value": value}
    everything = torch.ones(2, 5, 7, dtype=torch.bool)
    got = vitkern.window_attention(q, k, v, (2, 3), (1, 2), key_mask=everything, backend=backend, **options)
    agree(got, vitkern.window_attention(q, k, v, (2, 3), (1, 2), **options), (q, k, v, *pads, table))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decomposed_positions_inside_windows(backend):
    """SAM: q unscaled times the rows of both tables, windows with pads."""
    q, k, v = maps(5, 7)
    tables = [draw(2 * w - 1, 4, seed=w).requires_grad_() for w in (2, 4)]
    pads = tuple(draw(2, 4, seed=s).requires_grad_() for s in (8, 9))
    given = bias.DecomposedRelativePosition(*tables, (2, 4), (2, 4))
    got = vitkern.window_attention(q, k, v, (2, 4), bias=given, pad_kv=pads, backend=backend)
    found = windows((5, 7), axis_block(5, 2), axis_block(7, 4))

    def score(s, image, w, i, j):
        own = q[(image, *found[w][i])]
        return s + own @ tables[0][i // 4 - j // 4 + 1] + own @ tables[1][i % 4 - j % 4 + 3]

    queries = [[c for c in one if c is not None] for one in found]
    assert all(one[: len(kept)] == kept for one, kept in zip(found[:1], queries[:1], strict=True))

    def by_position(s, image, w, i, j):
        return score(s, image, w, found[w].index(queries[w][i]), j)

    agree(got, looped(q, k, v, queries, found, pad=pads, score=by_position), (q, k, v, *tables, *pads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_lie_on_the_map(backend):
    q, k, v = maps(5, 6)
    found = windows((5, 6), axis_block(5, 2), axis_block(6, 3))
    _, stats = vitkern.window_attention(q, k, v, (2, 3), return_stats=("lse", "key_mean"), backend=backend)
    probs = vitkern.window_attention(q, k, v, (2, 3), return_stats=("probs",))[1].probs
    own = vitkern.window_attention(q, k, v, (2, 3), return_stats=("lse",))[1].lse
    torch.testing.assert_close(stats.lse, own)
    for w, tokens in enumerate(found):
        real = [i for i, c in enumerate(tokens) if c is not None]
        mean = probs.view(2, len(found), 2, 6, 6)[:, w][:, :, real].mean(2)  # [B, H, 6]
        for j in real:
            torch.testing.assert_close(stats.key_mean[(slice(None), *tokens[j])], mean[..., j])
    further = (draw(1, 2, 2, 4, seed=7), draw(1, 2, 2, 4, seed=8))
    options = {"extra_kv": further, "backend": backend}
    stats = vitkern.window_attention(q, k, v, (5, 6), return_stats=("key_mean",), **options)[1]
    rows = [t.flatten(1, 2) for t in (q, k, v)]
    want = vitkern.attention(*rows, extra_kv=further, return_stats=("key_mean",))[1].key_mean[:, :30]
    torch.testing.assert_close(stats.key_mean.flatten(1, 2), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_axes_and_four_axes(backend):
    q, k, v = maps(2, 4, 6, 5)
    sizes, shift = (2, 2, 3, None), (1, 0, 2, 0)
    want = vitkern.window_attention(q, k, v, (2, 2, 3, 5), shift, backend="reference")
    agree(vitkern.window_attention(q, k, v, sizes, shift, backend=backend), want, (q, k, v))
    column = vitkern.window_attention(q, k, v, (1, None, 1, 1), mask=mask.Causal(), backend=backend)
    rows = [t.movedim(2, -3).flatten(0, 3) for t in (q, k, v)]
    want = vitkern.attention(*rows, mask=mask.Causal())
    agree(column, want.unflatten(0, (2, 2, 6, 5)).movedim(-3, 2), (q, k, v))


def test_rows_and_their_sums_are_transposes():
    """<rows(x), y> = <x, sum(y)> for axes of every kind, as float64 holds it."""
    kinds = (
        lambda n: Axis(n, -(-n // 3), 3, shift=1),
        lambda n: Axis(n, -(-n // 3), 3, shift=2, roll_first=True),
        lambda n: Axis(n, -(-n // 4), 4, grid=True),
        lambda n: Axis(n, -(-n // 2), 5, step=2, lead=1),
        lambda n: Axis(n, -(-n // 2), 4, step=2, lead=-1),
        lambda n: Axis(n, -(-n // 3), min(n, 5), step=3, lead=1, clamp=True),
    )
    for first, second, backend in itertools.product(kinds, kinds, BACKENDS):
        at = places((first(7), second(5)), torch.device("cpu"))
        x, fill = draw(2, 7, 5, 2, 3), draw(3, 2, seed=1).t()
        rows = window_rows(x, at, fill, backend=backend)
        y = draw(*rows.shape, seed=2)
        out, total = window_sum(y, at, (7, 5), pads=True, backend=backend)
        torch.testing.assert_close((rows * y).sum(), (x * out).sum() + (fill * total).sum())
        leaf = y.clone().requires_grad_()
        out, total = window_sum(leaf, at, (7, 5), pads=True, backend=backend)
        (found,) = torch.autograd.grad((x * out).sum() + (fill * total).sum(), leaf)
        torch.testing.assert_close(found, rows)


def test_explain_says_that_windows_are_gathered():
    with patch_cases.Called("window_rows") as moved:
        text = vitkern.explain(vitkern.window_attention, *maps(6, 6), 3, normalizer="relu")
    assert moved.count == 0, "explain runs no kernel"
    assert "the windows are gathered in front of attention" in text
    text = vitkern.explain(vitkern.window_attention, *maps(6, 6), window_size=3, shift_size=1, normalizer="relu")
    assert "gathered" in text
    for window, options in (([(3, 2), (2, 3)], {}), (3, {"partition": "grid"}), (3, {"shift_size": 1})):
        assert "gathered" not in vitkern.explain(vitkern.window_attention, *maps(6, 6), window, **options)


def test_packed_projections_take_the_options():
    qkv = draw(2, 4, 6, 3, 2, 4).requires_grad_()
    got = vitkern.window_attention_qkvpacked(qkv, (2, 3), partition="grid")
    agree(got, vitkern.window_attention(*qkv.unbind(-3), (2, 3), partition="grid"), (qkv,))
    got = vitkern.window_attention_qkvpacked(qkv, [(2, None), (None, 2)])
    agree(got, vitkern.window_attention(*qkv.unbind(-3), [(2, 6), (4, 2)]), (qkv,))
