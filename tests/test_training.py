"""Training equivalence: a small Swin learns handwritten digits with and without vitkern along the same loss curve."""

import libraries  # noqa: F401
import pytest
import torch

import vitkern

transformers = pytest.importorskip("transformers")
sklearn_datasets = pytest.importorskip("sklearn.datasets")


def curve(patched, dtype, steps=30):
    """Losses of each step, trained in `dtype` from the same weights on the same batches."""
    digits = sklearn_datasets.load_digits()
    images = torch.from_numpy(digits.images).to(dtype)[:, None]  # [1797, 1, 8, 8]
    images = (images - images.mean()) / images.std()
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        use_absolute_embeddings=True,
        embed_dim=32,
        depths=[2],
        num_heads=[2],
        window_size=3,
        num_labels=10,
        initializer_range=0.2,
        drop_path_rate=0.0,
        hidden_dropout_prob=0.0,
    )
    model = transformers.SwinForImageClassification(config).to(dtype).train()
    if patched:
        assert len(vitkern.patch(model).replaced) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(labels)
        loss = torch.nn.functional.cross_entropy(model(images[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_a_swin_learns_digits_along_the_same_curve():
    exact = curve(False, torch.float64)
    plain, patched = curve(False, torch.float32), curve(True, torch.float32)
    assert exact[-1] < 0.8 * exact[0], "the model does not learn: nothing is compared"
    own = (plain - exact).abs().max()
    assert (patched - exact).abs().max() <= 3 * own + 1e-5 * exact[0], (plain, patched, exact)
