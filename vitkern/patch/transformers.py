"""transformers: Swin, SwinV2, Swin2SR, MaskFormer-Swin and Donut-Swin, at the layer that owns roll and partition; masked and
biased attention, at the attention module.

| class | versions | op | not served |
|---|---|---|---|
| SwinLayer | 4.40 to 5.x | window_attention | maps smaller than the window (the table does not fit; the model raises too) |
| DonutSwinLayer, MaskFormerSwinLayer | 4.40 to 5.x | window_attention | |
| Swinv2Layer, Swin2SRLayer | 4.40 to 5.x | window_attention, cosine | |
| SamVisionAttention, SamHQVisionAttention, GotOcr2VisionAttention, VitDetAttention | 5.x | attention, decomposed positions | |
| Data2VecVisionSelfAttention | 5.x | attention, relative position with a prefix | |
| LevitAttention, LevitAttentionSubsample | 5.x | attention, absolute offsets | an index buffer that is not LeViT's |
| the vision attention of Qwen2-VL, Qwen2.5-VL, Qwen3-VL | 5.x | attention_varlen, rope | |
| Mask2FormerMaskedAttentionDecoder | 5.x | attention, mask from logits, which are compared before their sigmoid | |
| those of `_transformers_deformable.TABLE`: Deformable DETR, RT-DETR, D-FINE, Mask2Former … | 5.x | deformable_attention | |
| NeighborhoodAttention (DiNAT) | 4.40 to 5.x, with NATTEN or `vitkern.patch.natten.stand_in` | neighborhood_attention | |
| hiera.modeling_hiera.HieraMaskUnitAttention | 5.x | window_attention, attention | attentions that are returned |
| those of `_interface.TABLE`: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, BEiT, EoMT, DETR, MaskFormer, SAM 2 … | 5.x | attention | |

The Swin models set window and shift anew when a map is not larger than the window and keep them for every later input; here
the configured values stay. SwinV2 adds its mask twice, so its regions are -200 apart. Where attention weights are asked
for, the layer's own forward runs; where they are not, an attention module returns None in their place.
"""

import math
from typing import Any

from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.cosine import CosineScore
from vitkern.patch import (
    _interface,
    _transformers_attention,
    _transformers_deformable,
    _transformers_hiera,
    _transformers_neighborhood,
)
from vitkern.patch._windows import continuous_table, separate


def _library_refusal() -> str | None:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    known = (major, minor) >= (4, 40) and major <= 5
    return None if known else f"transformers {transformers.__version__} is not a known version (4.40 to 5.x)"


def _window_and_shift(layer: nn.Module, window: int, shift: int, size: tuple[int, int], clamp: bool) -> tuple[int, int]:
    """Window and shift on a map of this size, by the model's rule."""
    if not clamp or all(n > window for n in size):  # not min: its order would be in a graph
        return window, shift
    if any(n < window for n in size):
        raise ValueError(
            f"{type(layer).__name__}: a map of {size[0]} x {size[1]} tokens is smaller than the window {window}, "
            "and the position table does not fit a smaller window"
        )
    return window, 0


# Swin of transformers 5: projections q_proj, k_proj, v_proj, o_proj -----------------------------------------------------


def _swin(layer: nn.Module) -> Any:
    refusal = _library_refusal()
    if refusal or not hasattr(layer.attention, "q_proj"):
        return refusal or _swin_older(layer)
    configured, shift = layer.attention.relative_position_bias.window_size[0], int(layer.shift_size)

    def forward(
        self: Any, hidden_states: Tensor, input_dimensions: Any, always_partition: bool = False, **kwargs: Any
    ) -> Any:
        if kwargs.get("output_attentions"):
            return type(self).forward(
                self, hidden_states, input_dimensions, always_partition=always_partition, **kwargs
            )
        attention = self.attention
        window, moved = _window_and_shift(self, configured, shift, input_dimensions, not always_partition)
        shortcut = hidden_states
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions))
        x = separate(
            x,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.num_attention_heads,
            window,
            moved,
            bias=RelativePosition(attention.relative_position_bias.relative_position_bias_table),
            scale=attention.scaling,
            dropout_p=attention.attention_dropout if self.training else 0.0,
        )
        x = self.dropout(attention.o_proj(x.flatten(1, 2)))
        hidden_states = shortcut + self.drop_path(x)
        x = self.mlp(self.layernorm_after(hidden_states))
        return self.dropout(x) + hidden_states, None

    return forward


