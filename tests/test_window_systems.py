"""Published systems whose windows no library here has, as calls of window_attention and attention, against their formulas."""

import pytest
import torch
from agreement import agree
from window_maps import BACKENDS, draw, maps

import vitkern

sdpa = torch.nn.functional.scaled_dot_product_attention


def heads_first(*tensors):
    return [t.transpose(-3, -2) for t in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ctm_sci_attends_the_pads_of_strided_windows_in_three_axes(backend):
    """Window (2, 3, 3) of (3, 7, 5): maps are padded behind, and pads are keys of given values (the projection's bias)."""
    q, k, v = maps(3, 7, 5)
    pads = [draw(2, 4, seed=s).requires_grad_() for s in (7, 8)]
    full = []
    for t, pad in zip((q, k, v), (torch.zeros(2, 4, dtype=q.dtype), *pads), strict=True):
        whole = pad.expand(2, 4, 9, 6, 2, 4).clone()
        whole[:, :3, :7, :5] = t
        full.append(whole.view(2, 2, 2, 3, 3, 3, 2, 2, 4))  # [B, w0, n0, w1, n1, w2, n2, H, D]
    rows = [t.permute(0, 2, 4, 6, 7, 1, 3, 5, 8).flatten(5, 7) for t in full]  # [B, n..., H, N, D]
    out = sdpa(*rows).unflatten(5, (2, 3, 3)).permute(0, 5, 1, 6, 2, 7, 3, 4, 8).reshape(2, 4, 9, 6, 2, 4)
    got = vitkern.window_attention(q, k, v, (2, 3, 3), partition="grid", pad_kv=tuple(pads), backend=backend)
    agree(got, out[:, :3, :7, :5], (q, k, v, *pads))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lw_detr_keeps_its_tokens_window_by_window(backend):
    """Windows of a list of tokens, and all tokens in a few layers: both without index work."""
    q, k, v = maps(4 * 6)
    rows = heads_first(*(t.unflatten(1, (4, 6)) for t in (q, k, v)))
    want = sdpa(*rows).transpose(-3, -2).flatten(1, 2)
    agree(vitkern.window_attention(q, k, v, 6, backend=backend), want, (q, k, v))
    whole = sdpa(*heads_first(q, k, v)).transpose(-3, -2)
    agree(vitkern.window_attention(q, k, v, (None,), backend=backend), whole, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vitpose_adds_the_pooled_windows_to_the_keys_of_every_window(backend):
    q, k, v = maps(4, 6)
    pooled = [t.unflatten(2, (2, 3)).unflatten(1, (2, 2)).mean((2, 4)).flatten(1, 2) for t in (k, v)]  # [B, 4, H, D]
    rows = [
        t.unflatten(2, (2, 3)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4) for t in (q, k, v)
    ]  # [B, 2, 2, N, H, D]
    both = [
        torch.cat((t, p[:, None, None].expand(-1, 2, 2, -1, -1, -1)), 3) for t, p in zip(rows[1:], pooled, strict=True)
    ]
    want = sdpa(*heads_first(rows[0], *both)).transpose(-3, -2)
    want = want.unflatten(3, (2, 3)).transpose(2, 3).reshape(2, 4, 6, 2, 4)
    agree(vitkern.window_attention(q, k, v, (2, 3), extra_kv=tuple(pooled), backend=backend), want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [6, 10])
def test_tnt_has_thousands_of_short_sequences(width, backend):
    q, k, v = (draw(700, 16, 4, width, seed=s).requires_grad_() for s in range(3))
    want = sdpa(*heads_first(q, k, v)).transpose(-3, -2)
    agree(vitkern.attention(q, k, v, backend=backend), want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hit_sr_multiplies_without_a_softmax_by_values_pooled_in_the_window(backend):
    """y = (q v^T / d + B) v: keys are values, on a map that is coarser by two."""
    q, v = maps(4, 8)[0], maps(2, 4, seed=5)[0]
    bias = draw(2, 8, 2, seed=9).requires_grad_()
    rows = (
        q.unflatten(2, (2, 4)).unflatten(1, (2, 2)).transpose(2, 3).flatten(3, 4).transpose(-3, -2)
    )  # [B, 2, 2, H, 8, D]
    keys = (
        v.unflatten(2, (2, 2)).unflatten(1, (2, 1)).transpose(2, 3).flatten(3, 4).transpose(-3, -2)
    )  # [B, 2, 2, H, 2, D]
    want = (rows @ keys.mT / 4 + bias) @ keys
    want = want.transpose(-3, -2).unflatten(3, (2, 4)).transpose(2, 3).reshape(2, 4, 8, 2, 4)
    got = vitkern.window_attention(q, v, v, (2, 4), bias=bias, scale=0.25, normalizer="none", backend=backend)
    agree(got, want, (q, v, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_combiner_sees_its_block_causally_and_all_summaries(backend):
    q, k, v = maps(8)
    summary = [t.unflatten(1, (2, 4)).mean(2) for t in (k, v)]
    seen = torch.cat((torch.ones(4, 4, dtype=torch.bool).tril(), torch.ones(4, 2, dtype=torch.bool)), 1)
    rows = [t.unflatten(1, (2, 4)) for t in (q, k, v)]
    both = [torch.cat((t, s[:, None].expand(-1, 2, -1, -1, -1)), 2) for t, s in zip(rows[1:], summary, strict=True)]
    want = sdpa(*heads_first(rows[0], *both), attn_mask=seen).transpose(-3, -2).flatten(1, 2)
    got = vitkern.window_attention(q, k, v, 4, mask=vitkern.mask.Causal(), extra_kv=tuple(summary), backend=backend)
    agree(got, want, (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, interleaved", [(3, True), (7, False)])
def test_lsnet_and_dlgsanet_weigh_neighbours_by_group(size, interleaved, backend):
    """Weights [B, G, K^2, H, W]; channel c has group c mod G in LSNet, c div (C / G) in DLGSANet; zeros beyond the map."""
    batch, channels, groups, sides = 2, 12, 3, (8, 9)
    x = draw(batch, channels, *sides).requires_grad_()
    weights = draw(batch, groups, size**2, *sides, seed=1).requires_grad_()
    taps = torch.nn.functional.unfold(x, size, padding=size // 2).view(batch, channels, size**2, *sides)
    channel = torch.arange(channels)
    group = channel % groups if interleaved else channel // (channels // groups)
    want = (taps * weights[:, group]).sum(2)
    v = x.unflatten(1, (-1, groups)).transpose(1, 2) if interleaved else x.unflatten(1, (groups, -1))
    v = v.permute(0, 3, 4, 1, 2)  # [B, H, W, G, C / G]
    out = vitkern.neighborhood_av(weights.permute(0, 3, 4, 1, 2), v, size, border="zero", backend=backend)
    got = out.permute(0, *((4, 3) if interleaved else (3, 4)), 1, 2).flatten(1, 2)
    agree(got, want, (x, weights))
