"""vitkern.patch on transformers' models with masked and biased attention: same weights, outputs and gradients."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
import transformers_patches
from torch import nn
from transformers_patches import VIT, eomt, model

import vitkern
from vitkern.patch._interface import attend
from vitkern.testing import assert_close_to_oracle

transformers = pytest.importorskip("transformers")
BOTH = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


# SAM and its kin ---------------------------------------------------------------------------------------------------------


def sam(kind="Sam", implementation="sdpa", **options):
    """A map of 6 x 6 patches: windows of 4 pad it, then all patches."""
    options = (
        VIT | {"image_size": 48, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 16} | options
    )
    options.pop("intermediate_size")
    return model(f"{kind}VisionModel", f"{kind}VisionConfig", implementation, output_channels=8, **options)


@BOTH
@pytest.mark.parametrize("kind", ["Sam", "SamHQ"])
def test_sam_matches_in_padded_windows_and_globally(kind, implementation):
    patch_cases.check(sam(kind, implementation), (48, 48), replaced=2)


def test_sam_without_positions_and_without_a_bias_of_the_projection():
    patch_cases.check(sam(use_rel_pos=False, qkv_bias=False), (48, 48), replaced=2, train=True)


class OnMap(nn.Module):
    """An attention module of maps [B, H, W, C], called on an image of C channels."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        out = self.attn(x.permute(0, 2, 3, 1))
        return out[0] if isinstance(out, tuple) else out


@BOTH
def test_sam_resizes_its_tables_to_a_map_of_another_shape(implementation):
    attention = sam("Sam", implementation).vision_encoder.layers[1].attn
    patch_cases.check(OnMap(attention), (6, 6), (5, 9), channels=16, replaced=1)


def test_got_ocr_vision_matches():
    modeling = pytest.importorskip("transformers.models.got_ocr2.modeling_got_ocr2")
    config = transformers.GotOcr2VisionConfig(
        hidden_size=16, num_attention_heads=2, image_size=48, patch_size=8, use_rel_pos=True
    )
    attention = patch_cases.randomize(modeling.GotOcr2VisionAttention(config, 0))
    patch_cases.check(OnMap(attention), (6, 6), channels=16, replaced=1)


def test_vitdet_matches():
    options = VIT | {"image_size": 48, "patch_size": 8, "window_size": 4, "window_block_indices": [0], "mlp_ratio": 1}
    options.pop("intermediate_size")
    made = model("VitDetModel", "VitDetConfig", "eager", use_relative_position_embeddings=True, **options)
    patch_cases.check(made, (48, 48), replaced=2)


def test_sams_weights_come_from_its_own_forward():
    made, x = sam(implementation="eager").eval(), torch.randn(1, 3, 48, 48)
    with torch.no_grad(), vitkern.patched(made):
        assert made(x).attentions is None
        weights = made(x, output_attentions=True).attentions
        assert made.vision_encoder.layers[1].attn(torch.randn(1, 6, 6, 16))[1] is None
    assert [tuple(w.shape) for w in weights] == [(8, 16, 16), (2, 36, 36)]


def test_dropout_of_sam_draws_only_where_the_library_does():
    for implementation, draws in (("eager", True), ("sdpa", False)):
        made, x = sam(implementation=implementation, attention_dropout=0.5).train(), torch.randn(1, 3, 48, 48)
        with torch.no_grad(), vitkern.patched(made):
            assert torch.equal(made(x)[0], made(x)[0]) is not draws


# BEiT and Data2Vec ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("shared", [False, True])
def test_beit_matches_on_other_grids_too(implementation, shared):
    options = VIT | {"image_size": 32, "patch_size": 8, "use_shared_relative_position_bias": shared}
    made = model("BeitModel", "BeitConfig", implementation, use_relative_position_bias=True, **options)
    patch_cases.check(made, (32, 32), (24, 48), replaced=2)


@BOTH
@pytest.mark.parametrize("image", [32, (24, 40)])
def test_data2vec_matches_on_other_grids_too(implementation, image):
    transformers_patches.check_data2vec(implementation, image)


@BOTH
def test_data2vec_shares_a_bias(implementation):
    options = VIT | {"image_size": 32, "patch_size": 8, "use_shared_relative_position_bias": True}
    made = model("Data2VecVisionModel", "Data2VecVisionConfig", implementation, drop_path_rate=0.0, **options)
    patch_cases.check(made, (32, 32), replaced=2)
    both = model(
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        implementation,
        drop_path_rate=0.0,
        use_relative_position_bias=True,
        **options,
    )
    patch_cases.check(both, (32, 32), replaced=2, train=True)


class Interpolated(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x, interpolate_pos_encoding=True)


