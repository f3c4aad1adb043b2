"""drop_tokens: MAE's and PatchDropout's meaning, edges and refusals. What every op must do is in tests/test_ops.py."""

import libraries  # noqa: F401
import pytest
import torch

import vitkern
from vitkern import testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def mae(x, noise, ratio):
    """Shuffle, keep, and restore as the paper has them: two sorts."""
    keep = int(x.shape[1] * (1 - ratio))
    shuffle = noise.argsort(dim=1, stable=True)
    restore = shuffle.argsort(dim=1)
    kept = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[2]))
    removed = torch.ones(noise.shape)
    removed[:, :keep] = 0
    return kept, removed.gather(1, restore), restore


@ON
@pytest.mark.parametrize("ties", [False, True])
def test_mae_shuffles_and_restores(backend, ties):
    g = torch.Generator().manual_seed(3)
    x, token = torch.randn(4, 196, 8, generator=g), torch.randn(1, 1, 8, generator=g)
    noise = torch.rand(4, 196, generator=g)
    if ties:
        noise = (noise * 20).floor()
    want, removed, restore = mae(x, noise, 0.75)
    y, index = vitkern.drop_tokens(x, 0.75, noise=noise, backend=backend)
    assert torch.equal(y, want) and y.shape[1] == 49
    mask = torch.ones(4, 196).scatter(1, index.long(), 0.0)
    assert torch.equal(mask, removed) and mask.sum() == 4 * 147
    full = torch.cat((want, token.expand(4, 147, 8)), 1).gather(1, restore[..., None].expand(-1, -1, 8))
    assert torch.equal(vitkern.restore_tokens(y, index, 196, token, backend=backend), full)


@ON
@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.0])
def test_the_published_masked_autoencoder(backend, ratio):
    """Against the embeddings of transformers' ViTMAE: its kept rows, mask and order of restoring."""
    vit = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    config = vit.ViTMAEConfig(hidden_size=12, image_size=28, patch_size=4, num_attention_heads=2, mask_ratio=ratio)
    x, noise = torch.randn(3, 49, 12), torch.rand(3, 49)
    want, mask, restore = vit.ViTMAEEmbeddings(config).random_masking(x, noise)
    y, index = vitkern.drop_tokens(x, ratio, noise=noise, backend=backend)
    assert torch.equal(y, want)
    assert torch.equal(torch.ones(3, 49).scatter(1, index.long(), 0.0), mask)  # 1 is removed
    token = torch.randn(1, 1, 12)
    full = torch.cat((want, token.expand(3, 49 - want.shape[1], 12)), 1)
    full = full.gather(1, restore[..., None].expand(-1, -1, 12))
    assert torch.equal(vitkern.restore_tokens(y, index, 49, token, backend=backend), full)
    behind = torch.cat((torch.randn(3, 1, 12), x), 1)  # a class token in front stays in front
    y, index = vitkern.drop_tokens(behind, ratio, noise=noise, protect=1, backend=backend)
    assert torch.equal(y, torch.cat((behind[:, :1], want), 1)) and index[:, 0].eq(0).all()


@ON
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("probability", [0.5, 0.97])
def test_the_published_patch_dropout(backend, ordered, probability):
    timm = pytest.importorskip("timm")
    layer = timm.layers.PatchDropout(probability, num_prefix_tokens=1, ordered=ordered).train()
    x = torch.randn(2, 17, 3)
    torch.manual_seed(3)
    want = layer(x)
    torch.manual_seed(3)
    options = {"noise": torch.randn(2, 16), "protect": 1, "min_keep": 1, "backend": backend}
    got, _ = vitkern.drop_tokens(x, probability, order="position" if ordered else "noise", **options)
    assert torch.equal(got, want)


@ON
def test_a_sample_does_not_depend_on_the_others_of_its_batch(backend):
    x = torch.randn(8, 50, 4)
    options = {"seed": 5, "protect": 1, "backend": backend}
    y, index = vitkern.drop_tokens(x, 0.6, **options)
    for count in (1, 3):
        alone, where = vitkern.drop_tokens(x[:count], 0.6, **options)
        assert torch.equal(alone, y[:count]) and torch.equal(where, index[:count])


@ON
def test_without_a_seed_the_noise_is_that_of_mae(backend):
    x = torch.randn(3, 16, 4)
    torch.manual_seed(7)
    noise = torch.rand(3, 16)
    torch.manual_seed(7)
    y, _ = vitkern.drop_tokens(x, 0.5, backend=backend)
    assert torch.equal(y, mae(x, noise, 0.5)[0])


@ON
def test_a_seed_repeats_and_samples_differ(backend):
    x = torch.arange(64.0).expand(5, 64)
    y, index = vitkern.drop_tokens(x, 0.5, seed=11, backend=backend)
    again = vitkern.drop_tokens(x, 0.5, seed=torch.tensor([11]), backend=backend)[1]
    first = vitkern.drop_tokens(x[:1], 0.5, seed=11, backend=backend)[1]
    assert torch.equal(index, again) and torch.equal(index[:1], first) and torch.equal(y, index.float())
    assert len({tuple(row) for row in index.tolist()}) == 5
    assert not torch.equal(index, vitkern.drop_tokens(x, 0.5, seed=12, backend=backend)[1])
    counts = torch.zeros(64)
    for seed in range(200):
        counts[vitkern.drop_tokens(x[:1], 0.75, seed=seed, backend=backend)[1][0].long()] += 1
    assert counts.sum() == 200 * 16 and counts.min() > 20 and counts.max() < 85  # 50, six standard deviations


