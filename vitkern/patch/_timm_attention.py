"""timm: attention with biases, mixed heads and decomposed positions, at the attention module; SAM's windows at the
block that cuts them."""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import DecomposedRelativePosition, RelativePosition, offset_index
from vitkern.modulation import TalkingHeads
from vitkern.nn.multi_scale_attention import pooled_attention
from vitkern.ops.attention import attention
from vitkern.ops.window_attention import window_attention
from vitkern.patch._attention import index_refusal, merged, relative_on_grid, split_heads
from vitkern.patch._windows import dropout_rate, part_refusal, version_refusal
from vitkern.rope import Rope


def _refusal() -> str | None:
    import timm

    return version_refusal("timm", timm.__version__, (1, 0, 29), series=2)


def _projected(module: Any, out: Tensor) -> Tensor:
    """The output projection of [B, N, heads, head_dim]."""
    return module.proj_drop(module.proj(merged(out)))


# BEiT: a table of offsets with three rows for the class token, which the model may share ---------------------------------


def _beit(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias: list[Any] = [] if shared_rel_pos_bias is None else [shared_rel_pos_bias]
        if self.relative_position_bias_table is not None:
            table = self.relative_position_bias_table
            bias.append(RelativePosition(table, grid=tuple(self.window_size), prefix_tokens=1))
        biases = None if self.q_bias is None else torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = nn.functional.linear(x, self.qkv.weight, biases)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return _projected(self, attention(q, k, v, bias=bias, scale=self.scale, dropout_p=dropout_rate(self.attn_drop)))

    return _refusal() or _beit_index_refusal(module) or forward


def _beit_index_refusal(module: Any) -> str | None:
    index = module.relative_position_index
    if index is None or index.is_meta:
        return None
    beit = offset_index(tuple(module.window_size), "query-key", torch.device("cpu"), prefix_tokens=1)
    return None if torch.equal(index.cpu().int(), beit) else "relative_position_index is not that of BEiT"


# CaiT: heads mixed before and after the softmax; the class token alone asks ------------------------------------------------


def _talking_heads(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        mixed = TalkingHeads(self.proj_l.weight, self.proj_l.bias, self.proj_w.weight, self.proj_w.bias)
        out = attention(q, k, v, modulation=mixed, scale=self.scale, dropout_p=dropout_rate(self.attn_drop))
        return _projected(self, out)

    return _refusal() or forward


def _class_attention(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x[:, :1]), self.k(x), self.v(x)))
        return _projected(self, attention(q, k, v, scale=self.scale, dropout_p=dropout_rate(self.attn_drop)))

    return _refusal() or forward


# LeViT: absolute offsets, values wider than keys; tokens [B, N, C] or, with convolutions, a map [B, C, H, W] ---------------


def _heads(module: Any, x: Tensor) -> Tensor:
    """[B, N, heads, channels of a head] of the projected tokens or map."""
    if module.use_conv:
        return x.flatten(2).unflatten(1, (module.num_heads, -1)).permute(0, 3, 1, 2)
    return split_heads(x, module.num_heads)


def _levit_output(module: Any, out: Tensor, size: list[int] | None) -> Tensor:
    x = merged(out)
    return module.proj(x if size is None else x.transpose(1, 2).unflatten(2, size))


