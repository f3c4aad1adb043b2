"""window_attention: what key_mask hides has no effect, whatever it holds."""

import math

import pytest
import torch
from agreement import agree
from window_maps import BACKENDS, draw, maps

import vitkern

OPTIONS = [
    {},
    {"partition": "grid"},
    {"context_size": 6},
    {"shift_size": (1, 2)},
    {"pad_kv": "zero"},
    {"extra_kv": (draw(1, 2, 2, 4, seed=7), draw(1, 2, 2, 4, seed=8))},
    {"normalizer": "none"},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_keys_and_values_that_key_mask_hides_never_leak(options, poison, backend):
    q, k, v = maps(5, 7)
    seen = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    spoiled = [t.detach().masked_fill(~seen[..., None, None], poison).requires_grad_() for t in (k, v)]
    want, got = (
        vitkern.window_attention(q, *pair, (4, 3), key_mask=seen, backend=backend, **options)
        for pair in ((k, v), spoiled)
    )
    torch.testing.assert_close(got, want)
    upstream = draw(*want.shape, seed=9)
    theirs, ours = torch.autograd.grad(want, (q, k, v), upstream), torch.autograd.grad(got, (q, *spoiled), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert all((g[~seen] == 0).all() for g in ours[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_whose_keys_are_all_hidden_is_zero_with_zero_gradients(backend):
    q, k, v = maps(4, 4, batch=1)
    seen = torch.ones(1, 4, 4, dtype=torch.bool)
    seen[:, :2, :2] = False
    wanted = ("lse", "key_mean")
    out, stats = vitkern.window_attention(q, k, v, 2, key_mask=seen, return_stats=wanted, backend=backend)
    assert (out[:, :2, :2] == 0).all() and (stats.lse[:, :2, :2] == -math.inf).all()
    assert (out[seen] != 0).all() and stats.lse[seen].isfinite().all()
    assert stats.key_mean.isfinite().all() and (stats.key_mean[~seen] == 0).all()
    grads = torch.autograd.grad(out.square().sum() + stats.lse[seen].sum(), (q, k, v))
    assert all((g[~seen] == 0).all() and (g[seen] != 0).any() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(4, 6), (6, 9)])
def test_three_groups_hide_keys_each_in_its_own_windows(lengths, backend):
    q, k, v = maps(*lengths, heads=6)
    seen = torch.rand(2, *lengths, generator=torch.Generator().manual_seed(3)) < 0.6
    sizes = [(2, 3), (None, 3), (3, None)]
    for key_mask in (None, seen):
        options = {"key_mask": key_mask, "backend": backend}
        parts = zip(*(t.split(2, -2) for t in (q, k, v)), sizes, strict=True)
        want = torch.cat([vitkern.window_attention(*part, **options) for part in parts], -2)
        agree(vitkern.window_attention(q, k, v, sizes, **options), want, (q, k, v))