def test_philox_is_that_of_the_paper():
    """The first word of the known answers of Salmon et al. (2011) for a zero key and a zero counter: 6627e8d5."""
    from vitkern.ops.drop_tokens import seeded

    assert float(seeded(0, 1, 1, torch.device("cpu"))) == (0x6627E8D5 >> 8) * 2.0**-24


@ON
def test_patch_dropout_keeps_the_class_token_and_at_least_one_patch(backend):
    x = torch.randn(2, 5, 3)
    y, index = vitkern.drop_tokens(x, 0.9, protect=1, min_keep=1, order="position", seed=0, backend=backend)
    assert y.shape == (2, 2, 3) and index[:, 0].eq(0).all() and index[:, 1].gt(0).all()
    wide, index = vitkern.drop_tokens(torch.randn(2, 197, 3), 0.5, protect=1, order="position", seed=0, backend=backend)
    assert wide.shape == (2, 99, 3) and (index.diff(dim=1) > 0).all()


@ON
def test_rows_columns_and_channels_go_as_a_whole(backend):
    x = torch.arange(13.0).expand(2, 13)  # a class token and a grid of 3 x 4
    noise = torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.5, 0.5]])  # the second: ties
    options = {"protect": 1, "grid": (3, 4), "backend": backend}
    _, index = vitkern.drop_tokens(x, 0.4, noise=noise, structure="row", **options)
    assert index.tolist() == [[0, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.4], [0.5, 0.5, 0.5, 0.5]])
    _, index = vitkern.drop_tokens(x, 0.5, noise=noise, structure="col", **options)
    assert index.tolist() == [[0, 2, 6, 10, 3, 7, 11], [0, 1, 5, 9, 2, 6, 10]]
    _, index = vitkern.drop_tokens(x, 0.5, noise=noise, structure="col", order="position", **options)
    assert index[0].tolist() == [0, 2, 3, 6, 7, 10, 11]
    y, index = vitkern.drop_tokens(
        x[:, 1:], 0.5, noise=torch.tensor([[2.0, 1.0]] * 2), structure="channel", grid=(2, 6), backend=backend
    )
    assert y[0].tolist() == [7, 8, 9, 10, 11, 12] and index[0].tolist() == [6, 7, 8, 9, 10, 11]


@ON
def test_nan_and_infinite_noise_goes_first(backend):
    noise = torch.tensor([[torch.nan, 0.5, torch.inf, 0.1, -torch.inf, 0.3]])
    _, index = vitkern.drop_tokens(torch.randn(1, 6, 2), 0.3, noise=noise, backend=backend)
    assert index.tolist() == [[4, 3, 5, 1]]


@ON
def test_small_inputs(backend):
    for shape, protect, length in (((0, 9, 4), 0, 4), ((2, 1, 4), 0, 0), ((2, 1, 4), 1, 1), ((2, 5, 4), 9, 5)):
        y, index = vitkern.drop_tokens(torch.randn(shape), 0.5, protect=protect, backend=backend)
        assert y.shape == (shape[0], length, 4) and index.shape == (shape[0], length)


X = torch.randn(2, 12, 4)


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (lambda: vitkern.drop_tokens(X, -0.1), ValueError, r"ratio must lie in \[0, 1\), got -0.1"),
        (lambda: vitkern.drop_tokens(X, 1.0), ValueError, r"ratio must lie in \[0, 1\), got 1.0"),
        (lambda: vitkern.drop_tokens(X, float("nan")), ValueError, r"ratio must lie in \[0, 1\), got nan"),
        (lambda: vitkern.drop_tokens(X, "half"), TypeError, "ratio must be a float, got 'half'"),
        (
            lambda: vitkern.drop_tokens(X, 0.5, noise=torch.rand(2, 11)),
            ValueError,
            r"noise must have shape \[B, M\] = \[2, 12\], got \[2, 11\]",
        ),
        (
            lambda: vitkern.drop_tokens(X, 0.5, noise=X[..., 0], seed=1),
            ValueError,
            "seed must be None where noise is given",
        ),
        (lambda: vitkern.drop_tokens(X, 0.5, seed=1.5), TypeError, "seed must be an int or an int64 tensor"),
        (
            lambda: vitkern.drop_tokens(X, 0.5, seed=torch.zeros(2)),
            ValueError,
            "seed must be an int or one int64 element",
        ),
        (lambda: vitkern.drop_tokens(X, 0.5, order="score"), ValueError, "order must be 'noise' or 'position'"),
        (lambda: vitkern.drop_tokens(X, 0.5, min_keep=-1), ValueError, "min_keep must be at least 0, got -1"),
        (lambda: vitkern.drop_tokens(X, 0.5, structure="cell"), ValueError, "structure must be 'token', 'row', 'col'"),
        (lambda: vitkern.drop_tokens(X, 0.5, grid=(3, 4)), ValueError, "grid must go with structure="),
        (
            lambda: vitkern.drop_tokens(X, 0.5, structure="row", grid=(3, 5)),
            ValueError,
            "grid must be a pair whose product is N - protect = 12",
        ),
        (lambda: vitkern.drop_tokens(X[0, 0], 0.5), ValueError, r"x must have shape \[B, N, ...\], got \[4\]"),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