def test_data2vec_interpolates_its_whole_bias_where_asked():
    options = VIT | {"image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
    made = model("Data2VecVisionModel", "Data2VecVisionConfig", "eager", drop_path_rate=0.0, **options)
    patch_cases.check(Interpolated(made), (24, 40), replaced=2)


@BOTH
def test_data2vecs_module_returns_what_its_class_returns(implementation):
    options = VIT | {"image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
    made = model("Data2VecVisionModel", "Data2VecVisionConfig", implementation, **options).eval()
    attention, x = made.encoder.layer[0].attention.attention, torch.randn(1, 17, 16)
    with torch.no_grad():
        for asked in (False, True):
            want = attention(x, asked, resolution=(32, 32))
            with vitkern.patched(made):
                got = attention(x, asked, resolution=(32, 32))
            assert [type(t) for t in got] == [type(t) for t in want]


# LeViT ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_levit_matches_and_its_cached_bias_does_not_go_stale(train):
    options = {"hidden_sizes": [8, 16, 24], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}
    made = model("LevitModel", "LevitConfig", "eager", image_size=80, attention_ratio=[2, 3, 2], **options)
    patch_cases.check(made, (80, 80), batch=3, replaced=5, train=train)  # 5 x 5, then 3 x 3, then 2 x 2
    made.eval()
    x = torch.randn(1, 3, 80, 80)
    with torch.no_grad(), vitkern.patched(made):
        before = made(x)[0]
        made.load_state_dict({n: t * 1.5 if "attention_biases" in n else t for n, t in made.state_dict().items()})
        assert not torch.equal(made(x)[0], before)


# the vision towers of Qwen ---------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_the_vision_tower_of_qwen_matches_on_packed_images(kind, implementation):
    transformers_patches.check_the_vision_tower_of_qwen(kind, implementation)


# through the attention interface --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("ViTModel", "ViTConfig", {}),
        ("DeiTModel", "DeiTConfig", {}),
        ("Dinov2Model", "Dinov2Config", {"mlp_ratio": 1}),
        ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}),
        ("SiglipVisionModel", "SiglipVisionConfig", {}),
        ("CLIPVisionModel", "CLIPVisionConfig", {}),
    ],
)
def test_plain_transformers_match(kind, config, options, implementation):
    transformers_patches.check_plain(kind, config, options, implementation)


