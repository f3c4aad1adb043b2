"""vitkern.patch on timm's models with masked and biased attention: same weights, outputs and gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import timm_patches
import torch
from timm_patches import VIT, Last, random, sam_block
from torch import nn

import vitkern

timm = pytest.importorskip("timm")
from timm.models import beit, cait, levit, mvitv2, vision_transformer_sam  # noqa: E402

SPLIT = pytest.mark.parametrize("fused", [False, True])


# BEiT ----------------------------------------------------------------------------------------------------------------------


@SPLIT
@pytest.mark.parametrize("own", ["use_rel_pos_bias", "use_shared_rel_pos_bias"])
def test_beit_matches_on_a_grid_that_is_not_square(own, fused):
    timm_patches.check_beit(own, fused)


@pytest.mark.parametrize("separate", [False, True])
def test_beit_adds_its_own_bias_and_that_of_the_model(separate):
    timm_patches.check_two_biases_of_beit(separate)


def test_beit_follows_set_window_size():
    model = random(beit.Beit(img_size=32, num_classes=0, use_rel_pos_bias=True, init_values=0.5, **VIT)).eval()
    x = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(3))
    report = vitkern.patch(model)
    model.set_input_size(img_size=(48, 40))
    got = patch_cases.run(model, x, torch.float32, True)
    report.undo()
    patch_cases.Yardstick(model, x).hold("set_input_size", got)


# CaiT ----------------------------------------------------------------------------------------------------------------------


@SPLIT
@pytest.mark.parametrize("train", [False, True])
def test_cait_mixes_heads_in_both_places(fused, train):
    timm_patches.check_cait(fused, train)


# LeViT ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_levit_matches_on_grids_that_stride_does_not_divide(conv, pool, train):
    timm_patches.check_levit(conv, pool, train)


def test_a_foreign_index_is_refused():
    attention = levit.Attention(8, 4, 2, resolution=(3, 4))
    attention.attention_bias_idxs.copy_(attention.attention_bias_idxs.flip(0))
    assert vitkern.patch(attention).kept[0].reason == "attention_bias_idxs is not that of LeViT"
    attention = beit.Attention(8, 2, window_size=(2, 3))
    attention.relative_position_index[0, 0] = 0
    assert vitkern.patch(attention).kept[0].reason == "relative_position_index is not that of BEiT"


# SAM -----------------------------------------------------------------------------------------------------------------------


@SPLIT
@pytest.mark.parametrize("options", [{"use_rel_pos": True}, {"use_rope": True}, {"use_rel_pos": True, "qk_norm": True}])
def test_sam_matches_in_padded_windows_and_globally(options, fused):
    sizes = {"img_size": 48, "window_size": 4, "global_attn_indexes": (1,), "neck_chans": 8, "num_classes": 0}
    model = vision_transformer_sam.VisionTransformerSAM(**VIT, **sizes, **options)
    patch_cases.check(random(model, fused), (48, 48), replaced=2)


@SPLIT
@pytest.mark.parametrize(
    "options", [{}, {"use_rel_pos": True}, {"use_rel_pos": True, "qk_norm": True, "qkv_bias": False}]
)
def test_a_block_of_sam_in_whole_and_padded_windows_and_globally(options, fused):
    for window in (0, 3, 4):
        sizes = [(9, 6)] if window == 0 else [(9, 6), (8, 4), (2, 3)]
        timm_patches.check_sam_block(window, fused, sizes, **options)


def test_a_block_of_sam_drops_its_windows_one_by_one():
    model = nn.Sequential(Last(), sam_block(window_size=3, use_rel_pos=True, drop_path=0.5)).train()
    x = torch.randn(1, 12, 9, 6)
    with torch.no_grad():
        torch.manual_seed(7)
        want = model(x)
        with vitkern.patched(model) as report:
            torch.manual_seed(7)
            torch.testing.assert_close(model(x), want)
    assert report.replaced[0].kind.endswith("Block")


@pytest.mark.parametrize("window", [0, 4])
def test_a_block_of_sam_under_autocast(window):
    model = nn.Sequential(Last(), sam_block(window_size=window, use_rel_pos=True)).eval()
    x = torch.randn(2, 12, 9, 6, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(model, x, autocast=True)
    with vitkern.patched(model):
        yardstick.hold("autocast", patch_cases.run(model, x, torch.float32, True, autocast=True))


def test_a_block_of_sam_whose_attention_was_replaced_is_kept():
    block = sam_block(window_size=3)
    block.attn = nn.Identity()
    assert "attn is a torch.nn.modules.linear.Identity, not a" in vitkern.patch(block).kept[0].reason


def test_sam_resizes_its_tables_to_a_map_of_another_shape():
    attention = vision_transformer_sam.Attention(16, 2, use_rel_pos=True, input_size=(4, 6))
    model = nn.Sequential(Last(), random(attention))
    patch_cases.check(model, (4, 6), (7, 5), channels=16, replaced=1)


# MViTv2 --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["map", "class token"])
def test_mvit_v2_matches(first):
    timm_patches.check_mvit_v2(first)


def test_mvit_v2_reads_the_first_rows_of_its_tables_on_a_smaller_map():
    module = random(
        mvitv2.MultiScaleAttention(8, 8, (8, 8), 2, kernel_kv=(3, 3), stride_kv=(2, 2), has_cls_token=False)
    )
    patch_cases.check(OnMap(module, (6, 4)), (24, 8), channels=1, replaced=1)


class OnMap(nn.Module):
    """An attention of MViTv2 on the tokens of a map."""

    def __init__(self, attn, size):
        super().__init__()
        self.attn, self.size = attn, size

    def forward(self, x):
        return self.attn(x[:, 0], self.size)[0]


def test_what_of_mvit_v2_is_kept_says_why():
    kept = vitkern.patch(mvitv2.MultiScaleAttention(8, 8, (8, 8), 2, mode="conv_unshared")).kept[0].reason
    assert kept == "its pools are not shared by the heads"
    kept = vitkern.patch(mvitv2.MultiScaleAttention(8, 8, (8, 8), 2, rel_pos_type="")).kept[0].reason
    assert kept == "its scores have no decomposed positions"


# all -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention",
    [
        lambda: beit.Attention(8, 2, attn_drop=0.4, proj_drop=0.1),
        lambda: cait.TalkingHeadAttn(8, 2, attn_drop=0.4),
        lambda: cait.ClassAttn(8, 2, attn_drop=0.4),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), vision_transformer_sam.Attention(8, 2, attn_drop=0.4)),
    ],
)
def test_dropout_draws_in_training_only(attention):
    model, x = random(attention()).train(), torch.randn(2, 6, 8)
    with vitkern.patched(model) as report:
        assert len(report.replaced) == 1
        assert not torch.equal(model(x), model(x))
        model(x).square().mean().backward()
        assert torch.equal(model.eval()(x), model(x))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "attention",
    [
        lambda: beit.Attention(8, 2, True, window_size=(1, 5)),
        lambda: cait.TalkingHeadAttn(8, 2),
        lambda: levit.AttentionDownsample(8, 8, 4, 2, resolution=(2, 3)),
    ],
)
def test_a_patched_module_compiles_whole(attention):
    module, x = random(attention()), torch.randn(2, 6, 8)
    module.eval()  # that of LeViT returns nothing
    with torch.no_grad(), vitkern.patched(module) as report:
        want = module(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), want)
        assert len(report.replaced) == 1


def test_another_version_of_timm_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.28")
    assert "timm 1.0.28 is not a known version" in vitkern.patch(cait.ClassAttn(8)).kept[0].reason
