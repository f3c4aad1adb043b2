"""timm: MaxViT and GC ViT, whose windows divide the map, at the block that owns the partition, and Hiera, at the attention module,
which owns it there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.ops.attention import attention
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked
from vitkern.patch._timm_windows import version
from vitkern.patch._windows import dropout_rate, index_refusal, part_refusal, split_heads, version_refusal

_LAYERS = "timm.layers.pos_embed_rel"


def _divides(window: Sequence[int], size: Sequence[int]) -> bool:
    return all(length % w == 0 for w, length in zip(window, size, strict=True))


def _options(attention: Any) -> dict[str, Any]:
    """Bias, scale and dropout of an attention module: Swin's table, that of TensorFlow [H, 2 h - 1, 2 w - 1], or an MLP's."""
    rel_pos, bias = attention.rel_pos, None
    if rel_pos is not None:
        kind = type(rel_pos).__name__
        if kind == "RelPosBiasTf":
            table = rel_pos.relative_position_bias_table.flatten(1).t()
            bias = RelativePosition(table, sign="key-query")
        elif kind == "RelPosMlp":
            table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).flatten(0, 1))
            bias = RelativePosition(table if rel_pos.bias_gain is None else rel_pos.bias_gain * table)
        else:
            bias = RelativePosition(rel_pos.relative_position_bias_table)
    return {"bias": bias, "scale": attention.scale, "dropout_p": dropout_rate(attention.attn_drop)}


def _offsets_refusal(attention: Any) -> str | None:
    """Refuses positions other than those that the op computes."""
    rel_pos = attention.rel_pos
    if rel_pos is None:
        return None
    kind = f"{type(rel_pos).__module__}.{type(rel_pos).__qualname__}"
    if kind not in {f"{_LAYERS}.{name}" for name in ("RelPosBias", "RelPosBiasTf", "RelPosMlp")}:
        return f"rel_pos is a {kind}, which is not known"
    if getattr(rel_pos, "prefix_tokens", 0):
        return "rel_pos has prefix tokens, which windows have not"
    index = getattr(rel_pos, "relative_position_index", None)
    return None if index is None else index_refusal(index, rel_pos.window_size)


# MaxViT and its kin: windows of neighbours, or of tokens that lie evenly over the map -------------------------------------


def _attend(attention: Any, projected: Tensor, window: tuple[int, int], partition: str) -> Tensor:
    """Attention of a projected map [B, H, W, 3 C]: [B, H, W, C]."""
    if attention.head_first:
        qkv = projected.unflatten(-1, (attention.num_heads, 3, -1)).transpose(-3, -2)
    else:
        qkv = projected.unflatten(-1, (3, attention.num_heads, -1))
    return window_attention_qkvpacked(qkv, window, partition=partition, **_options(attention)).flatten(-2)


def _channels_last(attention: Any, x: Tensor, window: tuple[int, int], partition: str) -> Tensor:
    return attention.proj_drop(attention.proj(_attend(attention, attention.qkv(x), window, partition)))


def _channels_first(attention: Any, x: Tensor, window: tuple[int, int], partition: str) -> Tensor:
    out = _attend(attention, attention.qkv(x).permute(0, 2, 3, 1), window, partition).permute(0, 3, 1, 2)
    return attention.proj_drop(attention.proj(out))


def _parts(*names: str, kind: str) -> dict[str, str | type]:
    return {name: kind for name in names} | {f"{name}.attn_drop": nn.Dropout for name in names}


def _maxvit(block: nn.Module) -> Any:
    first = type(block).__name__ == "PartitionAttention2d"
    call = _channels_first if first else _channels_last

    def forward(self: Any, x: Tensor) -> Tensor:
        window = self.partition_size
        if not _divides(window, x.shape[2:] if first else x.shape[1:3]):
            return type(self).forward(self, x)
        partition = "block" if self.partition_block else "grid"
        x = x + self.drop_path1(self.ls1(call(self.attn, self.norm1(x), window, partition)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    refused = version() or part_refusal(block, _parts("attn", kind="Attention2d" if first else "AttentionCl"))
    return refused or _offsets_refusal(block.attn) or forward


def _parallel_maxvit(block: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        window = self.partition_size
        if not _divides(window, x.shape[1:3]):
            return type(self).forward(self, x)
        normed = self.norm1(x)
        near = _channels_last(self.attn_block, normed, window, "block")
        far = _channels_last(self.attn_grid, normed, window, "grid")
        x = x + self.drop_path1(self.ls1(torch.cat((near, far), -1)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    refused = version() or part_refusal(block, _parts("attn_block", "attn_grid", kind="AttentionCl"))
    return refused or _offsets_refusal(block.attn_block) or _offsets_refusal(block.attn_grid) or forward


# GC ViT: in every second block the queries are those of the image, the same in each window -------------------------------


def _gcvit(block: Any) -> Any:
    import timm

    def attend(self: Any, x: Tensor, q_global: Tensor | None) -> Tensor:
        attention = self.attn
        heads, options = attention.num_heads, _options(attention)
        if attention.use_global and q_global is not None:
            k, v = attention.qkv(x).unflatten(-1, (2, heads, -1)).unbind(-3)
            q = split_heads(q_global, heads)
            out = window_attention(q, k, v, self.window_size, shared_q=True, **options)
        else:
            qkv = attention.qkv(x).unflatten(-1, (3, heads, -1))
            out = window_attention_qkvpacked(qkv, self.window_size, **options)
        return attention.proj_drop(attention.proj(out.flatten(-2)))

    def forward(self: Any, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if not _divides(self.window_size, x.shape[1:3]):
            return type(self).forward(self, x, q_global)
        x = x + self.drop_path1(self.ls1(attend(self, self.norm1(x), q_global)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    refused = version() or part_refusal(block, _parts("attn", kind="WindowAttentionGlobal"))
    if refused is None and block.attn.use_global:  # before, each window had the queries of another image
        refused = version_refusal("timm", timm.__version__, (1, 0, 31), series=2)
    return refused or _offsets_refusal(block.attn) or forward


# Hiera: units of tokens that lie evenly over the list of all, queries pooled first --------------------------------------


def _hiera(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        qkv, unit = self.qkv(x).unflatten(-1, (3, self.heads, -1)), self.window_size
        q, k, v = qkv.unbind(-3)
        if self.q_stride > 1:
            q = q.unflatten(1, (self.q_stride, -1)).amax(1)
        if not self.use_mask_unit_attn:
            out = attention(q, k, v, scale=self.scale)
        elif self.q_stride > 1:
            out = window_attention(q, k, v, unit, scale=self.scale, partition="unit")
        else:
            out = window_attention_qkvpacked(qkv, unit, scale=self.scale, partition="unit")
        return self.proj(out.flatten(-2))

    return version() or forward


_MODELS = "timm.models"
TABLE = {
    f"{_MODELS}.maxxvit.PartitionAttentionCl": (_maxvit, "window_attention"),
    f"{_MODELS}.maxxvit.PartitionAttention2d": (_maxvit, "window_attention"),
    f"{_MODELS}.maxxvit.ParallelPartitionAttention": (_parallel_maxvit, "window_attention"),
    f"{_MODELS}.gcvit.GlobalContextVitBlock": (_gcvit, "window_attention"),
    f"{_MODELS}.hiera.MaskUnitAttention": (_hiera, "window_attention, attention"),
}
