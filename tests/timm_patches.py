"""timm's models with masked and biased attention, patched: same weights, outputs and gradients."""

from collections.abc import Callable
from functools import partial

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

pytest.importorskip("timm")
from timm.models import beit, cait, levit, mvitv2, vision_transformer_sam  # noqa: E402

VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "patch_size": 8}


def random(model, fused=True):
    """Random weights, also for what timm starts at zero: positions, biases, the weights of the last normalisations."""
    patch_cases.randomize(model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if any(part in name for part in ("rel_pos", "attention_biases", "bn.weight", "gamma")):
            p.detach().uniform_(0.5, 1.5, generator=generator)
        if "rel_pos" in name or "attention_biases" in name:
            p.detach().sub_(1.0).mul_(2.0)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return model


class Last(nn.Module):
    """An image with its channels last."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Shared(nn.Module):
    """BEiT's attention under a bias that the model shares."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        return self.attn(x[:, 0], x[:1, :1, :, :7].expand(1, 3, 7, 7) * 2)


def check_beit(own, fused):
    model = random(beit.Beit(img_size=(32, 48), num_classes=0, init_values=0.5, **VIT | {own: True}), fused)
    patch_cases.check(model, (32, 48), replaced=2)


def check_two_biases_of_beit(separate):
    attention = random(beit.Attention(12, 3, True, separate, window_size=(2, 3)))
    patch_cases.check(Shared(attention), (7, 12), channels=1, replaced=1, train=True)


def check_cait(fused, train):
    model = cait.Cait(img_size=32, num_classes=0, init_values=0.5, depth_token_only=1, mlp_ratio_token_only=1.0, **VIT)
    patch_cases.check(random(model, fused), (32, 32), replaced=3, train=train)


def sam_block(fused=True, **options):
    return random(vision_transformer_sam.Block(12, 2, mlp_ratio=1.0, input_size=(9, 6), **options), fused)


def check_sam_block(window, fused, sizes, **options):
    model = nn.Sequential(Last(), sam_block(fused, window_size=window, init_values=0.5, **options))
    patch_cases.check(model, *sizes, channels=12, replaced=1, train=window == 4)


def pooled(**options):
    given = {"depths": (1, 1), "embed_dim": 8, "num_heads": 1, "mlp_ratio": 1.0, "stride_kv_adaptive": (2, 2)} | options
    config = mvitv2.MultiScaleVitCfg(**given)
    return random(mvitv2.MultiScaleVit(config, img_size=(64, 64), num_classes=5, drop_path_rate=0.0))


def check_mvit_v2(first):
    patch_cases.check(pooled(use_cls_token=first), (64, 64), replaced=2)


def check_levit(conv, pool, train):
    model = levit.Levit(
        img_size=(80, 112), embed_dim=(8, 16), key_dim=4, depth=(1, 1), num_heads=(1, 2), attn_ratio=(2, 3),
        num_classes=0, use_conv=conv, down_op="subsample_pool" if pool else "subsample",
    )  # fmt: skip
    patch_cases.check(random(model), (80, 112), replaced=3, train=train)


PATCHED: dict[str, Callable[[], None]] = {
    "beit": partial(check_beit, "use_rel_pos_bias", True),
    "beit, one bias for all layers": partial(check_beit, "use_shared_rel_pos_bias", False),
    "beit, two biases": partial(check_two_biases_of_beit, True),
    "cait": partial(check_cait, True, False),
    "levit, normalised by the batch": partial(check_levit, False, False, True),
    "levit, scores in the thousands": partial(check_levit, False, False, False),
    "levit, scores in the thousands, convolutions": partial(check_levit, True, True, False),
    "sam, the whole map": partial(check_sam_block, 0, True, [(9, 6)], use_rel_pos=True),
    "sam, padded windows": partial(check_sam_block, 4, True, [(2, 3)], use_rel_pos=True, qk_norm=True),
    "mvit v2": partial(check_mvit_v2, False),
    "mvit v2, class token": partial(check_mvit_v2, True),
}
