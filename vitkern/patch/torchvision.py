"""torchvision: Swin, SwinV2 and Video Swin, at the attention module, which owns roll and partition here; MaxViT, at the layer.

| class | versions | op | not served |
|---|---|---|---|
| swin_transformer.ShiftedWindowAttention | 0.15 to 0.x | window_attention | an index buffer that is not Swin's |
| swin_transformer.ShiftedWindowAttentionV2 | 0.15 to 0.x | window_attention, cosine | the same |
| video.swin_transformer.ShiftedWindowAttention3d | 0.15 to 0.x | window_attention | the same |
| maxvit.PartitionAttentionLayer | 0.15 to 0.x | window_attention | an index buffer that is not Swin's, a replaced attention |

In 2-D a window larger than the map stays as it is and an axis of one window does not shift; in 3-D the window shrinks
to the map, and reads the bias of the leading tokens of the configured window. MaxViT runs its own forward on maps other than
the one that it was built for.
"""

import math
from typing import Any

from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.cosine import CosineScore
from vitkern.ops.window_attention import window_attention_qkvpacked
from vitkern.patch._windows import (
    clamp_window,
    continuous_table,
    index_refusal,
    leading_table,
    packed,
    part_refusal,
    shift_refusal,
    thirds,
    version_refusal,
    without_key_bias,
)


def _version() -> str | None:
    import torchvision

    return version_refusal("torchvision", torchvision.__version__, (0, 15), series=1)


def _refusal(module: nn.Module) -> str | None:
    return (
        _version()
        or shift_refusal(module.window_size, module.shift_size)
        or index_refusal(module.relative_position_index, module.window_size)
    )


def _attend(
    module: Any, x: Tensor, qkv_bias: Tensor | None, k_bias: Tensor | None, window: Any, shift: Any, **options: Any
) -> Tensor:
    x = packed(
        nn.functional.linear(x, module.qkv.weight, qkv_bias),
        k_bias,
        thirds(qkv_bias)[2],
        module.num_heads,
        window,
        shift,
        dropout_p=module.attention_dropout if module.training else 0.0,
        **options,
    )
    x = nn.functional.linear(x, module.proj.weight, module.proj.bias)
    return nn.functional.dropout(x, module.dropout, module.training)


def _swin(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        _, shift = clamp_window(x.shape[1:-1], self.window_size, self.shift_size)
        table = RelativePosition(self.relative_position_bias_table)
        bias = self.qkv.bias
        return _attend(self, x, bias, thirds(bias)[1], self.window_size, shift, bias=table)

    return _refusal(module) or forward


def _swinv2(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        _, shift = clamp_window(x.shape[1:-1], self.window_size, self.shift_size)
        table = RelativePosition(continuous_table(self.cpb_mlp, self.relative_coords_table))
        cosine = CosineScore(self.logit_scale, max=math.log(100.0))
        q_bias, _, v_bias = thirds(self.qkv.bias)
        bias = None if q_bias is None else without_key_bias(q_bias, v_bias)
        return _attend(self, x, bias, None, self.window_size, shift, bias=table, cosine=cosine)

    return _refusal(module) or forward


def _swin3d(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        window, shift = clamp_window(x.shape[1:-1], self.window_size, self.shift_size)
        table = leading_table(self.relative_position_bias_table, self.window_size, window)
        bias = self.qkv.bias
        return _attend(self, x, bias, thirds(bias)[1], window, shift, bias=table)

    return _refusal(module) or forward


def _maxvit(module: Any) -> Any:
    """MaxViT scales by the width of all heads."""

    def attend(attention: Any, x: Tensor, partition: str) -> Tensor:
        qkv = attention.to_qkv(x).unflatten(-1, (3, attention.n_heads, -1))
        window = (attention.size,) * 2
        bias = RelativePosition(attention.relative_position_bias_table)
        scale = attention.scale_factor
        out = window_attention_qkvpacked(qkv, window, bias=bias, scale=scale, partition=partition)
        return attention.merge(out.flatten(-2))

    def forward(self: Any, x: Tensor) -> Tensor:
        norm, attention, drop = self.attn_layer
        grid = self.partition_type == "grid"
        window = [length // self.p for length in x.shape[2:]] if grid else [self.p] * 2
        if tuple(x.shape[2:]) != tuple(self.grid_size) or window != [attention.size] * 2:
            return type(self).forward(self, x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.stochastic_dropout(drop(attend(attention, norm(x), "grid" if grid else "block")))
        x = x + self.stochastic_dropout(self.mlp_layer(x))
        return x.permute(0, 3, 1, 2)

    refused = _version() or part_refusal(module, {"attn_layer.1": "RelativePositionalMultiHeadAttention"})
    if refused:
        return refused
    attention = module.attn_layer[1]
    return index_refusal(attention.relative_position_index, (attention.size,) * 2) or forward


_MODELS = "torchvision.models"
TABLE = {
    f"{_MODELS}.swin_transformer.ShiftedWindowAttention": (_swin, "window_attention"),
    f"{_MODELS}.swin_transformer.ShiftedWindowAttentionV2": (_swinv2, "window_attention (cosine)"),
    f"{_MODELS}.video.swin_transformer.ShiftedWindowAttention3d": (_swin3d, "window_attention"),
    f"{_MODELS}.maxvit.PartitionAttentionLayer": (_maxvit, "window_attention"),
}
