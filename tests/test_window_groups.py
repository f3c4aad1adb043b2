"""window_attention: groups of heads with windows of their own, and convolutions of the values."""

import pytest
import torch
from agreement import agree
from window_maps import BACKENDS, draw, maps

import vitkern
from vitkern import CosineScore, DepthwiseValue, bias


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_heads_have_windows_shifts_and_biases_of_their_own(backend):
    q, k, v = maps(4, 6, heads=4)
    tables = [draw(7 * 3, 2, seed=4).requires_grad_(), draw(3 * 11, 2, seed=5).requires_grad_()]
    sizes, shifts = [(None, 2), (2, None)], [(0, 1), (1, 0)]
    want = [
        vitkern.window_attention(
            *(t[..., 2 * g : 2 * g + 2, :] for t in (q, k, v)),
            sizes[g],
            shifts[g],
            bias=bias.RelativePosition(tables[g]),
        )
        for g in range(2)
    ]
    of_groups = bias.PerHeadGroup(tuple(bias.RelativePosition(t) for t in tables))
    got = vitkern.window_attention(q, k, v, sizes, shifts, bias=of_groups, backend=backend)
    agree(got, torch.cat(want, -2), (q, k, v, *tables))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_share_out_what_has_heads(backend):
    """Four heads, two of keys: temperatures, pads, further keys and the convolution of each group are its own."""
    q, k, v = maps(5, 6, heads=4)
    k, v = (t[..., :2, :] for t in (k, v))
    tau, weight = draw(4, seed=3), draw(8, 1, 3, 3, seed=4).requires_grad_()
    pads, more, sizes = (
        (draw(2, 4, seed=5), draw(2, 4, seed=6)),
        (draw(1, 3, 2, 4, seed=7), draw(1, 3, 2, 4, seed=8)),
        [(2, 3), (3, 2)],
    )
    want = []
    for g in range(2):
        own = slice(2 * g, 2 * g + 2)
        options = {
            "cosine": CosineScore(tau[own]), "lepe": DepthwiseValue(weight[4 * g : 4 * g + 4], scope="window"),
            "pad_kv": tuple(t[g : g + 1] for t in pads), "extra_kv": tuple(t[:, :, g : g + 1] for t in more),
        }  # fmt: skip
        parts = (q[..., own, :], k[..., g : g + 1, :], v[..., g : g + 1, :])
        want.append(vitkern.window_attention(*parts, sizes[g], **options))
    lepe = DepthwiseValue(weight, scope="window")
    options = {"cosine": CosineScore(tau), "lepe": lepe, "pad_kv": pads, "extra_kv": more, "backend": backend}
    agree(vitkern.window_attention(q, k, v, sizes, **options), torch.cat(want, -2), (q, k, v, weight))


DROPOUT = {"dropout_p": 0.5, "dropout_seed": 2**40 + 7}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [2**40 + 7, torch.tensor([2**40 + 7])], ids=["int", "tensor"])
def test_groups_drop_the_weights_of_their_own_heads(seed, backend):
    q, k, v = maps(5, 6, heads=4)
    want = vitkern.window_attention(q, k, v, (2, 3), 1, backend="reference", **DROPOUT)
    dropout = {"dropout_p": 0.5, "dropout_seed": seed, "backend": backend}
    agree(vitkern.window_attention(q, k, v, [(2, 3), (2, 3)], 1, **dropout), want, (q, k, v))
    seen = torch.ones(2, 5, 6, dtype=torch.bool)  # with a mask the windows are gathered
    agree(vitkern.window_attention(q, k, v, [(2, 3), (2, 3)], 1, key_mask=seen, **dropout), want, (q, k, v))


