"""timm: window attention without shift, at the module that owns the partition or inside it."""

from typing import Any

from torch import Tensor, nn

from vitkern.nn.cascaded_group_attention import cascade
from vitkern.ops.window_attention import window_attention
from vitkern.patch._attention import index_refusal, relative_on_grid, split_heads
from vitkern.patch._windows import part_refusal, version_refusal


def version() -> str | None:
    import timm

    return version_refusal("timm", timm.__version__, (1, 0, 29), series=2)


# TinyViT: absolute offsets; the norm stands inside the window, so that a pad is the projected norm of zero ------------------


def _tiny_vit(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor) -> Tensor:
        attention, window = self.attn, (self.window_size,) * 2
        sizes = [attention.key_dim, attention.key_dim, attention.val_dim]

        def project(tokens: Tensor) -> tuple[Tensor, ...]:
            return split_heads(attention.qkv(attention.norm(tokens)), attention.num_heads).split(sizes, -1)

        padded = any(length % self.window_size for length in x.shape[1:3])
        pads = project(x.new_zeros(x.shape[-1]))[1:] if padded else None
        bias = relative_on_grid(attention, window)
        out = window_attention(*project(x), window, bias=bias, scale=attention.scale, pad_kv=pads)
        return attention.proj(out.flatten(-2))

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.drop_path1(attend(self, x))
        tokens = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return (tokens + self.drop_path2(self.mlp(tokens))).view(x.shape)

    refused = version() or part_refusal(block, {"attn": "Attention"})
    return refused or index_refusal(block.attn, (block.window_size,) * 2) or forward


# EfficientViT of MSRA: its convolutions need partitioned windows, so that the attention inside them is what is served -----


def _cascaded(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return cascade(self, x)

    side = (module.resolution,) * 2  # type: ignore[operator]
    return version() or index_refusal(module, side) or forward


_MODELS = "timm.models"
TABLE = {
    f"{_MODELS}.tiny_vit.TinyVitBlock": (_tiny_vit, "window_attention"),
    f"{_MODELS}.efficientvit_msra.CascadedGroupAttention": (_cascaded, "window_attention"),
}
