"""transformers: multi-scale deformable attention, at the module that samples where there is one, else at the module around it.

Locations and weights stay in the dtype that the model gives them, and the weights it returns are those that were used.
"""

from typing import Any

from torch import Tensor, nn

from vitkern._constants import constant
from vitkern.ops.deformable_attention import deformable_attention
from vitkern.patch._interface import View, refusal

# the module that samples, which has no parameters: Deformable DETR and its descendants ------------------------------------


def _sampler(module: nn.Module) -> Any:
    def forward(
        self: Any,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Any,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights).flatten(2)

    return refusal() or forward


# RT-DETRv2 and what was built from it: points of each level, discrete sampling ---------------------------------------------


def _core(
    value: Tensor, shapes: Any, locations: Tensor, weights: Tensor, num_points_list: list[int], method: str = "default"
) -> Tensor:
    """The library's function of the second version."""
    if method == "discrete":
        locations, method = locations.detach(), "nearest"
    else:
        method = "bilinear"
    out = deformable_attention(value, shapes, locations, weights, method=method, points_per_level=num_points_list)
    return out.flatten(2)


def _with_core(module: nn.Module) -> Any:
    """D-FINE's module calls the function that it holds."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(View(self, ms_deformable_attn_core=_core), *args, **kwargs)

    return refusal() or forward


def _rt_detr_v2(module: nn.Module) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        query, value, weights = _projected(
            self, hidden_states, position_embeddings, encoder_hidden_states, attention_mask, False
        )
        offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, -1, 2))
        reference = reference_points[:, :, None]
        if reference.shape[-1] != 4:
            raise ValueError(f"{type(self).__name__}: reference_points must hold 4 numbers, got {reference.shape[-1]}")
        steps = self.n_points_scale.to(hidden_states.dtype)[:, None]
        places = reference[..., :2] + offsets * steps * reference[..., 2:] * self.offset_scale
        out = _core(value, spatial_shapes_list, places, weights, self.n_points_list, self.method)
        return self.output_proj(out), weights

    return refusal() or forward


# the pixel decoders of Mask2Former and OneFormer ---------------------------------------------------------------------------


def _projected(
    module: Any, hidden: Tensor, position: Tensor | None, value: Tensor, mask: Tensor | None, hides: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries with their positions, the value by head, 0 where the mask (`hides`: its opposite) is off, and the weights
    [B, N, H, J]."""
    query = hidden if position is None else hidden + position
    value = module.value_proj(value)
    if mask is not None:
        value = value.masked_fill((mask if hides else ~mask)[..., None], 0.0)
    weights = module.attention_weights(query).unflatten(-1, (module.n_heads, -1)).softmax(-1)
    return query, value.unflatten(-1, (module.n_heads, -1)), weights


def _pixel_decoder(module: nn.Module) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        level_start_index: Tensor | None = None,
        output_attentions: bool = False,
        spatial_shapes_list: Any = None,
    ) -> Any:
        query, value, weights = _projected(
            self, hidden_states, position_embeddings, encoder_hidden_states, attention_mask, True
        )
        weights = weights.unflatten(-1, (self.n_levels, self.n_points))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, self.n_levels, self.n_points, 2))
        reference = reference_points[:, :, None, :, None]
        if reference.shape[-1] == 2:
            sides = constant(
                [n for height, width in spatial_shapes_list for n in (width, height)], offsets.device
            ).view(-1, 2)
            places = reference + offsets / sides[:, None]
        else:
            places = reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        out = deformable_attention(value, spatial_shapes_list, places, weights).flatten(2)
        return self.output_proj(out), weights

    return refusal() or forward


_MODELS = "transformers.models"
_SAMPLERS = (
    "deformable_detr",
    "grounding_dino",
    "lw_detr",
    "mm_grounding_dino",
    "omdet_turbo",
    "pp_doclayout_v2",
    "pp_doclayout_v3",
    "pp_doclayout_v4",
    "rf_detr",
    "rt_detr",
)
_PIXELS = {"mask2former": "Mask2Former", "oneformer": "OneFormer"}
TABLE = {
    **{
        f"{_MODELS}.{name}.modeling_{name}.MultiScaleDeformableAttention": (_sampler, "deformable_attention")
        for name in _SAMPLERS
    },
    **{
        f"{_MODELS}.{name}.modeling_{name}.{title}PixelDecoderEncoderMultiscaleDeformableAttention": (
            _pixel_decoder,
            "deformable_attention",
        )
        for name, title in _PIXELS.items()
    },
    f"{_MODELS}.rt_detr_v2.modeling_rt_detr_v2.RTDetrV2MultiscaleDeformableAttention": (
        _rt_detr_v2,
        "deformable_attention",
    ),
    f"{_MODELS}.d_fine.modeling_d_fine.DFineMultiscaleDeformableAttention": (_with_core, "deformable_attention"),
    f"{_MODELS}.deimv2.modeling_deimv2.Deimv2MultiscaleDeformableAttention": (_with_core, "deformable_attention"),
}
