"""vitkern.patch on timm's MaxViT, GC ViT and Hiera: same weights, same outputs, same gradients."""

from functools import partial

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from test_patch_timm_windows import Last, random
from torch import nn

import vitkern

timm = pytest.importorskip("timm")
from timm.models import gcvit, hiera, maxxvit  # noqa: E402

FUSED = pytest.mark.parametrize("fused", [False, True])


def fusing(model, fused):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


# MaxViT --------------------------------------------------------------------------------------------------------------------


def partition(kind="block", rel_pos="bias", head_first=True, layer="Cl", **options):
    """A block whose windows are 4 x 3 and whose grids are 2 x 3, of maps with 12 channels."""
    sizes = {"window_size": (4, 3), "grid_size": (2, 3), "dim_head": 4}
    cfg = maxxvit.MaxxVitTransformerCfg(rel_pos_type=rel_pos, head_first=head_first, rel_pos_dim=8, **sizes | options)
    block = random(getattr(maxxvit, f"PartitionAttention{layer}")(12, kind, cfg))
    if rel_pos == "mlp":
        block.attn.rel_pos.mlp.drop1.p = 0.0
    return Last(block) if layer == "Cl" else block


@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize("rel_pos", ["bias", "bias_tf", "mlp", None])
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_maxvit_in_blocks_and_on_grids(kind, rel_pos, head_first):
    model = fusing(partition(kind, rel_pos, head_first), False)
    patch_cases.check(model, (4, 6), (8, 9), channels=12, replaced=1)


@FUSED
@pytest.mark.parametrize("layer", ["Cl", "2d"])
@pytest.mark.parametrize("kind", ["block", "grid"])
def test_maxvit_in_training_with_channels_last_and_first(kind, layer, fused):
    for head_first in (True, False):
        model = fusing(partition(kind, "bias_tf", head_first, layer, init_values=0.5), fused)
        patch_cases.check(model, (8, 9), channels=12, replaced=1, train=True)


@pytest.mark.parametrize("mode", ["cr", "swin"])
def test_maxvit_with_log_spaced_offsets(mode):
    model = partition("grid", "mlp", window_size=(3, 3))
    model.block.attn.rel_pos = random(timm.layers.RelPosMlp((2, 3), 3, 8, mode=mode))
    patch_cases.check(model, (4, 6), channels=12, replaced=1)


def test_the_bias_of_an_mlp_is_dropped_anew_in_training():
    model, x = partition("block", "mlp").train(), torch.randn(1, 12, 4, 6)
    model.block.attn.rel_pos.mlp.drop1.p = 0.5
    with vitkern.patched(model):
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_maxvit_attends_in_blocks_and_on_grids_beside_each_other():
    cfg = maxxvit.MaxxVitTransformerCfg(window_size=(4, 3), dim_head=4, rel_pos_type="bias_tf")
    patch_cases.check(Last(random(maxxvit.ParallelPartitionAttention(24, cfg))), (8, 9), channels=24, replaced=1)


@pytest.mark.parametrize("kind", ["block", "grid"])
@pytest.mark.parametrize("layer", ["Cl", "2d"])
def test_maxvit_under_autocast(kind, layer):
    patch_cases.check_autocast(partition(kind, layer=layer), 8, 9, channels=12)


@pytest.mark.parametrize("nchw", [False, True])
def test_a_maxvit_matches_and_follows_set_input_size(nchw):
    sizes = {"dim_head": 4, "rel_pos_type": "bias_tf", "partition_ratio": 8, "use_nchw_attn": nchw}
    cfg = maxxvit.MaxxVitCfg(
        embed_dim=(8, 12), depths=(1, 1), block_type=("M", "M"), stem_width=8,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(**sizes),
    )  # fmt: skip
    model = random(maxxvit.MaxxVit(cfg, img_size=(48, 64), num_classes=0, global_pool=""))
    model.norm = nn.Identity()
    patch_cases.check(model, (48, 64), replaced=4)
    model.set_input_size((64, 96))
    patch_cases.check(model, (64, 96), replaced=4)


def test_maxvit_on_a_map_that_windows_do_not_divide_says_what_timm_says():
    model, x = partition(), torch.randn(1, 12, 5, 6)
    with vitkern.patched(model), pytest.raises(AssertionError, match=r"height \(5\) must be divisible by window \(4\)"):
        model(x)


# GC ViT --------------------------------------------------------------------------------------------------------------------


class Queried(nn.Module):
    """A block with queries of the whole image, which are made of the image."""

    def __init__(self, block):
        super().__init__()
        self.block, self.query = block, nn.AdaptiveAvgPool2d(block.window_size)

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1), self.query(x).permute(0, 2, 3, 1) * 3)


