"""vitkern.nn.MultiScaleDeformableAttention and mmcv's argument order, against transformers' modules with the same weights."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import compare

from vitkern.nn import MultiScaleDeformableAttention, multi_scale_deformable_attn

transformers = pytest.importorskip("transformers")
SHAPES = ((5, 7), (3, 4))
CELLS = 47


def references(size, levels=2, queries=CELLS):
    return torch.rand(2, queries, levels, size, generator=torch.Generator().manual_seed(8))


def spread(module):
    """Weights that are not close to zero, and offsets of about two cells."""
    made = patch_cases.randomize(module)
    torch.nn.init.normal_(made.sampling_offsets.bias, std=2.0, generator=torch.Generator().manual_seed(2))
    return made


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("numbers", [2, 4])
def test_deformable_detr(numbers, masked):
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = transformers.DeformableDetrConfig(
        d_model=24,
        num_feature_levels=2,
        use_timm_backbone=False,
        backbone_config={"model_type": "resnet"},
        backbone=None,
    )
    theirs = spread(modeling.DeformableDetrMultiscaleDeformableAttention(config, num_heads=3, n_points=4))
    points, position = references(numbers), torch.randn(2, CELLS, 24)
    mask = torch.rand(2, CELLS) < 0.7 if masked else None
    shapes = torch.tensor(SHAPES)

    def call(attn, x):
        return attn(
            x,
            attention_mask=mask,
            encoder_hidden_states=x.flip(1),
            position_embeddings=position.to(x.dtype),
            reference_points=points.to(x.dtype),
            spatial_shapes=shapes,
            spatial_shapes_list=list(SHAPES),
        )[0]

    def mine(attn, x):
        return attn(x, x.flip(1), points.to(x.dtype), SHAPES, mask, position.to(x.dtype))

    ours = MultiScaleDeformableAttention(24, 3, 2, 4)
    compare(ours, theirs, call, (CELLS,), strict=True, mine=mine)


@pytest.mark.parametrize("method, named", [("bilinear", "default"), ("nearest", "discrete")])
def test_rt_detr_v2(method, named):
    modeling = pytest.importorskip("transformers.models.rt_detr_v2.modeling_rt_detr_v2")
    config = transformers.RTDetrV2Config(
        d_model=24,
        decoder_attention_heads=3,
        decoder_n_points=3,
        decoder_n_levels=2,
        decoder_method=named,
        decoder_offset_scale=0.7,
    )
    theirs = spread(modeling.RTDetrV2MultiscaleDeformableAttention(config))
    points = references(4, 1)

    def call(attn, x):
        return attn(
            x,
            encoder_hidden_states=x.flip(1),
            reference_points=points.to(x.dtype),
            spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=list(SHAPES),
        )[0]

    ours = MultiScaleDeformableAttention(24, 3, 2, 3, method=method, offset_scale=0.7)
    compare(ours, theirs, call, (CELLS,), mine=lambda attn, x: attn(x, x.flip(1), points.to(x.dtype), SHAPES))


def test_d_fine_has_other_points_on_each_level_and_no_projections():
    modeling = pytest.importorskip("transformers.models.d_fine.modeling_d_fine")
    config = transformers.DFineConfig(
        d_model=24, decoder_attention_heads=3, decoder_n_points=[3, 5], num_feature_levels=2
    )
    theirs = spread(modeling.DFineMultiscaleDeformableAttention(config))
    points = references(4, 1)

    def call(attn, x):
        return attn(
            x,
            encoder_hidden_states=x.flip(1),
            reference_points=points.to(x.dtype),
            spatial_shapes=torch.tensor(SHAPES),
            spatial_shapes_list=list(SHAPES),
        )[0]

    ours = MultiScaleDeformableAttention(24, 3, 2, (3, 5), projections=False)
    compare(ours, theirs, call, (CELLS,), mine=lambda attn, x: attn(x, x.flip(1), points.to(x.dtype), SHAPES))


def test_the_initial_places_are_the_published_ones():
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    module = MultiScaleDeformableAttention(32, 8, 3, 4)
    assert module.sampling_offsets.weight.eq(0).all() and module.attention_weights.weight.eq(0).all()
    offsets = module.sampling_offsets.bias.view(8, 3, 4, 2)
    assert torch.allclose(offsets[1], torch.arange(1.0, 5)[:, None].expand(3, 4, 2))  # 45 degrees, 1 to 4 cells
    assert torch.allclose(offsets[4, :, :, 0], -torch.arange(1.0, 5).expand(3, 4))
    kind = modeling.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    assert module.state_dict().keys() == kind(32, 8, 3, 4).state_dict().keys()


def test_the_argument_order_of_mmcv():
    modeling = pytest.importorskip("transformers.models.oneformer.modeling_oneformer")
    g = torch.Generator().manual_seed(0)
    value = torch.randn(2, CELLS, 3, 8, generator=g, dtype=torch.float64)
    places = torch.rand(2, 5, 3, 2, 4, 2, generator=g, dtype=torch.float64)
    weights = torch.rand(2, 5, 3, 2, 4, generator=g, dtype=torch.float64)
    shapes, starts = torch.tensor(SHAPES), torch.tensor([0, 35])
    got = multi_scale_deformable_attn(value, shapes, starts, places, weights, 64)
    torch.testing.assert_close(got, modeling.multi_scale_deformable_attention(value, shapes, places, weights))


REFUSED = [
    (dict(query=torch.zeros(2, 5, 9)), r"query must have shape \[B, N, 8\]"),
    (dict(value=torch.zeros(1, CELLS, 8)), r"value must have shape \[2, S, 8\]"),
    (dict(reference_points=torch.zeros(2, 5, 3, 2)), r"reference_points must have shape \[2, 5, 2, 2 or 4\]"),
    (dict(reference_points=torch.zeros(2, 5, 2, 3)), "reference_points must hold 2 or 4 numbers each, got 3"),
    (dict(spatial_shapes=SHAPES[:1]), "spatial_shapes must have 2 levels"),
    (dict(value_mask=torch.ones(2, 3, dtype=torch.bool)), r"value_mask must have shape \[2, 47\]"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED)
def test_refusals_are_sentences(changes, sentence):
    module = MultiScaleDeformableAttention(8, 2, 2, 2)
    given = dict(query=torch.zeros(2, 5, 8), value=torch.zeros(2, CELLS, 8), reference_points=torch.zeros(2, 5, 2, 2))
    with pytest.raises(ValueError, match=f"MultiScaleDeformableAttention: {sentence}"):
        module(**{**given, "spatial_shapes": torch.tensor(SHAPES), **changes})


def test_refusals_of_the_constructor_are_sentences():
    with pytest.raises(ValueError, match="num_heads must divide dim"):
        MultiScaleDeformableAttention(10, 3)
    with pytest.raises(ValueError, match=r"num_points must be an int or have one entry per level \(4\), got \(1, 2\)"):
        MultiScaleDeformableAttention(num_points=(1, 2))
    with pytest.raises(ValueError, match="method must be one of bilinear, nearest, got 'discrete'"):
        MultiScaleDeformableAttention(method="discrete")