def _levit(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        size = x.shape[2:] if self.use_conv else None
        q, k, v = _heads(self, self.qkv(x)).split([self.key_dim, self.key_dim, self.val_dim], -1)
        out = attention(q, k, v, bias=relative_on_grid(self, tuple(self.resolution)), scale=self.scale)
        return _levit_output(self, out, size)

    return _refusal() or index_refusal(module, module.resolution) or forward


def _levit_downsample(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        k, v = _heads(self, self.kv(x)).split([self.key_dim, self.val_dim], -1)
        queries = self.q(x)
        size = queries.shape[2:] if self.use_conv else None
        bias = relative_on_grid(self, tuple(self.resolution), self.stride)
        out = attention(_heads(self, queries), k, v, bias=bias, scale=self.scale)
        return _levit_output(self, out, size)

    return _refusal() or index_refusal(module, module.resolution, module.stride) or forward


# the encoder of SAM: decomposed positions of the normalised queries, or rotary embedding -----------------------------------


def _sam_heads(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [..., heads, head_dim] of tokens [..., C]."""
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    return module.q_norm(q), module.k_norm(k), v


def _sam(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        grid = tuple(x.shape[1:3])
        q, k, v = _sam_heads(self, x.flatten(1, 2))
        bias = rope = None
        if self.use_rel_pos:
            bias = DecomposedRelativePosition.resized(self.rel_pos_h, self.rel_pos_w, grid, grid)
        elif self.rope is not None:
            sin, cos = (t[None, :, None, ::2] for t in self.rope.get_embed().chunk(2, -1))  # [1, N, 1, D/2]
            rope = Rope(cos, sin)
        drop = dropout_rate(self.attn_drop)
        out = attention(q, k, v, bias=bias, rope=rope, scale=self.scale, dropout_p=drop)
        return _projected(self, out).unflatten(1, grid)

    return _refusal() or forward


def _sam_windows(module: Any, x: Tensor, side: int) -> Tensor:
    """Attention of a normalised map in windows, whose pads are the projected zero."""
    window, bias = (side, side), None
    padded = any(length % side for length in x.shape[1:3])
    pads = _sam_heads(module, x.new_zeros(x.shape[-1]))[1:] if padded else None
    if module.use_rel_pos:
        bias = DecomposedRelativePosition.resized(module.rel_pos_h, module.rel_pos_w, window, window)
    drop = dropout_rate(module.attn_drop)
    out = window_attention(*_sam_heads(module, x), window, bias=bias, scale=module.scale, pad_kv=pads, dropout_p=drop)
    return _projected(module, out)


def _sam_block(block: Any) -> Any:
    """Windows whose positions are rotated, also those of pads, and windows that are dropped one by one, are cut in front."""
    from timm.models.vision_transformer_sam import window_partition, window_unpartition

    attend = _sam(block.attn)

    def forward(self: Any, x: Tensor) -> Tensor:
        normed, side = self.norm1(x), self.window_size
        dropped = self.training and getattr(self.drop_path1, "drop_prob", 0.0)
        if side and (dropped or self.attn.rope is not None):
            windows, padded = window_partition(normed, side)
            out = self.drop_path1(self.ls1(attend(self.attn, windows)))
            out = window_unpartition(out, side, x.shape[1:3], padded)
        else:
            out = _sam_windows(self.attn, normed, side) if side else attend(self.attn, normed)
            out = self.drop_path1(self.ls1(out))
        x = x + out
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x.flatten(1, 2))))).view(x.shape)

    return part_refusal(block, {"attn": "Attention", "attn.attn_drop": nn.Dropout}) or (
        attend if isinstance(attend, str) else forward
    )


# MViTv2: pooled queries and keys ------------------------------------------------------------------------------------------


def _pooling(module: Any) -> Any:
    def forward(self: Any, x: Tensor, feat_size: Any) -> Any:
        out, size = pooled_attention(self, x, (feat_size[0], feat_size[1]), _first_rows)
        return out, list(size)

    if module.rel_pos_type != "spatial":
        return "its scores have no decomposed positions"
    return _refusal() or ("its pools are not shared by the heads" if module.unshared else forward)


def _first_rows(
    rel_h: Tensor, rel_w: Tensor, q_size: tuple[int, int], k_size: tuple[int, int]
) -> DecomposedRelativePosition:
    """On a smaller map timm reads the first rows of its tables."""
    tables = [t[: 2 * max(a, b) - 1] for t, a, b in zip((rel_h, rel_w), q_size, k_size, strict=True)]
    return DecomposedRelativePosition(tables[0], tables[1], q_size, k_size)


_MODELS = "timm.models"
TABLE = {
    f"{_MODELS}.beit.Attention": (_beit, "attention"),
    f"{_MODELS}.cait.TalkingHeadAttn": (_talking_heads, "attention (talking heads)"),
    f"{_MODELS}.cait.ClassAttn": (_class_attention, "attention"),
    f"{_MODELS}.levit.Attention": (_levit, "attention"),
    f"{_MODELS}.levit.AttentionDownsample": (_levit_downsample, "attention"),
    f"{_MODELS}.mvitv2.MultiScaleAttention": (_pooling, "attention"),
    f"{_MODELS}.vision_transformer_sam.Attention": (_sam, "attention"),
    f"{_MODELS}.vision_transformer_sam.Block": (_sam_block, "window_attention, attention"),
}
