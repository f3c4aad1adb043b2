"""vitkern.patch on timm's Swin models: same weights, same outputs, same gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

import vitkern

timm = pytest.importorskip("timm")
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr  # noqa: E402

SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "drop_path_rate": 0.0, "global_pool": ""}


def swin(kind=swin_transformer.SwinTransformer, **options):
    """Without the last normalisation: the mean square of what it gives is constant and has no gradient. The others get
    weights: those of a fresh SwinV2 are zero, so that its blocks do nothing.
    """
    model = patch_cases.randomize(kind(num_classes=0, **SMALL | {"img_size": 56} | options))
    model.norm = nn.Identity()
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.detach().uniform_(0.5, 1.5, generator=generator)
    return model


def swinv2_cr(**options):
    return swin(swin_transformer_v2_cr.SwinTransformerV2Cr, **options)


def swinv2(**options):
    return swin(swin_transformer_v2.SwinTransformerV2, **options)


@pytest.mark.parametrize("make", [swin, swinv2, swinv2_cr])
def test_a_map_that_windows_divide(make):
    patch_cases.check(make(window_size=7), (56, 56), replaced=4)


@pytest.mark.parametrize("make", [swin, swinv2, swinv2_cr])
def test_a_padded_map_of_any_size_with_masks_made_anew(make):
    model = make(window_size=7, strict_img_size=False)
    patch_cases.check(model, (36, 60), (16, 28), replaced=4)  # 9 x 15; 4 x 7, smaller than the window


@pytest.mark.parametrize("make", [swin, swinv2])
def test_a_static_mask_of_a_padded_map_and_a_window_cut_on_one_axis(make):
    model = make(window_size=4, img_size=(40, 24))  # 10 x 6, then 5 x 3 with windows 4 x 3 that shift on one axis
    assert model.layers[1].blocks[1].shift_size == (2, 0)
    patch_cases.check(model, (40, 24), replaced=4, train=True)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_rectangular_windows_and_no_bias_of_the_projection(make):
    patch_cases.check(make(window_size=(3, 5), qkv_bias=False, img_size=(44, 48)), (44, 48), replaced=4)


def test_swinv2_cr_with_a_static_mask_and_a_further_norm():
    """Its positions drop in training; a shifted block runs its own forward on a map that its mask is not made for."""
    model = swinv2_cr(window_size=4, img_size=(40, 24), extra_norm_period=2)
    assert model.stages[1].blocks[1].shift_size == (2, 0)
    patch_cases.check(model, (40, 24), replaced=4)
    block = model.stages[0].blocks[1].eval()
    x = torch.randn(2, 9, 7, 16)
    with torch.no_grad():
        want = block(x)
        with vitkern.patched(block), patch_cases.Called("window_attention_qkvpacked") as seen:
            assert torch.equal(block(x), want)
    assert seen.count == 0


def test_swinv2_with_a_pretrained_window():
    model = swinv2(window_size=4, img_size=32, pretrained_window_sizes=(6, 6))
    patch_cases.check(model, (32, 32), replaced=4)


def test_heads_wider_than_their_share_of_the_channels():
    patch_cases.check(swin(window_size=4, img_size=32, head_dim=12), (32, 32), replaced=4)


@pytest.mark.parametrize("make", [swin, swinv2])
@pytest.mark.parametrize("always", [False, True])
def test_a_patched_model_follows_set_input_size(make, always):
    plain, changed = make(window_size=4, img_size=32).eval(), make(window_size=4, img_size=32).eval()
    vitkern.patch(changed)
    for model in (plain, changed):
        model.set_input_size(img_size=(40, 24), window_size=(7, 6), always_partition=always)
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
    assert plain.layers[1].blocks[1].shift_size == ((3, 3) if always else (0, 0))
    patch_cases.Yardstick(plain, x).hold("set_input_size", patch_cases.run(changed, x, torch.float32, True))


@pytest.mark.parametrize("make", [swin, swinv2])
def test_a_map_that_the_static_mask_was_not_made_for_runs_the_blocks_own_forward(make):
    block = make(window_size=7).eval().layers[0].blocks[1]
    x = torch.randn(1, 28, 28, 16)  # four times the windows of the mask: timm repeats it
    with torch.no_grad():
        before = block(x)
        vitkern.patch(block)
        assert torch.equal(block(x), before)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_autocast_is_as_close_as_the_model_itself(make):
    model = make(window_size=4, img_size=(40, 24)).eval()
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(model, x, autocast=True)
    with vitkern.patched(model):
        yardstick.hold("autocast", patch_cases.run(model, x, torch.float32, True, autocast=True))


def test_a_block_with_a_replaced_part_is_kept_with_a_reason():
    model = swin(window_size=7)
    first, second = model.layers[0].blocks
    first.attn.__class__ = type("MyAttention", (type(first.attn),), {})
    second.attn.qkv = nn.Sequential(second.attn.qkv)
    report = vitkern.patch(model)
    assert len(report.replaced) == 2
    assert [k.reason.split(",")[-1] for k in report.kept] == [
        " not a timm.models.swin_transformer.WindowAttention",
        " not a torch.nn.modules.linear.Linear",
    ]


def test_another_version_of_timm_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.28")
    report = vitkern.patch(swin(window_size=7))
    assert not report.replaced and "timm 1.0.28 is not a known version (1.0.29 to 1.0.x)" in report.kept[0].reason


def test_dropout_in_training_draws_and_trains():
    model = swin(window_size=7, attn_drop_rate=0.3).train()
    x = torch.randn(2, 3, 56, 56)
    with vitkern.patched(model):
        first = model(x)
        first.square().mean().backward()
        assert not torch.equal(first, model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert all(p.grad.isfinite().all() for p in model.parameters())
