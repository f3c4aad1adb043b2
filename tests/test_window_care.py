"""window_attention: what an audit of its options found: dtypes, heads of groups, sentences, compilation, vmap, meta tensors."""

import pytest
import torch
from agreement import agree
from window_maps import BACKENDS, draw, maps

import vitkern
from vitkern import CosineScore, DepthwiseValue, bias, nn

GROUPS = [(2, 3), (2, 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["window_attention", "attention"])
def test_further_keys_take_the_dtype_of_the_tokens(op, backend):
    q = torch.randn(2, 4, 6, 2, 8).bfloat16()
    extra = tuple(torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(2))
    if op == "attention":
        out = vitkern.attention(*[q.flatten(1, 2)] * 3, extra_kv=extra, backend=backend)
    else:
        out = vitkern.window_attention(q, q, q, (2, 3), extra_kv=extra, backend=backend)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(out.float().sum(), extra)] == [torch.float32] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_take_their_heads_of_masks_and_factors(backend):
    q, k, v = maps(4, 6, heads=4)
    seen = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.7
    shared, scale = torch.ones(6, 6, dtype=torch.bool).tril(), draw(4, seed=9).requires_grad_()
    for mask in (seen, [seen, shared], shared):
        want = vitkern.window_attention(q, k, v, (2, 3), mask=mask, scale=scale, backend="reference")
        agree(
            vitkern.window_attention(q, k, v, GROUPS, mask=mask, scale=scale, backend=backend), want, (q, k, v, scale)
        )


SENTENCES = [
    (
        GROUPS,
        {"mask": torch.ones(2, 6, 6, dtype=torch.bool)},
        r"mask must have the 4 heads of q, or one, got \[2, 6, 6\]",
    ),
    (GROUPS, {"scale": torch.ones(2)}, r"scale must have the 4 heads of q, or one, got \[2\]"),
    (GROUPS, {"cosine": CosineScore(torch.zeros(3))}, "logit_scale must have"),
    (GROUPS, {"pad_kv": (torch.zeros(3, 4), torch.zeros(3, 4))}, r"pad_kv must have the 4 heads of k, got \[3, 4\]"),
    (GROUPS, {"extra_kv": (torch.zeros(1, 2, 3, 4),) * 2}, "extra_kv must have the 4 heads of k"),
    (
        (2, 3),
        {"extra_kv": (torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4))},
        "a value for each key, got 2 keys and 3 values",
    ),
    ((2, 3), {"dropout_p": 0.5, "dropout_seed": 2**63}, "dropout_seed must fit in 64 bits"),
    (
        (2, 3),
        {"lepe": DepthwiseValue(torch.zeros(16, 1, 3, 3), grid=(3, 8))},
        r"lepe.grid must be None or the sides \[4, 6\]",
    ),
    (
        (2, 3),
        {"lepe": DepthwiseValue(torch.zeros(16, 1, 3, 3), prefix_tokens=1)},
        "lepe.prefix_tokens must be 0 on a map, got 1",
    ),
]


@pytest.mark.parametrize("size, options, sentence", SENTENCES, ids=[s[:30] for _, _, s in SENTENCES])
def test_what_does_not_fit_is_a_sentence(size, options, sentence):
    q, k, v = (t.detach().float() for t in maps(4, 6, heads=4))
    with pytest.raises(ValueError, match=sentence):
        vitkern.window_attention(q, k, v, size, **options)


def test_a_convolution_needs_values_on_the_map_of_the_queries():
    q, (k, _, _) = maps(6, 6)[0], maps(1, 1)
    with pytest.raises(ValueError, match=r"lepe needs values of the queries' own map \[6, 6\], got \[1, 1\]"):
        vitkern.window_attention(q, k, k, 6, lepe=DepthwiseValue(draw(8, 1, 3, 3)))


def test_modules_refuse_windows_of_no_size():
    for make in (
        lambda: nn.VariedSizeWindowAttention(8, 2, 0),
        lambda: nn.CrossShapedWindowAttention(8, 2, split_size=0),
        lambda: nn.NeighborhoodAttention(8, 2, 0),
    ):
        with pytest.raises(ValueError, match="must be an int of at least 1, got 0"):
            make()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_table_of_a_halo_compiles(dynamic):
    table = torch.randn(25, 2, requires_grad=True)

    def run(x):
        return vitkern.window_attention(x, x, x, 2, context_size=4, bias=bias.RelativePosition(table))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sides in ((4, 6), (8, 10)):
        x = torch.randn(2, *sides, 2, 8)
        torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize("dynamic", [None, True])
def test_turned_windows_of_varied_sizes_compile(dynamic):
    module = nn.VariedSizeWindowAttention(8, 2, 3, rotated=True).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sides in ((7, 8), (9, 13)):
        x = torch.randn(2, *sides, 8)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("options", [{}, {"key_mask": True}, {"shift_size": 1}], ids=str)
def test_a_seed_draws_the_same_for_every_sample_of_vmap(options):
    q = torch.randn(3, 1, 4, 6, 2, 8)
    if "key_mask" in options:
        options = {"key_mask": torch.ones(1, 4, 6, dtype=torch.bool)}

    def run(x):
        return vitkern.window_attention(x, x, x, (2, 3), dropout_p=0.5, dropout_seed=7, **options)

    torch.testing.assert_close(torch.vmap(run)(q), torch.stack([run(x) for x in q]))


def test_meta_tensors_have_shapes():
    q = torch.empty(2, 5, 6, 2, 8, device="meta")
    assert vitkern.window_attention(q, q, q, 3).shape == q.shape
    assert vitkern.neighborhood_attention(q, q, q, 3).shape == q.shape
    flat = q.flatten(1, 2)
    out = vitkern.attention(flat, flat, flat)
    assert out.shape == flat.shape and out.device.type == "meta"