def test_groups_draw_one_seed():
    q, k, v = maps(4, 6, heads=4)
    torch.manual_seed(1)
    found = vitkern.window_attention(q, k, v, [(2, 3), (2, 3)], dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(found, vitkern.window_attention(q, k, v, (2, 3), dropout_p=0.5))


SHAPES = [((7,), 3, 1), ((170,), 90, 40), ((5, 6), (2, 3), (1, 2)), ((3, 4, 5), (2, 2, 3), (1, 0, 2))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sides, size, shift", SHAPES, ids=str)
def test_gathered_windows_drop_the_weights_of_the_images_tokens(sides, size, shift, backend):
    q, k, v = maps(*sides)
    further = (draw(1, 2, 2, 4, seed=7), draw(1, 2, 2, 4, seed=8))
    seen = torch.ones(2, *sides, dtype=torch.bool)
    for options in ({}, {"pad_order": "roll_pad"}, {"pad_kv": "zero"}, {"mask_value": None}):
        want = vitkern.window_attention(q, k, v, size, shift, backend="reference", **DROPOUT, **options)
        got = vitkern.window_attention(q, k, v, size, shift, key_mask=seen, backend=backend, **DROPOUT, **options)
        agree(got, want, (q, k, v))
    want = vitkern.window_attention(q, k, v, size, extra_kv=further, backend="reference", **DROPOUT)
    agree(vitkern.window_attention(q, k, v, size, extra_kv=further, backend=backend, **DROPOUT), want, (q, k, v))


def test_strided_windows_drop_the_weights_of_the_images_tokens():
    """As views of windows and gathered, and those of a list of tokens in an order of its own."""
    q, k, v = maps(4, 6)
    seen, options = torch.ones(2, 4, 6, dtype=torch.bool), {"partition": "grid", **DROPOUT}
    want = vitkern.window_attention(q, k, v, (2, 3), **options)
    agree(vitkern.window_attention(q, k, v, (2, 3), key_mask=seen, **options), want, (q, k, v))
    q, k, v = maps(12)
    order = torch.arange(12).view(3, 4).t().flatten().to(torch.int32)  # window i of a grid: i, i + 4, i + 8
    want = vitkern.window_attention(q, k, v, 3, partition="grid", **DROPOUT)
    agree(vitkern.window_attention(q, k, v, 3, order=order, **DROPOUT), want, (q, k, v))


@pytest.mark.parametrize("heads", [1, 2])
def test_a_convolution_serves_grouped_queries(heads):
    """The heads that share a value share what is added to it."""
    q, k, v = maps(4, 6, heads=4)
    k, v = (t[..., :heads, :] for t in (k, v))
    lepe = DepthwiseValue(draw(4 * heads, 1, 3, 3, seed=4))
    got = vitkern.window_attention(q, k, v, 2, lepe=lepe) - vitkern.window_attention(q, k, v, 2)
    each = DepthwiseValue(lepe.weight, None, (4, 6)).of(v.flatten(1, 2)).view(v.shape)
    torch.testing.assert_close(got, each.repeat_interleave(4 // heads, -2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_convolution_of_the_values_stops_at_its_window_or_at_the_map(backend):
    """CSWin: stripes of the whole height and two columns; zeros around each stripe."""
    q, k, v = maps(4, 6)
    weight, added = draw(8, 1, 3, 3, seed=4).requires_grad_(), draw(8, seed=5).requires_grad_()
    plain = vitkern.window_attention(q, k, v, (None, 2), backend=backend)
    channels = v.flatten(3).movedim(-1, 1)  # [B, C, H, W]
    stripes = [torch.nn.functional.conv2d(c, weight, added, padding=1, groups=8) for c in channels.split(2, 3)]
    whole = torch.nn.functional.conv2d(channels, weight, added, padding=1, groups=8)
    for scope, found in (("window", torch.cat(stripes, 3)), ("map", whole)):
        want = plain + found.movedim(1, -1).unflatten(-1, (2, 4))
        got = vitkern.window_attention(
            q, k, v, (None, 2), lepe=DepthwiseValue(weight, added, scope=scope), backend=backend
        )
        agree(got, want, (q, k, v, weight, added))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pads_take_part_in_a_convolution_inside_windows(backend):
    q, k, v = maps(3, 4)
    pads = tuple(draw(2, 4, seed=s).requires_grad_() for s in (8, 9))
    weight = draw(8, 1, 3, 3, seed=4).requires_grad_()
    options = {"pad_kv": pads, "backend": backend}
    got = vitkern.window_attention(q, k, v, 2, lepe=DepthwiseValue(weight, scope="window"), **options)
    below = pads[1].expand(2, 1, 4, 2, 4)
    full = torch.cat((v, below), 1).flatten(3).movedim(-1, 1)  # [B, C, 4, 4]
    tiles = full.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # [B 4, C, 2, 2]
    found = torch.nn.functional.conv2d(tiles, weight, padding=1, groups=8).view(2, 2, 2, 8, 2, 2)
    found = found.permute(0, 1, 4, 2, 5, 3).reshape(2, 4, 4, 2, 4)[:, :3]
    agree(got, vitkern.window_attention(q, k, v, 2, **options) + found, (q, k, v, *pads, weight))
