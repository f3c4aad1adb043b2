"""transformers: attention modules that do not go through the attention interface, served at the module that owns the
projections, the bias or the mask."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import DecomposedRelativePosition, RelativePosition
from vitkern.mask import FromLogits
from vitkern.ops.attention import attention
from vitkern.ops.attention_varlen import attention_varlen
from vitkern.patch._attention import index_refusal, merged, multihead, relative_on_grid, split_heads
from vitkern.patch._interface import View, refusal, weights_wanted
from vitkern.rope import Rope

# SAM and what was built from it: decomposed positions, windows cut by the layer -----------------------------------------


def _grid_attention(module: Any, x: Tensor, heads: int, positions: bool, dropout_p: float) -> Tensor:
    """Attention of a map [B, H, W, C] under the tables rel_pos_h, rel_pos_w."""
    grid = tuple(x.shape[1:3])
    q, k, v = module.qkv(x).flatten(1, 2).unflatten(-1, (3, heads, -1)).unbind(2)
    bias = DecomposedRelativePosition.resized(module.rel_pos_h, module.rel_pos_w, grid, grid) if positions else None
    out = attention(q, k, v, bias=bias, scale=module.scale, dropout_p=dropout_p)
    return module.proj(merged(out).unflatten(1, grid))


def _sam(module: nn.Module, drops: bool = True) -> Any:
    def forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = None) -> Any:
        if weights_wanted(output_attentions):
            return type(self).forward(self, hidden_states, output_attentions)
        dropout_p = self.dropout if drops and self.training else 0.0
        return _grid_attention(self, hidden_states, self.num_attention_heads, self.use_rel_pos, dropout_p), None

    return refusal() or forward


def _vitdet(module: nn.Module) -> Any:
    def forward(self: Any, hidden_state: Tensor, output_attentions: bool = False) -> Any:
        if weights_wanted(output_attentions):
            return type(self).forward(self, hidden_state, output_attentions)
        return (_grid_attention(self, hidden_state, self.num_heads, self.use_relative_position_embeddings, 0.0),)

    return refusal() or forward


# Data2Vec-vision: a table of offsets with three rows for the class token -------------------------------------------------


def _offsets(positions: Any, window: tuple[int, int]) -> RelativePosition:
    """The bias of this window. The library reads the old table as (width, height) where it resizes it, which shows where
    the two differ."""
    sides = [2 * w - 1 for w in positions.window_size]
    wanted = [2 * w - 1 for w in window]
    table = positions.relative_position_bias_table
    if sides[::-1] != wanted:
        inner = table[:-3].t().unflatten(1, sides[::-1])[None]  # [1, H, old width, old height]
        inner = nn.functional.interpolate(inner, size=wanted, mode="bilinear")
        table = torch.cat((inner[0].flatten(1).t(), table[-3:]))
    return RelativePosition(table, grid=window, prefix_tokens=1)


def _data2vec(module: nn.Module, returns: tuple[None, ...] = ()) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        output_attentions: bool = False,
        relative_position_bias: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
    ) -> Any:
        if output_attentions:
            return type(self).forward(
                self, hidden_states, True, relative_position_bias, interpolate_pos_encoding, resolution
            )
        bias: list[Any] = [] if relative_position_bias is None else [relative_position_bias]
        if self.has_relative_position_bias and resolution is not None:
            window = tuple(side // self.config.patch_size for side in resolution)
            if interpolate_pos_encoding:
                bias.append(self.relative_position_bias(window, True, dim_size=hidden_states.shape[1]))
            else:
                bias.append(_offsets(self.relative_position_bias, window))
        projected = (f(hidden_states) for f in (self.query, self.key, self.value))
        q, k, v = (split_heads(t, self.num_attention_heads) for t in projected)
        out = attention(q, k, v, bias=bias, dropout_p=self.dropout.p if self.training else 0.0)
        return (merged(out), *returns)

    return refusal() or forward


# LeViT: a table of absolute offsets, values wider than keys --------------------------------------------------------------


def _levit(module: nn.Module) -> Any:
    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        x = split_heads(self.queries_keys_values(hidden_state), self.num_attention_heads)
        q, k, v = x.split([self.key_dim, self.key_dim, self.attention_ratio * self.key_dim], -1)
        out = attention(q, k, v, bias=relative_on_grid(self, (side, side)), scale=self.scale)
        return self.projection(self.activation(merged(out)))

    side = round(module.len_points**0.5)
    return refusal() or index_refusal(module, (side, side)) or forward


def _levit_subsample(module: nn.Module) -> Any:
    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        x = split_heads(self.keys_values(hidden_state), self.num_attention_heads)
        k, v = x.split([self.key_dim, self.attention_ratio * self.key_dim], -1)
        q = split_heads(self.queries(self.queries_subsample(hidden_state)), self.num_attention_heads)
        out = attention(q, k, v, bias=relative_on_grid(self, (side, side), stride), scale=self.scale)
        return self.projection(self.activation(merged(out)))

    side, stride = round(module.len_points**0.5), module.queries_subsample.stride
    return refusal() or index_refusal(module, (side, side), stride) or forward


# Mask2Former: cross attention where the last mask is on, then self attention ----------------------------------------------


def _self_attention(
    module: Any, hidden_states: Tensor, position_embeddings: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Mask2Former's self attention of queries [Q, B, C]; the layer gives it no mask."""
    x = hidden_states.transpose(0, 1)
    placed = x if position_embeddings is None else x + position_embeddings.transpose(0, 1)
    q, k, v = module.q_proj(placed), module.k_proj(placed), module.v_proj(x)
    q, k, v = (split_heads(t, module.num_heads) for t in (q, k, v))
    out = attention(q, k, v, scale=module.scaling, dropout_p=module.dropout if module.training else 0.0)
    return module.out_proj(merged(out)).transpose(0, 1), None


