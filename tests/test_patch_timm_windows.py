"""vitkern.patch on timm's window attention without shift: same weights, same outputs, same gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

import vitkern

timm = pytest.importorskip("timm")
from timm.models import davit, efficientvit_msra, tiny_vit, twins  # noqa: E402


def random(model):
    """Random weights, also for what timm starts at one or at zero: norms, tables of offsets, layer scales."""
    patch_cases.randomize(model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "norm" in name or "bn" in name or "gamma" in name:
            p.detach().uniform_(0.5, 1.5, generator=generator)
        if "attention_biases" in name:
            p.detach().normal_(generator=generator)
    return model


class Last(nn.Module):
    """A block that takes its channels last, on images with their channels first."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1))


# TinyViT -------------------------------------------------------------------------------------------------------------------


def tiny(window, fused=True, ratio=1):
    block = tiny_vit.TinyVitBlock(12, 3, window)
    if ratio != 1:
        block.attn = tiny_vit.Attention(12, 4, 3, attn_ratio=ratio, resolution=(window, window))
    block.attn.fused_attn = fused
    return Last(random(block))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_tiny_vit_in_one_window_in_whole_and_in_padded_ones(train, fused):
    patch_cases.check(tiny(4, fused), (4, 4), (8, 12), (9, 6), (3, 10), channels=12, replaced=1, train=train)


def test_tiny_vit_with_values_wider_than_keys():
    patch_cases.check(tiny(3, fused=False, ratio=2), (6, 7), channels=12, replaced=1)


@pytest.mark.parametrize("size", [(8, 4), (9, 6)])
def test_tiny_vit_under_autocast(size):
    patch_cases.check_autocast(tiny(4), *size, channels=12)


def test_a_tiny_vit_matches():
    model = tiny_vit.TinyVit(
        embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_sizes=(7, 7, 14, 7),
        num_classes=0, global_pool="", drop_path_rate=0.0,
    )  # fmt: skip
    model.head.norm = nn.Identity()
    patch_cases.check(random(model), (64, 96), replaced=4)


def test_tiny_vit_reads_weights_that_are_loaded_later():
    """timm keeps the bias of eval mode."""
    model, other = (random(tiny_vit.TinyVitBlock(12, 3, 4)).eval() for _ in range(2))
    other.attn.attention_biases.detach().add_(1.0).mul_(2.0)
    x = torch.randn(2, 8, 8, 12)
    with torch.no_grad(), vitkern.patched(model):
        model(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(x), other(x))


def test_a_foreign_index_or_a_replaced_attention_is_refused():
    block, other = tiny_vit.TinyVitBlock(12, 3, 4), tiny_vit.TinyVitBlock(12, 3, 4)
    block.attn.attention_bias_idxs.copy_(block.attn.attention_bias_idxs.flip(0))
    other.attn = nn.Identity()
    reasons = [k.reason for k in vitkern.patch(nn.Sequential(block, other)).kept]
    assert reasons[0] == "attention_bias_idxs is not that of LeViT"
    assert reasons[1].endswith("Identity, not a timm.models.tiny_vit.Attention")


# EfficientViT of MSRA ------------------------------------------------------------------------------------------------------


def cascaded(resolution=9, window=4):
    module = random(efficientvit_msra.LocalWindowAttention(24, 4, 3, 2, resolution, window, kernels=(3, 5, 7)))
    for name, p in module.named_parameters():
        if "bn.bias" in name:  # no channel is positive everywhere: its bias would have no gradient before the last norm
            p.detach().mul_(0.1)
    return module


@pytest.mark.parametrize("train", [False, True])
def test_efficientvit_in_one_window_in_whole_and_in_padded_ones(train):
    patch_cases.check(cascaded(), (4, 4), (8, 12), (9, 6), channels=24, replaced=1, train=train)


def test_an_efficientvit_matches_in_windows_that_a_small_map_cuts():
    model = efficientvit_msra.EfficientVitMsra(
        img_size=160, num_classes=0, global_pool="", embed_dim=(16, 24, 32), key_dim=(4, 4, 4), depth=(1, 1, 1),
        num_heads=(1, 2, 4), window_size=(7, 7, 7), kernels=(5, 5, 3, 3),
    )  # fmt: skip
    patch_cases.check(random(model), (160, 160), replaced=3)  # maps of 10, 5 and 3


def test_efficientvit_under_autocast():
    patch_cases.check_autocast(cascaded(), 9, 6, channels=24)


def test_efficientvit_follows_set_input_size():
    model = cascaded().eval()
    x = torch.randn(2, 24, 7, 5, generator=torch.Generator().manual_seed(3))
    report = vitkern.patch(model)
    model.set_input_size(3)
    got = patch_cases.run(model, x, torch.float32, True)
    report.undo()
    patch_cases.Yardstick(model, x).hold("set_input_size", got)


# DaViT and Twins -----------------------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """An attention that takes tokens and the size of their map, on images."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))


def unpositioned(kind):
    if kind == "davit":
        return random(davit.SpatialBlock(12, 3, (4, 3), mlp_ratio=2.0))
    makes = {"local": (twins.LocallyGroupedAttn, {"ws": 4}), "global": (twins.GlobalSubSampleAttn, {"sr_ratio": 2})}
    make, options = makes.get(kind, (twins.GlobalSubSampleAttn, {}))
    return Sized(random(make(12, 3, **options)))


KINDS = pytest.mark.parametrize("kind", ["davit", "local", "global", "unreduced"])


@KINDS
@pytest.mark.parametrize("train", [False, True])
def test_davit_and_twins_on_whole_and_padded_maps(kind, train):
    for fused in (False, True):
        model = unpositioned(kind)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        patch_cases.check(model, (8, 12), (9, 7), channels=12, replaced=1, train=train)


def test_davit_without_bias_and_mlp():
    block = random(davit.SpatialBlock(12, 3, 4, qkv_bias=False))
    block.mlp = None
    patch_cases.check(block, (9, 7), channels=12, replaced=1)


@KINDS
def test_davit_and_twins_under_autocast(kind):
    patch_cases.check_autocast(unpositioned(kind), 9, 7, channels=12)


def test_a_twins_matches():
    model = twins.Twins(
        img_size=64, embed_dims=(8, 12), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2), sr_ratios=(4, 2), wss=(5, 3),
        num_classes=0, global_pool="",
    )  # fmt: skip
    model.norm = nn.Identity()
    patch_cases.check(random(model), (64, 64), replaced=4)


def test_a_projection_that_was_replaced_is_refused():
    local, block = unpositioned("local").attn, unpositioned("davit")
    local.qkv, block.attn.qkv = nn.Sequential(local.qkv), nn.Sequential(block.attn.qkv)
    reasons = [k.reason for k in vitkern.patch(nn.ModuleList([local, block])).kept]
    assert [r.split(",")[0].split(".")[-1] for r in reasons] == ["Sequential"] * 2


@pytest.mark.parametrize("kind", ["local", "global"])
def test_dropout_of_twins_draws_in_training_only(kind):
    model, x = unpositioned(kind).train(), torch.randn(2, 12, 9, 7)
    model.attn.attn_drop.p = 0.4
    with vitkern.patched(model):
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


# all -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "channels"),
    [(lambda: tiny(4), 12), (cascaded, 24), (lambda: unpositioned("davit"), 12), (lambda: unpositioned("local"), 12)],
)
def test_a_patched_module_compiles_whole(make, channels):
    model, x = make().eval(), torch.randn(2, channels, 9, 6)
    with torch.no_grad(), vitkern.patched(model) as report:
        want = model(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), want)
    assert len(report.replaced) == 1
