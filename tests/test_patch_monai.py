"""vitkern.patch on MONAI's SwinUNETR and its encoder: same weights, same outputs, same gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch

import vitkern
from vitkern.testing import assert_close_to_oracle

monai = pytest.importorskip("monai")
from monai.networks.nets import swin_unetr  # noqa: E402


class Encoder(swin_unetr.SwinTransformer):
    """Its outputs before they are normalised: the mean square of normalised ones is constant and has no gradient."""

    def forward(self, x):
        return super().forward(x, normalize=False)


def encoder(*window, **options):
    model = Encoder(
        in_chans=1,
        embed_dim=12,
        window_size=window,
        patch_size=(2,) * len(window),
        depths=(2, 2, 1, 1),
        num_heads=(2, 2, 4, 4),
        spatial_dims=len(window),
        **options,
    )
    return patch_cases.randomize(model)


def compare(model, *size, batch=2, autocast=None, grad=True):
    """The oracle rule on one image of one channel."""
    x = torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(model, x, grad, autocast)
    with vitkern.patched(model) as report:
        yardstick.hold(str(size), patch_cases.run(model, x, torch.float32, grad, autocast))
    return len(report.replaced)


def smooth(model):
    """SiLU in place of LeakyReLU, inplace ones too. A gradient jumps where a rounding takes a value over a kink: two runs
    of the float32 model then differ by a hundred times their rounding, which says nothing about attention."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LeakyReLU):
                setattr(module, name, torch.nn.SiLU())
    return model


@pytest.mark.parametrize("options", [{}, {"depths": (2, 1, 1, 1), "spatial_dims": 3}], ids=["image", "volume"])
def test_swin_unetr(options):
    options = {"spatial_dims": 2, "depths": (2, 2, 1, 1)} | options
    model = swin_unetr.SwinUNETR(in_channels=1, out_channels=2, num_heads=(2, 2, 4, 4), feature_size=12, **options)
    patch_cases.randomize(model).eval()
    size, batch = ((64, 96), 2) if options["spatial_dims"] == 2 else ((32, 32, 64), 1)
    assert compare(model, *size, batch=batch, grad=False) == sum(options["depths"])
    compare(smooth(model), *size, batch=batch)


def test_the_encoder_in_2d_on_maps_that_windows_divide_and_on_others():
    patch_cases.check(encoder(4, 4), (32, 32), (36, 44), channels=1, replaced=6)
    patch_cases.check(encoder(3, 5), (28, 20), channels=1, replaced=6, train=True)


def test_the_encoder_in_3d_with_windows_cut_to_the_map():
    model = encoder(4, 3, 5)
    patch_cases.check(model, (16, 24, 20), (12, 8, 28), channels=1, replaced=6)


def test_projections_without_bias_and_checkpointed_blocks():
    patch_cases.check(encoder(4, 4, qkv_bias=False, use_checkpoint=True), (20, 28), channels=1, replaced=6, train=True)


def test_the_second_version_with_its_convolutions():
    patch_cases.check(encoder(2, 4, 3, use_v2=True), (20, 24, 28), channels=1, replaced=6)


def test_a_block_without_a_mask_shifts_without_one():
    block = patch_cases.randomize(swin_unetr.SwinTransformerBlock(12, 2, (4, 4), (2, 2))).eval()
    x = torch.randn(2, 9, 7, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = block.double()(x.double(), None)
        eager = block.float()(x, None)
        vitkern.patch(block)
        assert_close_to_oracle("output", block(x, None), want, eager)


def test_autocast_is_as_close_as_the_model_itself():
    compare(encoder(4, 4).eval(), 36, 44, autocast=True)


def test_another_version_of_monai_is_refused(monkeypatch):
    monkeypatch.setattr(monai, "__version__", "1.2.0")
    report = vitkern.patch(encoder(4, 4))
    assert not report.replaced and "monai 1.2.0 is not a known version (1.3 to 1.x)" in report.kept[0].reason


def test_dropout_in_training_draws_and_trains():
    model = encoder(4, 4, attn_drop_rate=0.3).train()
    x = torch.randn(2, 1, 36, 44)
    with vitkern.patched(model):
        first = model(x)
        sum(t.square().mean() for t in first).backward()
        assert not torch.equal(first[-1], model(x)[-1])
        assert torch.equal(model.eval()(x)[-1], model(x)[-1])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
