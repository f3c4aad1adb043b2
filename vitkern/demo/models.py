"""Models of the demo, with random weights, from transformers' own configurations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import vitkern
from vitkern.patch import PatchReport, natten


def sam() -> nn.Module:
    """SAM's encoder of half its width: windows of 14, four blocks of all patches, decomposed positions of random weights."""
    import transformers

    config = transformers.SamVisionConfig(
        hidden_size=384, num_attention_heads=6, mlp_dim=1536, image_size=512, initializer_range=0.02
    )
    model = transformers.SamVisionModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rel_pos" in name:
                p.normal_(std=0.1)
    return model


def mask2former() -> nn.Module:
    """Mask2Former with the backbone Swin-T."""
    import transformers

    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = transformers.SwinConfig(depths=[2, 2, 6, 2], out_features=stages)
    config = transformers.Mask2FormerConfig(backbone_config=backbone)
    return transformers.Mask2FormerForUniversalSegmentation(config)


class OnDefinition(nn.Module):
    """A patched model that runs on the definition of its op, or on a kernel inside :func:`on_kernel`: the model's own code cannot
    run without a library that is not there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.report, self.backend = model, vitkern.patch(model), "reference"

    def forward(self, x: Tensor) -> Any:
        with vitkern.use_backend(self.backend):
            return self.model(x)


@contextmanager
def on_kernel(model: OnDefinition) -> Iterator[PatchReport]:
    """The model with the kernel that its device and dtype choose."""
    model.backend = None
    try:
        yield model.report
    finally:
        model.backend = "reference"


def dinat() -> nn.Module:
    """DiNAT-Mini with two blocks per stage, one of them dilated. It needs NATTEN, so that its definition stands in for eager."""
    import transformers

    natten.stand_in()
    return OnDefinition(
        transformers.DinatForImageClassification(transformers.DinatConfig(num_labels=1000, depths=[2, 2, 2, 2]))
    )


def deformable_detr() -> nn.Module:
    """Deformable DETR of three layers in the encoder and the decoder, on a ResNet-18."""
    import transformers

    stages = ["stage2", "stage3", "stage4"]
    backbone = transformers.ResNetConfig(
        hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", out_features=stages
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, encoder_layers=3, decoder_layers=3
    )
    return transformers.DeformableDetrForObjectDetection(config)
