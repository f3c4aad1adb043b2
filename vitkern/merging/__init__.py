"""Token merging in a model you already have: ``vitkern.merging.apply(model, r=13)``.

Only instances are changed, never classes, and every block keeps its own attention: the keys are read where they are
projected, and the sizes of the tokens enter as an additive mask. Served: timm's VisionTransformer family, and ViT, DeiT,
DINOv2 (with registers too) and CLIP's vision tower of transformers; the transformer blocks of diffusers.
"""

from vitkern.merging._apply import MergeReport, apply
from vitkern.merging._diffusion import DiffusionReport, apply_diffusion
from vitkern.merging._schedule import frame_index, kth_index, parse_r, random2d_index
from vitkern.merging._scores import attention_rank, token_energy
from vitkern.merging._visualize import visualize

__all__ = [
    "DiffusionReport",
    "MergeReport",
    "apply",
    "apply_diffusion",
    "attention_rank",
    "frame_index",
    "kth_index",
    "parse_r",
    "random2d_index",
    "token_energy",
    "visualize",
]
