"""Channel attention as modules and inside timm's models: same weights, outputs and gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import by_formula, compare, ours_alone
from torch import nn

import vitkern
from vitkern.nn import MDTA, XCA, ChannelAttention

timm = pytest.importorskip("timm")
from timm.models import davit, edgenext, xcit  # noqa: E402


def random(model):
    """Random weights, also for temperatures and layer scales, which start at one and nearly zero."""
    patch_cases.randomize(model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "temperature" in name or "gamma" in name:
            p.detach().uniform_(0.5, 1.5, generator=generator)
    return model


# modules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_xca_is_that_of_xcit_and_edgenext(bias):
    for kind in (xcit.XCA, edgenext.CrossCovarianceAttn):
        compare(XCA(12, 3, bias), random(kind(12, 3, bias)), ours_alone, (9,), strict=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_channel_attention_is_that_of_davit(dynamic):
    compare(ChannelAttention(12, 3), random(davit.ChannelAttention(12, 3)), ours_alone, (9,), strict=True)
    theirs = random(davit.ChannelAttentionV2(12, 3, dynamic_scale=dynamic))
    compare(ChannelAttention(12, 3, True, 2, dynamic), theirs, ours_alone, (9,), strict=True)


@pytest.mark.parametrize("bias", [False, True])
def test_mdta_is_the_formula(bias):
    """Restormer's module, in the words of its paper; a state dict has its names."""
    module, x = random(MDTA(12, 3, bias)), torch.randn(2, 12, 5, 7)
    names = {n.rsplit(".", 1)[0] for n in module.state_dict()}
    assert names == {"temperature", "qkv", "qkv_dwconv", "project_out"}

    def formula(module, x):
        q, k, v = module.qkv_dwconv(module.qkv(x)).flatten(2).unflatten(1, (3, 3, 4)).unbind(1)  # [B, heads, 4, N]
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        p = torch.einsum("bhcn,bhdn->bhcd", q, k).mul(module.temperature).softmax(-1)
        return module.project_out(torch.einsum("bhcd,bhdn->bhcn", p, v).flatten(1, 2).unflatten(2, x.shape[2:]))

    by_formula(module, formula, x)


def test_refusals_are_sentences():
    with pytest.raises(ValueError, match=r"XCA: num_heads must divide dim \(12\), got 5"):
        XCA(12, 5)
    with pytest.raises(ValueError, match="ChannelAttention: version must be 1 or 2, got 3"):
        ChannelAttention(12, 3, version=3)
    with pytest.raises(ValueError, match=r"MDTA: x must have shape \[B, 12, H, W\], got \[2, 9, 12\]"):
        MDTA(12, 3)(torch.zeros(2, 9, 12))
    with pytest.raises(ValueError, match=r"XCA: x must have shape \[B, N, 12\]"):
        XCA(12, 3)(torch.zeros(2, 9, 11))


# models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_xcit_matches(train):
    model = xcit.Xcit(
        img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, num_classes=0, cls_attn_layers=1, eta=1.0
    )
    report = patch_cases.check(random(model), (32, 48), replaced=3, train=train)
    assert [r.op for r in report.replaced] == ["channel_attention"] * 2 + ["attention"]


def test_edgenext_matches():
    model = edgenext.EdgeNeXt(
        dims=(8, 16, 24, 32), depths=(2, 2, 2, 2), global_block_counts=(0, 1, 1, 1), heads=(2,) * 4, d2_scales=(2, 2, 3, 4),
        num_classes=0,
    )  # fmt: skip
    patch_cases.check(random(model), (64, 96), replaced=3)


@pytest.mark.parametrize("v2", [False, True])
def test_davit_matches(v2):
    sizes = {"embed_dims": (8, 16), "num_heads": (2, 2), "num_classes": 0}
    model = davit.DaVit(depths=(1, 1), window_size=4, channel_attn_v2=v2, **sizes)
    report = patch_cases.check(random(model), (32, 40), replaced=4)
    assert not report.kept


def test_dropout_of_the_weights_in_training_is_reported_and_never_left_out():
    model, x = random(nn.Sequential(xcit.XCA(8, 2, attn_drop=0.5))), torch.randn(2, 6, 8)
    reason = vitkern.patch(model.train()).kept[0].reason
    assert reason == "attn_drop is 0.5 in training, and channel_attention drops no weights"
    with vitkern.patched(model.eval()) as report:
        assert len(report.replaced) == 1
        model[0].fused_attn = False
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x)), "its own forward drops"


def test_another_version_of_timm_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "__version__", "1.0.28")
    assert "timm 1.0.28 is not a known version" in vitkern.patch(xcit.XCA(8)).kept[0].reason


def test_patched_modules_compile_whole():
    module, x = random(davit.ChannelAttentionV2(8, 2)).eval(), torch.randn(2, 6, 8)
    with torch.no_grad(), vitkern.patched(module):
        want = module(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), want)