class Padded(nn.Module):
    """A model of an image whose right and lower rims are padding."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        real = torch.zeros(len(x), *x.shape[2:], dtype=torch.long)
        real[:, : x.shape[2] - 20, : x.shape[3] - 33] = 1
        real[0] = 1
        return self.inner(x, pixel_mask=real)


@BOTH
def test_detr_matches_on_padded_images(implementation):
    options = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    options |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0}
    made = model("DetrModel", "DetrConfig", implementation, backbone_config=backbone(), num_queries=5, **options)
    patch_cases.check(Padded(made), (64, 96), replaced=7)


@pytest.mark.parametrize("kind", ["Sam", "SamHQ", "Sam2"])
def test_the_mask_decoder_of_sam_matches(kind):
    transformers_patches.check_the_mask_decoder_of_sam(kind)


def test_sam2s_encoder_matches_with_pooled_queries():
    made = model(
        "Sam2HieraDetModel", "Sam2HieraDetConfig", image_size=[64, 64], hidden_size=8, num_attention_heads=1,
        blocks_per_stage=[1, 2, 1, 1], embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 2, 2, 4],
        window_size_per_stage=[4, 2, 4, 2], global_attention_blocks=[2], mlp_ratio=1.0,
        window_positional_embedding_background_size=[3, 3],
    )  # fmt: skip
    patch_cases.check(made, (64, 64), (96, 64), replaced=5)  # the latter with windows whose pads are pooled


def test_the_attention_function_is_that_of_the_library():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = nn.Module()
    q = torch.randn(2, 4, 5, 8)
    k, v = torch.randn(2, 2, 2, 7, 8)
    module.num_key_value_groups = 2
    hides = torch.rand(2, 1, 5, 7) > 0.4
    hides[0, 0, 2] = False  # a row that sees nothing
    masks = {"no mask": None, "bool": hides, "added": torch.randn(2, 1, 5, 7)}
    for name, mask in masks.items():
        for causal in (False, True):
            exact, want = (
                sdpa_attention_forward(
                    module,
                    *(t.to(dtype) for t in (q, k, v)),
                    mask if name == "bool" else to(mask, dtype),
                    is_causal=causal,
                )[0]
                for dtype in (torch.float64, torch.float32)
            )
            got, weights = attend(module, q, k, v, mask, is_causal=causal)
            assert weights is None
            assert_close_to_oracle(f"{name}, causal {causal}", got, exact, want)


def to(mask, dtype):
    return mask if mask is None else mask.to(dtype)


def test_the_attention_function_refuses_what_it_does_not_know():
    q = torch.randn(1, 1, 3, 4)
    with pytest.raises(NotImplementedError, match="Module: the vitkern attention function does not take softcap"):
        attend(nn.Module(), q, q, q, None, softcap=30.0)


def test_patched_modules_compile_whole():
    x = torch.randn(1, 17, 16)
    bias = {"image_size": 32, "patch_size": 8, "use_relative_position_bias": True}
    data2vec = model("Data2VecVisionModel", "Data2VecVisionConfig", drop_path_rate=0.0, **VIT | bias).encoder.layer[0]
    decoder = mask2former().model.transformer_module
    for made, *args in (
        (eomt().layers[0], x),
        (sam().vision_encoder.layers[1].attn, torch.randn(2, 6, 6, 16)),
        (data2vec, x, False, None, False, (32, 32)),
        (decoder, [torch.randn(1, 32, s, s) for s in (2, 4, 8)], torch.randn(1, 32, 16, 16)),
    ):
        made.eval()
        with torch.no_grad(), vitkern.patched(made) as report:
            want = made(*args)
            torch._dynamo.reset()
            got = torch.compile(made, backend="aot_eager", fullgraph=True)(*args)
        first = (lambda t: t) if isinstance(want, torch.Tensor) else (lambda t: t[0])
        assert len(report.replaced) == 1 and torch.equal(first(got), first(want))


def test_eomt_matches_with_masked_queries_and_without():
    transformers_patches.check_eomt()


def test_eomt_on_dinov3_matches():
    options = VIT | {"image_size": 32, "patch_size": 8, "num_queries": 5, "num_blocks": 1, "num_upscale_blocks": 1}
    made = model("EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", num_labels=3, **options)
    patch_cases.check(made, (32, 32), replaced=2)


def backbone():
    return transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


@BOTH
def test_maskformers_decoder_matches(implementation):
    decoder = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "dropout": 0.0}
    config = transformers.MaskFormerConfig(
        fpn_feature_size=32,
        mask_feature_size=32,
        backbone_config=backbone(),
        decoder_config=transformers.MaskFormerDetrConfig(num_queries=7, **decoder).to_dict(),
    )
    config.decoder_config._attn_implementation = implementation
    made = patch_cases.randomize(transformers.MaskFormerForInstanceSegmentation(config))
    patch_cases.check(made, (64, 96), replaced=8)


def mask2former(**options):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone(), feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=4, num_attention_heads=2, dim_feedforward=16, num_queries=7, num_labels=3,
        dropout=0.0, **options,
    )  # fmt: skip
    return patch_cases.randomize(transformers.Mask2FormerForUniversalSegmentation(config))


@pytest.mark.parametrize("pre_norm", [False, True])
def test_mask2former_matches(pre_norm):
    patch_cases.check(mask2former(pre_norm=pre_norm), (64, 96), replaced=6)


def test_both_attentions_of_each_layer_of_mask2former_run_on_the_op():
    made = mask2former().eval()
    with torch.no_grad(), vitkern.patched(made), patch_cases.Called("attention") as seen:
        made(torch.randn(1, 3, 64, 64))
    assert seen.count == 2 * len(made.model.transformer_module.decoder.layers)


def test_mask2formers_decoder_is_kept_if_a_part_of_it_has_hooks():
    decoder = mask2former().model.transformer_module.decoder
    decoder.layers[1].cross_attn.register_forward_hook(lambda *_: None)
    assert [k.reason for k in vitkern.patch(decoder).kept] == [
        "layers.1.cross_attn has hooks, which the op would pass by"
    ]


def test_mask2formers_weights_come_from_its_own_forward():
    made, x = mask2former().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = made(x, output_attentions=True).attentions
        with vitkern.patched(made):
            got = made(x, output_attentions=True).attentions
    assert [w.shape for w in got] == [w.shape for w in want] and got[-1].sum() > 0


@pytest.mark.parametrize(
    "make", [lambda: (sam(), (48, 48)), lambda: (mask2former(), (64, 64)), lambda: (eomt(), (32, 32))]
)
def test_autocast_is_as_close_as_the_model_itself(make):
    made, size = make()
    made.eval()
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    yardstick = patch_cases.Yardstick(made, x, grad=False, autocast=True)
    with vitkern.patched(made):
        yardstick.hold("autocast", patch_cases.run(made, x, torch.float32, False, autocast=True))
