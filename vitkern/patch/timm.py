"""timm: Swin, SwinV2, TinyViT, MaxViT, GC ViT, DaViT, SAM, at the block that owns roll and partition; EfficientViT of MSRA, masked,
biased, linear and channel attention, at the attention module.

| class | versions | op | not served |
|---|---|---|---|
| swin_transformer.SwinTransformerBlock | 1.0.29 to 1.0.x | window_attention | blocks whose attention was replaced |
| swin_transformer_v2.SwinTransformerV2Block | 1.0.29 to 1.0.x | window_attention, cosine | the same |
| swin_transformer_v2_cr.SwinTransformerV2CrBlock | 1.0.29 to 1.0.x | window_attention, cosine | the same |
| tiny_vit.TinyVitBlock | 1.0.29 to 1.0.x | window_attention, absolute offsets | an index buffer that is not LeViT's |
| maxxvit.PartitionAttentionCl, maxxvit.PartitionAttention2d | 1.0.29 to 1.0.x | window_attention | other positions |
| maxxvit.ParallelPartitionAttention | 1.0.29 to 1.0.x | window_attention | the same |
| gcvit.GlobalContextVitBlock | 1.0.31 to 1.0.x, local ones 1.0.29 | window_attention | the same |
| hiera.MaskUnitAttention | 1.0.29 to 1.0.x | window_attention, attention | |
| efficientvit_msra.CascadedGroupAttention | 1.0.29 to 1.0.x | window_attention, one call per head | as with TinyViT |
| davit.SpatialBlock, twins.LocallyGroupedAttn | 1.0.29 to 1.0.x | window_attention | a projection or attention that was replaced |
| twins.GlobalSubSampleAttn | 1.0.29 to 1.0.x | attention | |
| beit.Attention | 1.0.29 to 1.0.x | attention, relative position with a prefix | an index buffer that is not BEiT's |
| cait.TalkingHeadAttn, cait.ClassAttn | 1.0.29 to 1.0.x | attention, talking heads | |
| levit.Attention, levit.AttentionDownsample | 1.0.29 to 1.0.x | attention, absolute offsets | an index buffer that is not LeViT's |
| efficientvit_mit.LiteMLA | 1.0.29 to 1.0.x | linear_attention | features other than ReLU |
| mobilevit.LinearSelfAttention | 1.0.29 to 1.0.x | soft_merge | dropout of the weights in training; keys of another map |
| vision_transformer_sam.Block | 1.0.29 to 1.0.x | window_attention, attention | a replaced attention |
| mvitv2.MultiScaleAttention | 1.0.29 to 1.0.x | attention, decomposed positions | pools that heads do not share |
| vision_transformer_sam.Attention | 1.0.29 to 1.0.x | attention, decomposed positions or rope | |
| xcit.XCA, edgenext.CrossCovarianceAttn | 1.0.29 to 1.0.x | channel_attention | dropout of the weights in training |
| davit.ChannelAttention, davit.ChannelAttentionV2 | 1.0.29 to 1.0.x | channel_attention | |

Window and shift are read at each call, so set_input_size works on a patched model. A block with a static mask and a map
other than its input_resolution runs its own forward. timm 1.0.29 cannot build a shifted SwinV2 block with a static mask
for a map that windows do not divide.
"""

import math
from typing import Any

from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.cosine import CosineScore
from vitkern.patch import _timm_attention, _timm_channels, _timm_linear, _timm_partitions, _timm_windows
from vitkern.patch._windows import (
    continuous_table,
    dropout_rate,
    index_refusal,
    packed,
    part_refusal,
    shift_refusal,
    thirds,
    version_refusal,
    without_key_bias,
)


def _refusal(block: nn.Module) -> str | None:
    import timm

    return (
        version_refusal("timm", timm.__version__, (1, 0, 29), series=2)
        or part_refusal(block)
        or shift_refusal(block.window_size, block.shift_size)
        or index_refusal(block.attn.relative_position_index, block.window_size)
    )


