"""vitkern.patch on transformers' models with deformable attention: same weights, outputs and gradients."""

import inspect

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

import vitkern
from vitkern.patch._transformers_deformable import _PIXELS, _SAMPLERS

transformers = pytest.importorskip("transformers")
SHAPES = ((4, 6), (2, 3))
CELLS = 30


def modeling(name):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


class Around(nn.Module):
    """A deformable attention module of C channels, called on an image of C channels and 5 x 6 pixels: its pixels are the
    queries and, turned around, the cells of two levels."""

    def __init__(self, attn, numbers=2, levels=2, mask=False):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.attn, self.mask = attn, torch.rand(2, CELLS, generator=g) < 0.7 if mask else None
        self.points = torch.rand(2, CELLS, levels, numbers, generator=g)
        self.position = torch.randn(2, CELLS, 1, generator=g)

    def forward(self, x):
        x = x.flatten(2).mT
        given = {
            "hidden_states": x,
            "attention_mask": self.mask,
            "encoder_hidden_states": x.flip(1),
            "position_embeddings": self.position.to(x.dtype),
            "reference_points": self.points.to(x.dtype),
            "spatial_shapes": torch.tensor(SHAPES),
            "spatial_shapes_list": list(SHAPES),
        }
        taken = inspect.signature(type(self.attn).forward).parameters
        return self.attn(**{name: t for name, t in given.items() if name in taken})


def spread(module):
    """Weights that are not close to zero, and offsets of about two cells."""
    made = patch_cases.randomize(module)
    nn.init.normal_(made.sampling_offsets.bias, std=2.0, generator=torch.Generator().manual_seed(2))
    return made


# the module that samples, in every model that has it ----------------------------------------------------------------------


class Sampled(nn.Module):
    """A module without parameters, on value, places and weights from projections of an image."""

    def __init__(self, attn):
        super().__init__()
        self.attn, self.value, self.where, self.weights = attn, *(nn.Conv2d(4, n, 1) for n in (12, 36, 18))

    def forward(self, x):
        value, where, weights = (f(x).flatten(2).mT for f in (self.value, self.where, self.weights))
        where, weights = where.unflatten(-1, (3, 2, 3, 2)) * 0.5 + 0.5, weights.unflatten(-1, (3, 2, 3))
        shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 24])
        return self.attn(value.unflatten(-1, (3, 4)), shapes, list(SHAPES), starts, where, weights, 64)


@pytest.mark.parametrize("name", _SAMPLERS)
def test_the_module_that_samples_matches(name):
    made = patch_cases.randomize(Sampled(modeling(name).MultiScaleDeformableAttention()))
    patch_cases.check(made, (5, 6), channels=4, replaced=1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("numbers", [2, 4])
def test_deformable_detrs_module_matches(numbers, mask):
    config = transformers.DeformableDetrConfig(d_model=24, num_feature_levels=2)
    made = modeling("deformable_detr").DeformableDetrMultiscaleDeformableAttention(config, num_heads=3, n_points=4)
    report = patch_cases.check(Around(spread(made), numbers, mask=mask), (5, 6), channels=24, replaced=1)
    assert report.replaced[0].path == "attn.attn" and not report.kept


# modules that call a function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("numbers", [2, 4])
@pytest.mark.parametrize("name", _PIXELS)
def test_pixel_decoders_match(name, numbers, mask):
    kind = getattr(modeling(name), f"{_PIXELS[name]}PixelDecoderEncoderMultiscaleDeformableAttention")
    patch_cases.check(Around(spread(kind(24, 3, 2, 4)), numbers, mask=mask), (5, 6), channels=24, replaced=1)


@pytest.mark.parametrize("method", ["default", "discrete"])
def test_rt_detr_v2s_module_matches(method):
    config = transformers.RTDetrV2Config(
        d_model=24,
        decoder_attention_heads=3,
        decoder_n_points=3,
        decoder_n_levels=2,
        decoder_method=method,
        decoder_offset_scale=0.7,
    )
    made = spread(modeling("rt_detr_v2").RTDetrV2MultiscaleDeformableAttention(config))
    patch_cases.check(Around(made, 4, 1, mask=True), (5, 6), channels=24, replaced=1)


@pytest.mark.parametrize("method", ["default", "discrete"])
@pytest.mark.parametrize("name, title", [("d_fine", "DFine"), ("deimv2", "Deimv2")])
def test_d_fines_module_matches(name, title, method):
    kind = getattr(modeling(name), f"{title}MultiscaleDeformableAttention")
    config = getattr(transformers, f"{title}Config")(
        d_model=24, decoder_attention_heads=3, decoder_n_points=[3, 5], num_feature_levels=2, decoder_method=method
    )
    patch_cases.check(Around(spread(kind(config)), 4, 1), (5, 6), channels=24, replaced=1)


def test_reference_points_of_two_numbers_are_refused_by_rt_detr_v2():
    config = transformers.RTDetrV2Config(d_model=24, decoder_attention_heads=3, decoder_n_levels=2)
    made = Around(modeling("rt_detr_v2").RTDetrV2MultiscaleDeformableAttention(config), 2, 1)
    with vitkern.patched(made), pytest.raises(ValueError, match="reference_points must hold 4 numbers, got 2"):
        made(torch.zeros(2, 24, 5, 6))


# whole models -------------------------------------------------------------------------------------------------------------


def resnet():
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def offsets_spread(model):
    """Random weights; offsets of about two cells."""
    made = patch_cases.randomize(model)
    generator = torch.Generator().manual_seed(6)
    for name, p in made.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            nn.init.normal_(p, std=2.0, generator=generator)
    return made


def test_deformable_detr_matches():
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=7, num_feature_levels=3,
        dropout=0.0, num_labels=3,
    )  # fmt: skip
    made = offsets_spread(transformers.DeformableDetrForObjectDetection(config))
    with torch.no_grad(), vitkern.patched(made.eval()), patch_cases.Called("deformable_attention") as seen:
        made(torch.randn(1, 3, 64, 96))
    assert seen.count == 3
    report = patch_cases.check(made, (64, 96))
    assert sum(r.op == "deformable_attention" for r in report.replaced) == 3


