"""vitkern.patch on transformers' Swin models: same weights, same outputs, same gradients."""

import copy
import functools
import math

import libraries  # noqa: F401
import patch_cases
import pytest
import torch

import vitkern

transformers = pytest.importorskip("transformers")
SMALL = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0}


def swin(**options):
    config = transformers.SwinConfig(image_size=56, window_size=7, **SMALL | options)
    return patch_cases.randomize(transformers.SwinModel(config))


def swinv2(**options):
    config = transformers.Swinv2Config(image_size=64, window_size=8, **SMALL | options)
    return patch_cases.randomize(transformers.Swinv2Model(config))


def test_swin_matches_on_maps_that_windows_divide_and_on_others():
    patch_cases.check(swin(), (56, 56), (76, 92), (64, 120), (56, 112), (112, 56), replaced=4)


def test_swinv2_matches():
    patch_cases.check(swinv2(), (64, 64), (72, 100), replaced=4)


class FacingAway(torch.nn.Module):
    """A shifted SwinV2 layer at the largest logit scale: queries score -100 with keys of their own half of the map, and
    +100 with those of the other half, which wrapped windows hide."""

    def __init__(self):
        super().__init__()
        config = transformers.Swinv2Config(image_size=64, window_size=8, **SMALL)
        kind = transformers.models.swinv2.modeling_swinv2.Swinv2Layer
        self.layer = patch_cases.randomize(kind(config, 16, (16, 16), 2, drop_path_rate=0.0, shift_size=4))
        attn = self.layer.attention.self
        with torch.no_grad():
            attn.logit_scale.fill_(math.log(100.0))
            attn.query.bias.zero_()
            attn.key.weight.copy_(-attn.query.weight)
        half = torch.ones(16, 1, 1)
        half[8:] = -1
        self.register_buffer("towards", half * torch.randn(16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        x = self.towards + 0.05 * x.permute(0, 2, 3, 1)
        return self.layer(x.flatten(1, 2), (16, 16))[0]


def test_swinv2_hides_other_regions_by_minus_two_hundred():
    patch_cases.check(FacingAway(), (16, 16), channels=16, replaced=1)


@pytest.mark.parametrize("make", [swin, swinv2])
def test_swin_in_training_and_under_autocast(make):
    patch_cases.check(make(), (60, 68), replaced=4, train=True)
    patch_cases.check_autocast(make(), 60, 68)


def test_swin2sr_matches():
    config = transformers.Swin2SRConfig(
        image_size=16, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=8, drop_path_rate=0.0
    )
    patch_cases.check(patch_cases.randomize(transformers.Swin2SRModel(config)), (16, 16), (24, 16), replaced=4)


def test_donut_swin_matches():
    from transformers.models.donut.modeling_donut_swin import DonutSwinModel

    config = transformers.DonutSwinConfig(image_size=56, window_size=7, **SMALL)
    patch_cases.check(patch_cases.randomize(DonutSwinModel(config)), (56, 56), (64, 100), replaced=4)


def test_maskformer_swin_keeps_its_shift_on_maps_not_larger_than_the_window():
    from transformers import MaskFormerSwinConfig
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

    config = MaskFormerSwinConfig(image_size=56, window_size=7, **SMALL)
    patch_cases.check(patch_cases.randomize(MaskFormerSwinModel(config)), (56, 56), (24, 44), replaced=4)


def test_a_small_map_raises_and_leaves_no_trace():
    model = swin().eval()
    with vitkern.patched(model), torch.no_grad():
        first = model(torch.ones(1, 3, 56, 56))[0]
        with pytest.raises(ValueError, match="smaller than the window 7"):
            model(torch.ones(1, 3, 24, 24))
        assert torch.equal(model(torch.ones(1, 3, 56, 56))[0], first)


def test_attention_weights_come_from_the_layers_own_forward():
    config = transformers.Swinv2Config(image_size=64, window_size=8, **SMALL)
    model = transformers.Swinv2Model(config).eval()
    with vitkern.patched(model), torch.no_grad():
        weights = model(torch.randn(1, 3, 64, 64), output_attentions=True).attentions
    assert weights[0].shape[-1] == 64


def test_a_subclass_is_kept_with_a_reason():
    model = swin()
    layer = model.encoder.layers[0].blocks[0]
    layer.__class__ = type("MyLayer", (type(layer),), {})
    report = vitkern.patch(model)
    assert len(report.replaced) == 3
    assert any("subclass of" in k.reason for k in report.kept) or "MyLayer" not in str(report)
    report.undo()


def test_patching_twice_changes_nothing_and_says_so():
    model = swin()
    first = vitkern.patch(model)
    second = vitkern.patch(model)
    assert len(first.replaced) == 4 and not second.replaced
    assert all(k.reason == "patched already" for k in second.kept)
    first.undo()


def test_dropout_in_training_draws_and_trains():
    model = swin(attention_probs_dropout_prob=0.3).train()
    with vitkern.patched(model):
        model(torch.randn(2, 3, 56, 56))[0].square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def small_swin():
    swin = transformers.models.swin.modeling_swin
    config = swin.SwinConfig(image_size=32, embed_dim=12, depths=[2], num_heads=[2], window_size=4)
    return patch_cases.randomize(swin.SwinModel(config)).eval()


def test_a_layer_that_checkpoints_itself_still_does():
    model = small_swin().train()
    layer, ran = model.encoder.layers[0].blocks[1], []
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    layer.layernorm_before.register_forward_hook(lambda *_: ran.append(layer))
    with vitkern.patched(model):
        model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    assert len(ran) == 2


def test_what_other_tools_did_to_a_module_is_kept_and_said():
    model = small_swin()
    first, second = model.encoder.layers[0].blocks
    first.forward = lambda *args, **kwargs: type(first).forward(first, *args, **kwargs)
    handle = second.attention.register_forward_hook(lambda *_: None)
    reasons = [k.reason for k in vitkern.patch(model).kept]
    assert reasons == ["another tool gave it a forward of its own", "attention has hooks, which the op would pass by"]
    handle.remove()
    assert [r.path for r in vitkern.patch(model).replaced] == ["encoder.layers.0.blocks.1"]


def test_a_patched_model_is_copied_patched_and_saved_unpatched(tmp_path):
    model, x = small_swin(), torch.randn(1, 3, 32, 32)
    with torch.no_grad(), vitkern.patched(model):
        want = model(x)[0]
        clone = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        assert torch.equal(clone(x)[0], want) and len(vitkern.patch(clone).kept) == 2
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        assert torch.equal(loaded(x)[0], model(x)[0])
        assert len(vitkern.patch(loaded).replaced) == 2 and torch.equal(loaded(x)[0], want)