# Swin of transformers 4, Donut and MaskFormer: query, key, value under attention.self ------------------------------------


def _older_attention(attention: Any, x: Tensor, window: int, shift: int, **options: Any) -> Tensor:
    inner = attention.self
    x = separate(
        x,
        inner.query,
        inner.key,
        inner.value,
        inner.num_attention_heads,
        window,
        shift,
        dropout_p=inner.dropout.p if attention.training else 0.0,
        **options,
    )
    return attention.output(x.flatten(1, 2), None)


def _swin_older(layer: nn.Module, clamps: bool = True) -> Any:
    refusal = _library_refusal()
    if refusal:
        return refusal
    configured, shift = layer.attention.self.window_size[0], int(layer.shift_size)

    def forward(
        self: Any,
        hidden_states: Tensor,
        input_dimensions: Any,
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> Any:
        if output_attentions:
            extra = {"always_partition": always_partition} if clamps else {}
            return type(self).forward(self, hidden_states, input_dimensions, output_attentions, **extra)
        window, moved = _window_and_shift(self, configured, shift, input_dimensions, clamps and not always_partition)
        x = self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions))
        bias = RelativePosition(self.attention.self.relative_position_bias_table)
        hidden_states = hidden_states + self.drop_path(_older_attention(self.attention, x, window, moved, bias=bias))
        x = self.intermediate(self.layernorm_after(hidden_states))
        return (hidden_states + self.output(x),)

    return forward


def _maskformer(layer: nn.Module) -> Any:
    return _swin_older(layer, clamps=False)


# Swin V2 and Swin2SR: cosine scores, post-norm ---------------------------------------------------------------------------


def _swinv2(layer: nn.Module) -> Any:
    refusal = _library_refusal()
    if refusal:
        return refusal

    def forward(self: Any, hidden_states: Tensor, input_dimensions: Any, output_attentions: bool = False) -> Any:
        if output_attentions:
            return type(self).forward(self, hidden_states, input_dimensions, output_attentions)
        inner = self.attention.self
        x = _older_attention(
            self.attention,
            hidden_states.unflatten(1, tuple(input_dimensions)),
            self.window_size,
            self.shift_size,
            bias=RelativePosition(continuous_table(inner.continuous_position_bias_mlp, inner.relative_coords_table)),
            cosine=CosineScore(inner.logit_scale, max=math.log(1.0 / 0.01)),
            mask_value=-200.0,
        )
        hidden_states = hidden_states + self.drop_path(self.layernorm_before(x))
        x = self.output(self.intermediate(hidden_states))
        return (hidden_states + self.drop_path(self.layernorm_after(x)),)

    return forward


_MODELS = "transformers.models"
TABLE = {
    f"{_MODELS}.swin.modeling_swin.SwinLayer": (_swin, "window_attention"),
    f"{_MODELS}.donut.modeling_donut_swin.DonutSwinLayer": (_swin_older, "window_attention"),
    f"{_MODELS}.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer": (_maskformer, "window_attention"),
    f"{_MODELS}.swinv2.modeling_swinv2.Swinv2Layer": (_swinv2, "window_attention (cosine)"),
    f"{_MODELS}.swin2sr.modeling_swin2sr.Swin2SRLayer": (_swinv2, "window_attention (cosine)"),
    **_interface.TABLE,
    **_transformers_attention.TABLE,
    **_transformers_deformable.TABLE,
    **_transformers_hiera.TABLE,
    **_transformers_neighborhood.TABLE,
}
