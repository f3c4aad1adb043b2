"""Multi-scale deformable attention as one module, and as mmcv calls it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern._constants import constant
from vitkern.nn import _checks
from vitkern.ops.deformable_attention import METHODS, deformable_attention


class MultiScaleDeformableAttention(nn.Module):
    """Attention of Deformable DETR (Zhu et al. 2021): queries ``[B, N, C]`` read a few places of maps of several sizes, ``value
    [B, S, C]``, level behind level; returns ``[B, N, C]``.

    Parameters are those of the original repository, mmcv, detrex and transformers: ``sampling_offsets``,
    ``attention_weights``, ``value_proj`` and ``output_proj``. Places are computed in float32.

    Args:
        embed_dim: channels C.
        num_heads: heads; divides embed_dim.
        num_levels: maps.
        num_points: places of each head on each map; a sequence where they differ.
        method: ``"bilinear"``, or ``"nearest"``, the discrete sampling of RT-DETRv2 and D-FINE.
        offset_scale: how far an offset of 1 reaches where reference points have a size, in sizes over the points of the level.
        projections: whether value and output are projected; D-FINE does neither.

    Raises:
        ValueError: num_heads does not divide embed_dim, or a tensor has another shape.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int | Sequence[int] = 4,
        *,
        method: str = "bilinear",
        offset_scale: float = 0.5,
        projections: bool = True,
    ) -> None:
        super().__init__()
        _checks.heads(self, embed_dim, num_heads)
        _checks.one_of(self, "method", method, METHODS)
        self.points = [num_points] * num_levels if isinstance(num_points, int) else list(num_points)
        if len(self.points) != num_levels:
            raise ValueError(
                f"{type(self).__name__}: num_points must be an int or have one entry per level ({num_levels}), got {num_points!r}"
            )
        self.dim, self.num_heads, self.num_levels = embed_dim, num_heads, num_levels
        self.method, self.offset_scale = method, offset_scale
        count = num_heads * sum(self.points)
        self.sampling_offsets = nn.Linear(embed_dim, 2 * count)
        self.attention_weights = nn.Linear(embed_dim, count)
        self.value_proj = nn.Linear(embed_dim, embed_dim) if projections else nn.Identity()
        self.output_proj = nn.Linear(embed_dim, embed_dim) if projections else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: every head looks along a direction of its own, each point one step further."""
        angle = torch.arange(self.num_heads) * (2.0 * math.pi / self.num_heads)
        along = torch.stack((angle.cos(), angle.sin()), -1)
        along = along / along.abs().amax(-1, keepdim=True)  # [H, 2]
        steps = torch.cat([torch.arange(1.0, n + 1) for n in self.points])  # [J]
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((along[:, None] * steps[:, None]).flatten())
        for projection in (self.value_proj, self.output_proj):
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        value_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """``reference_points [B, N, L or 1, 2]`` are (x, y) in [0, 1] with offsets in cells, ``[B, N, L or 1, 4]`` (x, y, width,
        height) with offsets in sizes; ``spatial_shapes`` the (height, width) of each level; ``value_mask [B, S]`` is False where
        value is padding, which counts 0; ``query_pos`` is added to the queries."""
        _checks.shape(self, "query", query, "B", "N", self.dim)
        _checks.shape(self, "value", value, query.shape[0], "S", self.dim)
        if reference_points.dim() != 4 or reference_points.shape[2] not in (1, self.num_levels):
            _checks.shape(self, "reference_points", reference_points, *query.shape[:2], self.num_levels, "2 or 4")
        if value_mask is not None:
            _checks.shape(self, "value_mask", value_mask, *value.shape[:2])
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        if len(spatial_shapes) != self.num_levels:
            raise ValueError(
                f"{type(self).__name__}: spatial_shapes must have {self.num_levels} levels, got {spatial_shapes!r}"
            )
        query = query if query_pos is None else query + query_pos
        value = self.value_proj(value)
        if value_mask is not None:
            value = value.masked_fill(~value_mask[..., None], 0.0)
        places = self._places(self.sampling_offsets(query).float(), reference_points.float(), spatial_shapes)
        out = deformable_attention(
            value.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            places.detach() if self.method == "nearest" else places,
            self.attention_weights(query).unflatten(-1, (self.num_heads, -1)),
            method=self.method,
            points_per_level=self.points,
            normalize_weights=True,
        )
        return self.output_proj(out.flatten(-2))

    if TYPE_CHECKING:
        __call__ = forward

    def _places(self, offsets: Tensor, reference: Tensor, shapes: Any) -> Tensor:
        """Locations [B, N, H, J, 2] of offsets [B, N, H J 2] from reference points [B, N, L or 1, 2 or 4]."""
        offsets = offsets.unflatten(-1, (self.num_heads, -1, 2))
        counts = constant(self.points, offsets.device)
        if reference.shape[2] == self.num_levels:
            reference = reference.repeat_interleave(counts, 2, output_size=sum(self.points))
        reference = reference[:, :, None]  # [B, N, 1, J or 1, 2 or 4]
        if reference.shape[-1] == 4:
            steps = (self.offset_scale / counts).repeat_interleave(counts, output_size=sum(self.points))
            return reference[..., :2] + offsets * steps[:, None] * reference[..., 2:]
        if reference.shape[-1] != 2:
            raise ValueError(
                f"{type(self).__name__}: reference_points must hold 2 or 4 numbers each, got {reference.shape[-1]}"
            )
        sides = constant([n for height, width in shapes for n in (width, height)], offsets.device).view(-1, 2)
        return reference + offsets / sides.repeat_interleave(counts, 0, output_size=sum(self.points))

    def extra_repr(self) -> str:
        return f"embed_dim={self.dim}, num_heads={self.num_heads}, points={self.points}, method={self.method!r}"


def multi_scale_deformable_attn(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """:func:`vitkern.deformable_attention` with the arguments of mmcv's ``MultiScaleDeformableAttnFunction.apply``, which the
    original repository and detrex share: returns ``[B, N, H D]``. The start of the levels and the step are not needed."""
    return deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights).flatten(2)
