"""vitkern.patch on torchvision's Swin and MaxViT models: same weights, same outputs, same gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch

import vitkern

torchvision = pytest.importorskip("torchvision")
from torchvision.models import maxvit, swin_transformer  # noqa: E402
from torchvision.models.video import swin_transformer as video  # noqa: E402

SMALL = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "stochastic_depth_prob": 0.0, "num_classes": 3}


def swin(window, **options):
    """The layers before the pooling, whose output is a map."""
    model = swin_transformer.SwinTransformer(patch_size=[4, 4], window_size=window, **SMALL | options)
    return patch_cases.randomize(model).features


def swinv2(window):
    v2 = {"block": swin_transformer.SwinTransformerBlockV2, "downsample_layer": swin_transformer.PatchMergingV2}
    return swin(window, **v2)


def swin3d(window):
    model = video.SwinTransformer3d(patch_size=[2, 4, 4], window_size=window, **SMALL)
    return patch_cases.randomize(model)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_maps_that_windows_divide_and_others(make):
    patch_cases.check(make([7, 7]), (56, 56), (36, 60), replaced=4)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_a_map_smaller_than_the_window_on_one_axis_keeps_the_window_and_shifts_on_the_other(make):
    patch_cases.check(make([4, 4]), (12, 40), (12, 12), replaced=4, train=True)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_rectangular_windows(make):
    patch_cases.check(make([3, 5]), (44, 48), replaced=4)


def test_projections_without_bias():
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

    for kind in (ShiftedWindowAttention, ShiftedWindowAttentionV2):
        module = patch_cases.randomize(kind(16, [4, 4], [2, 2], 2, qkv_bias=False, proj_bias=False))
        x = torch.randn(2, 6, 9, 16, generator=torch.Generator().manual_seed(3))
        yardstick = patch_cases.Yardstick(module, x)
        with vitkern.patched(module):
            yardstick.hold(kind.__name__, patch_cases.run(module, x, torch.float32, True))


def test_swin3d_matches_on_clips_that_windows_divide_and_on_others():
    patch_cases.check(swin3d([2, 4, 4]), (8, 32, 32), (6, 36, 28), replaced=4)


def test_swin3d_with_a_clip_smaller_than_the_window_reads_the_leading_rows_of_the_index():
    model = swin3d([4, 3, 5])
    patch_cases.check(model, (4, 28, 24), replaced=4)  # 2 x 7 x 6: the window is cut on the first axis
    patch_cases.check(model, (10, 8, 16), replaced=4, train=True)  # 5 x 2 x 4: on the other two


@pytest.mark.parametrize("make", [swin, swinv2])
def test_autocast_is_as_close_as_the_model_itself(make):
    model = make([4, 4]).eval()
    x = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(model, x, autocast=True)
    with vitkern.patched(model):
        yardstick.hold("autocast", patch_cases.run(model, x, torch.float32, True, autocast=True))


def test_the_published_classes_are_served():
    for build in (torchvision.models.swin_t, torchvision.models.swin_v2_t, torchvision.models.video.swin3d_t):
        with torch.device("meta"):
            model = build()
        assert len(vitkern.patch(model).replaced) == 12
    with torch.device("meta"):
        assert len(vitkern.patch(torchvision.models.maxvit_t()).replaced) == 22


def test_another_index_is_kept_with_a_reason():
    model = swin([4, 4])
    model[1][0].attn.relative_position_index += 1
    report = vitkern.patch(model)
    assert len(report.replaced) == 3 and report.kept[0].reason == "relative_position_index is not that of Swin"


def test_another_version_of_torchvision_is_refused(monkeypatch):
    monkeypatch.setattr(torchvision, "__version__", "0.14.1+cpu")
    report = vitkern.patch(swin([4, 4]))
    reason = "torchvision 0.14.1+cpu is not a known version (0.15 to 0.x)"
    assert not report.replaced and report.kept[0].reason == reason


def test_dropout_in_training_draws_and_trains():
    model = swin([7, 7], attention_dropout=0.3).train()
    x = torch.randn(2, 3, 56, 56)
    with vitkern.patched(model):
        first = model(x)
        first.square().mean().backward()
        assert not torch.equal(first, model(x))
        assert torch.equal(model.eval()(x), model(x))
    assert all(p.grad.isfinite().all() for p in model.parameters())


# MaxViT --------------------------------------------------------------------------------------------------------------------


def partition(kind, side=9, size=3, dropout=0.0):
    layer = maxvit.PartitionAttentionLayer(
        12, 4, size, kind, (side, side), 2, torch.nn.GELU, torch.nn.LayerNorm, dropout, 0.0, 0.0
    )
    return patch_cases.randomize(layer)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("side", [3, 9])
@pytest.mark.parametrize("kind", ["window", "grid"])
def test_maxvit_in_windows_and_on_grids(kind, side, train):
    model = partition(kind, side)
    assert model.attn_layer[1].scale_factor == 12**-0.5  # not that of a head
    patch_cases.check(model, (side, side), channels=12, replaced=1, train=train)


@pytest.mark.parametrize("kind", ["window", "grid"])
def test_maxvit_under_autocast(kind):
    model = partition(kind).eval()
    x = torch.randn(2, 12, 9, 9, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(model, x, autocast=True)
    with vitkern.patched(model):
        yardstick.hold("autocast", patch_cases.run(model, x, torch.float32, True, autocast=True))


def test_a_maxvit_matches():
    model = maxvit.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 4, 0.0)
    model.classifier = torch.nn.Identity()
    patch_cases.check(patch_cases.randomize(model), (64, 64), replaced=4)


def test_maxvit_on_a_wider_window_map_runs_and_on_another_map_its_own_forward_does():
    wide = partition("window")
    wide.grid_size = (9, 6)
    patch_cases.check(wide, (9, 6), channels=12, replaced=1)
    other, x = partition("window").eval(), torch.randn(1, 12, 6, 6)
    with torch.no_grad(), vitkern.patched(other), pytest.raises(RuntimeError, match="shape"):
        other(x)


def test_a_replaced_attention_or_index_of_maxvit_is_refused():
    layer, other = partition("grid"), partition("grid")
    layer.attn_layer[1] = torch.nn.Identity()
    other.attn_layer[1].relative_position_index.zero_()
    reasons = [k.reason for k in vitkern.patch(torch.nn.Sequential(layer, other)).kept]
    own = "torchvision.models.maxvit.RelativePositionalMultiHeadAttention"
    assert reasons == [
        f"attn_layer.1 is a torch.nn.modules.linear.Identity, not a {own}",
        "relative_position_index is not that of Swin",
    ]