@pytest.mark.parametrize("kind", ["RTDetr", "RTDetrV2"])
def test_rt_detr_matches(kind):
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[8, 16, 16], feat_strides=[8, 16, 32],
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=32, decoder_in_channels=[32, 32, 32], decoder_ffn_dim=16,
        num_queries=6, decoder_layers=2, decoder_attention_heads=2, num_denoising=0, dropout=0.0, num_labels=3,
        anchor_image_size=None, eval_size=None,
    )  # fmt: skip
    made = offsets_spread(getattr(transformers, f"{kind}ForObjectDetection")(config))
    report = patch_cases.check(made, (64, 96))
    assert sum(r.op == "deformable_attention" for r in report.replaced) == 2


@pytest.mark.parametrize("kind", ["RTDetr", "RTDetrV2"])
def test_rt_detrs_decoder_matches(kind):
    names = {"RTDetr": "rt_detr", "RTDetrV2": "rt_detr_v2"}
    options = {
        "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "num_feature_levels": 2,
        "decoder_n_levels": 2, "dropout": 0.0,
    }  # fmt: skip
    if kind == "RTDetr":
        options.pop("decoder_n_levels")
    decoder = getattr(modeling(names[kind]), f"{kind}Decoder")(getattr(transformers, f"{kind}Config")(**options))
    patch_cases.check(InDecoder(offsets_spread(decoder)), (5, 6), channels=32)


class InDecoder(nn.Module):
    """A decoder on an image whose pixels are the cells, and half of them the queries."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, x):
        x = x.flatten(2).mT
        return self.decoder(
            inputs_embeds=x[:, ::2],
            encoder_hidden_states=x,
            reference_points=x[:, ::2, :4],
            spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=list(SHAPES),
            level_start_index=torch.tensor([0, 24]),
        )


# autocast, compilation ----------------------------------------------------------------------------------------------------


def modules():
    """One module of each kind of server."""
    two = {"d_model": 24, "decoder_attention_heads": 3}
    detr = transformers.DeformableDetrConfig(d_model=24, num_feature_levels=2)
    v2 = transformers.RTDetrV2Config(**two, decoder_n_levels=2, decoder_n_points=3)
    fine = transformers.DFineConfig(**two, decoder_n_points=[3, 5], num_feature_levels=2)
    pixels = modeling("mask2former").Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    return {
        "sampler": Around(spread(modeling("deformable_detr").DeformableDetrMultiscaleDeformableAttention(detr, 3, 4))),
        "pixels": Around(spread(pixels(24, 3, 2, 4))),
        "v2": Around(spread(modeling("rt_detr_v2").RTDetrV2MultiscaleDeformableAttention(v2)), 4, 1),
        "fine": Around(spread(modeling("d_fine").DFineMultiscaleDeformableAttention(fine)), 4, 1),
    }


@pytest.mark.parametrize("name", ["sampler", "pixels", "v2", "fine"])
def test_autocast_is_as_close_as_the_module_itself(name):
    made = modules()[name].eval()
    x = torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(made, x, grad=False, autocast=True)
    with vitkern.patched(made):
        got = patch_cases.run(made, x, torch.float32, False, autocast=True)
    yardstick.hold("autocast", {n: t.to(yardstick.eager[n].dtype) for n, t in got.items()})


@pytest.mark.parametrize("name", ["sampler", "pixels", "v2", "fine"])
def test_patched_modules_compile_without_graph_breaks(name):
    made, x = modules()[name].eval(), torch.randn(2, 24, 5, 6)
    with torch.no_grad(), vitkern.patched(made):
        want = made(x)[0]
        torch._dynamo.reset()
        got = torch.compile(made, backend="aot_eager", fullgraph=True)(x)[0]
    assert torch.equal(got, want)
