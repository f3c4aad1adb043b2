"""transformers' models with masked and biased attention, patched: same weights, outputs and gradients."""

import importlib
from collections.abc import Callable
from functools import partial

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def model(kind, config, implementation="sdpa", **options):
    """A model with random weights, those of positions not close to zero."""
    settings = getattr(transformers, config)(**options)
    settings._attn_implementation = implementation
    made = patch_cases.randomize(getattr(transformers, kind)(settings))
    generator = torch.Generator().manual_seed(6)
    for name, p in made.named_parameters():
        if "rel_pos" in name or "attention_biases" in name:
            p.detach().normal_(generator=generator)
    return made


def check_data2vec(implementation, image):
    options = VIT | {"image_size": image, "patch_size": 8, "use_relative_position_bias": True}
    made = model("Data2VecVisionModel", "Data2VecVisionConfig", implementation, drop_path_rate=0.0, **options)
    patch_cases.check(made, (32, 32), (24, 40), replaced=2)


class Packed(nn.Module):
    """A vision tower on an image and on a part of another, packed: both are cut into patches of two frames."""

    def __init__(self, tower, patch):
        super().__init__()
        self.tower, self.patch = tower, patch

    def forward(self, x):
        images = (x[0], x[1, :, : 4 * self.patch, : 2 * self.patch])
        cut = [torch.stack((i, i.roll(1, -1)), 1).unfold(2, self.patch, self.patch) for i in images]
        cut = [c.unfold(3, self.patch, self.patch).permute(2, 3, 0, 1, 4, 5) for c in cut]  # [h, w, 3, 2, p, p]
        grid = torch.tensor([[1, *c.shape[:2]] for c in cut])
        return self.tower(torch.cat([c.flatten(0, 1).flatten(1) for c in cut]), grid_thw=grid)


def check_the_vision_tower_of_qwen(kind, implementation):
    name = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}[kind]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    options = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "out_hidden_size": 8}
    if kind == "Qwen2VL":
        options = {"depth": 2, "num_heads": 2, "patch_size": 4, "embed_dim": 16, "hidden_size": 8, "mlp_ratio": 1}
    if kind == "Qwen2_5_VL":
        options |= {"window_size": 16, "fullatt_block_indexes": [1]}  # windows of 4 x 4 patches, the last ones cut
    if kind == "Qwen3VL":
        options |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    if kind != "Qwen2VL":
        options["intermediate_size"] = 16
    config = getattr(modeling, f"{kind}VisionConfig")(**options)
    config._attn_implementation = implementation
    tower = {"Qwen2VL": "Qwen2VisionTransformerPretrainedModel", "Qwen3VL": "Qwen3VLVisionModel"}
    tower = getattr(modeling, tower.get(kind, "Qwen2_5_VisionTransformerPretrainedModel"))(config)
    patch_cases.check(Packed(patch_cases.randomize(tower), 4), (24, 40), replaced=2)


def check_plain(kind, config, options, implementation):
    made = model(kind, config, implementation, **VIT | {"image_size": 32, "patch_size": 8} | options)
    patch_cases.check(made, (32, 32), replaced=2)


class TwoWay(nn.Module):
    """Points that look at an image and back, with a bias where the image resembles a target."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        points = x[:, :, 0, :3].transpose(1, 2)[:, None]  # [B, 1, 3, C]
        return self.inner(points, x, x.roll(1, -1), x.mean(1).flatten(1)[:, None, None])


def check_the_mask_decoder_of_sam(kind):
    name = {"Sam": "sam", "SamHQ": "sam_hq", "Sam2": "sam2"}[kind]
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    config = getattr(transformers, f"{kind}MaskDecoderConfig")(
        hidden_size=16, num_attention_heads=2, mlp_dim=16, attention_downsample_rate=2
    )
    two_way = patch_cases.randomize(getattr(modeling, f"{kind}TwoWayTransformer")(config))
    patch_cases.check(TwoWay(two_way), (4, 5), channels=16, replaced=7)


def eomt(**options):
    options = VIT | {"image_size": 32, "patch_size": 8, "mlp_ratio": 1, "num_queries": 5, "num_blocks": 1} | options
    return model("EomtForUniversalSegmentation", "EomtConfig", num_upscale_blocks=1, num_labels=3, **options)


def check_eomt():
    made = eomt(num_hidden_layers=3)
    patch_cases.check(made, (32, 32), replaced=3)
    made.attn_mask_probs.zero_()
    patch_cases.check(made, (32, 32), replaced=3)


PATCHED: dict[str, Callable[[], None]] = {
    "data2vec": partial(check_data2vec, "sdpa", (24, 40)),
    "dinov3": partial(check_plain, "DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2}, "eager"),
    "eomt": check_eomt,
    "qwen2.5-vl, packed windows": partial(check_the_vision_tower_of_qwen, "Qwen2_5_VL", "sdpa"),
    "sam, mask decoder": partial(check_the_mask_decoder_of_sam, "Sam"),
}
