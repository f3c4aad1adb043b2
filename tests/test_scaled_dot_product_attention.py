"""scaled_dot_product_attention against torch's own, whose arguments and layout it takes."""

import pytest
import torch
import torch.nn.functional as F
from agreement import agree

import vitkern

D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


def tensors(*lead, heads=4, kv_heads=4, queries=5, keys=7, width=6, width_v=3):
    return (
        draw(*lead, heads, queries, width),
        draw(*lead, kv_heads, keys, width, seed=1),
        draw(*lead, kv_heads, keys, width_v, seed=2),
    )


MASKS = [(5, 7), (4, 5, 7), (1, 4, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_every_shape(shape, kind):
    q, k, v = tensors(2)
    mask = draw(*shape, seed=3)
    leaves = (q, k, v, mask) if kind == "float" else (q, k, v)
    if kind == "bool":
        mask = mask.detach() > -1
        mask[..., 0] = True
    agree(vitkern.scaled_dot_product_attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask), leaves)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}], ids=str
)
@pytest.mark.parametrize("lead", [(2,), (2, 3), (1, 2, 2), ()], ids=str)
def test_options_and_leading_axes(options, lead):
    q, k, v = tensors(*lead)  # without a leading axis: [H, L, E] is [N, L, E]
    agree(
        vitkern.scaled_dot_product_attention(q, k, v, **options),
        F.scaled_dot_product_attention(q, k, v, **options),
        (q, k, v),
    )


SEVERAL = [(3, 1, 5, 7), (2, 3, 4, 5, 7), (4, 5, 7)]


@pytest.mark.parametrize("lead, shape", [((), (4, 5, 7)), ((), (5, 7)), *(((2, 3), s) for s in SEVERAL)], ids=str)
def test_masks_of_maps_with_fewer_and_more_axes(lead, shape):
    q, k, v = tensors(*lead)
    mask = draw(*shape, seed=3)
    agree(
        vitkern.scaled_dot_product_attention(q, k, v, mask),
        F.scaled_dot_product_attention(q, k, v, mask),
        (q, k, v, mask),
    )


def test_shared_heads_are_asked_for():
    q, k, v = tensors(2, kv_heads=2)
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    agree(vitkern.scaled_dot_product_attention(q, k, v, enable_gqa=True), want, (q, k, v))
    with pytest.raises(ValueError, match="key has 2 heads and query 4; enable_gqa=True lets queries share them"):
        vitkern.scaled_dot_product_attention(q, k, v)


def test_dropout_draws_from_torchs_generator():
    q, k, v = tensors(2)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(vitkern.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_what_does_not_fit_is_a_sentence():
    q, k, v = tensors(2)
    with pytest.raises(ValueError, match="is_causal must be False where attn_mask is given"):
        vitkern.scaled_dot_product_attention(q, k, v, torch.ones(5, 7, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"must be \[..., H, N, E\] or \[N, L, E\], key is \[7, 6\]"):
        vitkern.scaled_dot_product_attention(q, k[0, 0], v)


def test_it_stands_in_for_torchs_in_a_compiled_graph():
    q, k, v = (t.detach().float() for t in tensors(2))
    run = torch.compile(
        lambda *t: vitkern.scaled_dot_product_attention(*t, is_causal=True), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(run(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