def context(use_global, window=(4, 3)):
    block = gcvit.GlobalContextVitBlock(12, (8, 9), 3, window, use_global=use_global, layer_scale=0.5)
    return Queried(random(block))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("use_global", [False, True])
def test_gcvit_in_one_window_and_in_several(use_global, train):
    patch_cases.check(context(use_global), (4, 3), (8, 9), channels=12, replaced=1, train=train)


def test_gcvit_under_autocast():
    patch_cases.check_autocast(context(True), 8, 9, channels=12)


def test_a_gcvit_keeps_its_images_apart():
    model = gcvit.GlobalContextVit(
        img_size=96, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=(6, 6), num_classes=0, global_pool="",
        layer_scale=0.5,
    )  # fmt: skip
    model = random(model)
    patch_cases.check(model, (96, 96), replaced=4)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad(), vitkern.patched(model.eval()):
        torch.testing.assert_close(model(x), torch.cat([model(x[:1]), model(x[1:])]))


def test_gcvit_whose_windows_mixed_images_is_refused(monkeypatch):
    model = nn.Sequential(context(False).block, context(True).block)
    monkeypatch.setattr(timm, "__version__", "1.0.30")
    report = vitkern.patch(model)
    assert len(report.replaced) == 1 and "timm 1.0.30 is not a known version (1.0.31" in report.kept[0].reason


# Hiera ---------------------------------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("pooled", [1, 4])
def test_hiera_in_units_and_globally(pooled, units, fused):
    attention = hiera.MaskUnitAttention(8, 12, 3, pooled, 4, units)
    model = nn.Sequential(nn.Flatten(2), Tokens(), fusing(random(attention), fused))
    for train in (False, True):
        patch_cases.check(model, (8, 6), (4, 4), channels=8, replaced=1, train=train)


class Tokens(nn.Module):
    """Channels [B, C, N] last."""

    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("pooled", [1, 4])
def test_hiera_under_autocast(pooled):
    patch_cases.check_autocast(
        nn.Sequential(nn.Flatten(2), Tokens(), random(hiera.MaskUnitAttention(8, 12, 3, pooled, 4, True))),
        8,
        6,
        channels=8,
    )


def test_equal_queries_share_the_gradient_of_their_largest():
    module = random(hiera.MaskUnitAttention(8, 8, 2, 4, 2, True)).double()
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(2, 16, 8)
    module.qkv.weight.detach()[16:].normal_()
    x = torch.cat((x[:, :8], x[:, 8:] * 2), 1)  # ties among some tokens of each query, and keys that differ
    got = []
    for patched in (False, True):
        report = vitkern.patch(module) if patched else None
        given = x.clone().requires_grad_()
        got.append(torch.autograd.grad((module(given) * torch.arange(32.0).view(4, 8)).sum(), given)[0])
    assert report is not None and len(report.replaced) == 1
    torch.testing.assert_close(*got)


def test_a_hiera_matches():
    model = hiera.Hiera(
        img_size=(64, 64), embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), num_classes=0, global_pool="", drop_path_rate=0.0,
        mask_unit_size=(4, 4), mask_unit_attn=(True, True, False, False), q_pool=2,
    )  # fmt: skip
    model.head.norm = nn.Identity()
    patch_cases.check(random(model), (64, 64), replaced=4)


# all ------------------------------------------------------------------------------------------------------------------------


def test_positions_and_attention_that_were_replaced_are_refused():
    own, foreign, other = (partition().block for _ in range(3))
    own.attn.rel_pos = nn.Identity()
    foreign.attn.rel_pos.relative_position_index.zero_()
    other.attn = nn.Identity()
    reasons = [k.reason for k in vitkern.patch(nn.Sequential(own, foreign, other)).kept]
    assert reasons == [
        "rel_pos is a torch.nn.modules.linear.Identity, which is not known",
        "relative_position_index is not that of Swin",
        "attn is a torch.nn.modules.linear.Identity, not a timm.models.maxxvit.AttentionCl",
    ]


@pytest.mark.parametrize("make", [partial(partition, "grid", attn_drop=0.4), partial(context, True)])
def test_dropout_draws_in_training_only(make):
    model, x = make().train(), torch.randn(2, 12, 8, 9)
    for module in model.modules():
        if hasattr(module, "attn_drop"):
            module.attn_drop.p = 0.4
    with vitkern.patched(model):
        assert not torch.equal(model(x), model(x))
        model(x).square().mean().backward()
        assert torch.equal(model.eval()(x), model(x))
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "make", [partial(partition, "grid", "bias_tf"), partial(partition, layer="2d"), partial(context, True)]
)
def test_a_patched_block_compiles_whole(make):
    model, x = make().eval(), torch.randn(2, 12, 8, 9)
    with torch.no_grad(), vitkern.patched(model):
        want = model(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
