"""timm: window attention without shift, at the module that owns the partition or inside it."""

from typing import Any

from torch import Tensor, nn

from vitkern.nn.cascaded_group_attention import cascade
from vitkern.ops.attention import attention
from vitkern.ops.window_attention import window_attention
from vitkern.patch._attention import index_refusal, relative_on_grid, split_heads
from vitkern.patch._windows import dropout_rate, packed, part_refusal, thirds, version_refusal


def version() -> str | None:
    import timm

    return version_refusal("timm", timm.__version__, (1, 0, 29), series=2)


# TinyViT: absolute offsets; the norm stands inside the window, so that a pad is the projected norm of zero ------------------


def _tiny_vit(block: nn.Module) -> Any:
    def attend(self: Any, x: Tensor) -> Tensor:
        module, window = self.attn, (self.window_size,) * 2
        sizes = [module.key_dim, module.key_dim, module.val_dim]

        def project(tokens: Tensor) -> tuple[Tensor, ...]:
            return split_heads(module.qkv(module.norm(tokens)), module.num_heads).split(sizes, -1)

        padded = any(length % self.window_size for length in x.shape[1:3])
        pads = project(x.new_zeros(x.shape[-1]))[1:] if padded else None
        bias = relative_on_grid(module, window)
        out = window_attention(*project(x), window, bias=bias, scale=module.scale, pad_kv=pads)
        return module.proj(out.flatten(-2))

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


# DaViT and Twins: windows without positions, whose pads are the projected zero ---------------------------------------------


def _in_windows(module: Any, x: Tensor, window: Any, **options: Any) -> Tensor:
    _, k_bias, v_bias = thirds(module.qkv.bias)
    heads, scale = module.num_heads, module.scale
    return module.proj(packed(module.qkv(x), k_bias, v_bias, heads, window, 0, scale=scale, **options))


def _davit(block: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path1(_in_windows(self.attn, self.norm1(x), self.window_size))
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return (x + self.drop_path2(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)

    return version() or part_refusal(block, {"attn": "WindowAttention", "attn.qkv": nn.Linear}) or forward


def _twins_local(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor, size: Any) -> Tensor:
        drop = dropout_rate(self.attn_drop)
        out = _in_windows(self, x.unflatten(1, tuple(size)), self.ws, dropout_p=drop)
        return self.proj_drop(out.flatten(1, 2))

    return version() or part_refusal(module, {"qkv": nn.Linear, "attn_drop": nn.Dropout}) or forward


def _twins_global(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor, size: Any) -> Tensor:
        q = split_heads(self.q(x), self.num_heads)
        if self.sr is not None:
            x = self.norm(self.sr(x.transpose(1, 2).unflatten(2, tuple(size))).flatten(2).transpose(1, 2))
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        out = attention(q, k, v, scale=self.scale, dropout_p=dropout_rate(self.attn_drop))
        return self.proj_drop(self.proj(out.flatten(-2)))

    return version() or part_refusal(module, {"attn_drop": nn.Dropout}) or forward


_MODELS = "timm.models"
TABLE = {
    f"{_MODELS}.tiny_vit.TinyVitBlock": (_tiny_vit, "window_attention"),
    f"{_MODELS}.efficientvit_msra.CascadedGroupAttention": (_cascaded, "window_attention"),
    f"{_MODELS}.davit.SpatialBlock": (_davit, "window_attention"),
    f"{_MODELS}.twins.LocallyGroupedAttn": (_twins_local, "window_attention"),
    f"{_MODELS}.twins.GlobalSubSampleAttn": (_twins_global, "attention"),
}