def _foreign_map(block: Any, x: Tensor, size: Any) -> bool:
    """Whether the static mask of a shifted block was made for another map than x, for one of this size."""
    return any(block.shift_size) and not block.dynamic_mask and tuple(x.shape[1:3]) != tuple(size)


def _swin(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor) -> Tensor:
        attention = self.attn
        _, k_bias, v_bias = thirds(attention.qkv.bias)
        x = packed(
            attention.qkv(x),
            k_bias,
            v_bias,
            attention.num_heads,
            self.window_size,
            self.shift_size,
            pad_order="roll_pad",
            bias=RelativePosition(attention.relative_position_bias_table),
            scale=attention.scale,
            dropout_p=dropout_rate(attention.attn_drop),
        )
        return attention.proj_drop(attention.proj(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        if _foreign_map(self, x, self.input_resolution):
            return type(self).forward(self, x)
        x = x + self.drop_path1(attend(self, self.norm1(x)))
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return tokens.view(x.shape)

    return _refusal(block) or forward


def _swinv2(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor) -> Tensor:
        attention = self.attn
        bias = None if attention.q_bias is None else without_key_bias(attention.q_bias, attention.v_bias)
        x = packed(
            nn.functional.linear(x, attention.qkv.weight, bias),
            None,
            attention.v_bias,
            attention.num_heads,
            self.window_size,
            self.shift_size,
            pad_order="roll_pad",
            bias=RelativePosition(continuous_table(attention.cpb_mlp, attention.relative_coords_table)),
            cosine=CosineScore(attention.logit_scale, max=math.log(1.0 / 0.01)),
            dropout_p=dropout_rate(attention.attn_drop),
        )
        return attention.proj_drop(attention.proj(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        if _foreign_map(self, x, self.input_resolution):
            return type(self).forward(self, x)
        x = x + self.drop_path1(self.norm1(attend(self, x)))
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path2(self.norm2(self.mlp(tokens)))
        return tokens.view(x.shape)

    return _refusal(block) or forward


def _swinv2_cr(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor) -> Tensor:
        attention = self.attn
        _, k_bias, v_bias = thirds(attention.qkv.bias)
        n = math.prod(self.window_size)
        bias = attention.meta_mlp(attention.relative_coordinates_log)  # [N N, heads], with dropout in training
        x = packed(
            attention.qkv(x),
            k_bias,
            v_bias,
            attention.num_heads,
            self.window_size,
            self.shift_size,
            pad_order="roll_pad",
            bias=bias.t().unflatten(1, (n, n)),
            cosine=CosineScore(attention.logit_scale, max=math.log(1.0 / 0.01)),
            dropout_p=dropout_rate(attention.attn_drop),
        )
        return attention.proj_drop(attention.proj(x))

    def forward(self: Any, x: Tensor) -> Tensor:
        if _foreign_map(self, x, self.feat_size):
            return type(self).forward(self, x)
        x = x + self.drop_path1(self.norm1(attend(self, x)))
        tokens = x.flatten(1, 2)
        tokens = tokens + self.drop_path2(self.norm2(self.mlp(tokens)))
        return self.norm3(tokens).view(x.shape)

    refused = _timm_windows.version() or part_refusal(
        block, {"attn": "WindowMultiHeadAttention", "attn.qkv": nn.Linear}
    )
    return refused or shift_refusal(block.window_size, block.shift_size) or forward


TABLE = {
    "timm.models.swin_transformer.SwinTransformerBlock": (_swin, "window_attention"),
    "timm.models.swin_transformer_v2.SwinTransformerV2Block": (_swinv2, "window_attention (cosine)"),
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2CrBlock": (_swinv2_cr, "window_attention (cosine)"),
    **_timm_attention.TABLE,
    **_timm_linear.TABLE,
    **_timm_channels.TABLE,
    **_timm_windows.TABLE,
    **_timm_partitions.TABLE,
}
