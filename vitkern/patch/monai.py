"""MONAI: SwinUNETR, 2-D and 3-D, at the block that owns roll and partition.

| class | versions | op | not served |
|---|---|---|---|
| swin_unetr.SwinTransformerBlock | 1.3 to 1.x | window_attention | blocks whose attention was replaced |

The window shrinks to the map axis by axis and reads the bias of the leading tokens of the configured window. The stage
still builds its mask; of it only counts whether there is one.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkern.patch._windows import (
    clamp_window,
    dropout_rate,
    index_refusal,
    leading_table,
    packed,
    part_refusal,
    shift_refusal,
    thirds,
    version_refusal,
)


def _refusal(block: nn.Module) -> str | None:
    import monai

    return (
        version_refusal("monai", monai.__version__, (1, 3), series=1)
        or part_refusal(block)
        or shift_refusal(block.window_size, block.shift_size)
        or index_refusal(block.attn.relative_position_index, block.attn.window_size)
    )


def _swin(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor, masked: bool) -> Tensor:
        attention = self.attn
        x = self.norm1(x)
        window, shift = clamp_window(x.shape[1:-1], self.window_size, self.shift_size)
        _, k_bias, v_bias = thirds(attention.qkv.bias)
        x = packed(
            attention.qkv(x),
            k_bias,
            v_bias,
            attention.num_heads,
            window,
            shift,
            bias=leading_table(attention.relative_position_bias_table, attention.window_size, window),
            scale=attention.scale,
            mask_value=-100.0 if masked else 0.0,
            dropout_p=dropout_rate(attention.attn_drop),
        )
        return attention.proj_drop(attention.proj(x))

    def forward(self: Any, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        masked = mask_matrix is not None
        if self.use_checkpoint:
            x = x + self.drop_path(checkpoint(attend, self, x, masked, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(attend(self, x, masked))
        return x + self.forward_part2(x)

    return _refusal(block) or forward


TABLE = {"monai.networks.nets.swin_unetr.SwinTransformerBlock": (_swin, "window_attention")}