def _layer(layer: Any, predicted: list[FromLogits], *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward with its two attentions on vitkern, the first where the last predicted mask is on."""
    cross = partial(multihead, layer.cross_attn, seen=predicted[-1])
    own = partial(_self_attention, layer.self_attn)
    return type(layer).forward(View(layer, cross_attn=cross, self_attn=own), *args, **kwargs)


def _predicted(
    predictor: Any,
    predicted: list[FromLogits],
    outputs: Tensor,
    pixel_embeddings: Tensor,
    attention_mask_target_size: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The mask logits [B, Q, h, w], and in place of a mask one that hides nothing, [B, Q, 1]: the next layer takes what is
    appended to `predicted`."""
    embedded = predictor.mask_embedder(outputs.transpose(0, 1))
    logits = torch.einsum("bqc,bchw->bqhw", embedded, pixel_embeddings)
    predicted.append(FromLogits(logits, tuple(attention_mask_target_size)))
    return logits, logits.new_zeros((*logits.shape[:2], 1), dtype=torch.bool)


def _mask2former(decoder: nn.Module) -> Any:
    def forward(self: Any, *args: Any, output_attentions: bool | None = None, **kwargs: Any) -> Any:
        seen = self
        if not (self.config.output_attentions if output_attentions is None else output_attentions):
            predicted: list[FromLogits] = []
            layers = [partial(_layer, layer, predicted) for layer in self.layers]
            seen = View(self, mask_predictor=partial(_predicted, self.mask_predictor, predicted), layers=layers)
        return type(self).forward(seen, *args, output_attentions=output_attentions, **kwargs)

    return refusal() or forward


# the vision towers of Qwen: packed windows or frames under a rotary embedding --------------------------------------------


def _qwen(module: nn.Module) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if position_embeddings is None:
            return type(self).forward(self, hidden_states, cu_seqlens, None, max_seqlen, **kwargs)
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        cos, sin = (t[None, :, None, : t.shape[-1] // 2] for t in position_embeddings)  # each holds its half twice
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        out = attention_varlen(
            q,
            k,
            v,
            *(cu_seqlens.to(torch.int32),) * 2,
            *(max_seqlen,) * 2,
            rope=Rope(cos, sin, layout="half"),
            scale=self.scaling,
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.proj(merged(out))

    return refusal() or forward


_MODELS = "transformers.models"
_D2V = f"{_MODELS}.data2vec.modeling_data2vec_vision"
TABLE = {
    f"{_MODELS}.qwen2_vl.modeling_qwen2_vl.VisionAttention": (_qwen, "attention_varlen"),
    f"{_MODELS}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention": (_qwen, "attention_varlen"),
    f"{_MODELS}.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention": (_qwen, "attention_varlen"),
    f"{_MODELS}.sam.modeling_sam.SamVisionAttention": (_sam, "attention"),
    f"{_MODELS}.sam.modeling_sam.SamVisionSdpaAttention": (partial(_sam, drops=False), "attention"),
    f"{_MODELS}.sam_hq.modeling_sam_hq.SamHQVisionAttention": (_sam, "attention"),
    f"{_MODELS}.sam_hq.modeling_sam_hq.SamHQVisionSdpaAttention": (partial(_sam, drops=False), "attention"),
    f"{_MODELS}.got_ocr2.modeling_got_ocr2.GotOcr2VisionAttention": (_sam, "attention"),
    f"{_MODELS}.vitdet.modeling_vitdet.VitDetAttention": (_vitdet, "attention"),
    f"{_D2V}.Data2VecVisionSelfAttention": (_data2vec, "attention"),
    f"{_D2V}.Data2VecVisionSdpaSelfAttention": (partial(_data2vec, returns=(None,)), "attention"),
    f"{_MODELS}.levit.modeling_levit.LevitAttention": (_levit, "attention"),
    f"{_MODELS}.levit.modeling_levit.LevitAttentionSubsample": (_levit_subsample, "attention"),
    f"{_MODELS}.mask2former.modeling_mask2former.Mask2FormerMaskedAttentionDecoder": (_mask2former, "attention"),
}
