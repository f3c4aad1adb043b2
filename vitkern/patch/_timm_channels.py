"""timm: attention between channels, at the attention module."""

from typing import Any

from torch import Tensor, nn

from vitkern.ops.channel_attention import channel_attention
from vitkern.patch._attention import merged
from vitkern.patch._windows import undropped_refusal, version_refusal

_OP = "channel_attention"


def _refusal(module: nn.Module) -> str | None:
    import timm

    return version_refusal("timm", timm.__version__, (1, 0, 29), series=2) or undropped_refusal(module, _OP)


def _split(module: Any, x: Tensor, heads: int) -> tuple[Tensor, ...]:
    return module.qkv(x).unflatten(-1, (3, heads, -1)).unbind(2)


def _cross_covariance(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        if undropped_refusal(self, _OP):
            return type(self).forward(self, x)
        out = channel_attention(*_split(self, x, self.num_heads), temperature=self.temperature)
        return self.proj_drop(self.proj(merged(out)))

    return _refusal(module) or forward


def _davit(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        q, k, v = _split(self, x, self.num_heads)
        return self.proj(merged(channel_attention(k, v, q, normalize=False, scale=self.scale)))

    return _refusal(module) or forward


def _davit_v2(module: nn.Module) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        width = x.shape[1] if self.dynamic_scale else self.head_dim
        out = channel_attention(*_split(self, x, self.groups), normalize=False, scale=width**-0.5)
        return self.proj(merged(out))

    return _refusal(module) or forward


_MODELS = "timm.models"
TABLE = {
    f"{_MODELS}.xcit.XCA": (_cross_covariance, _OP),
    f"{_MODELS}.edgenext.CrossCovarianceAttn": (_cross_covariance, _OP),
    f"{_MODELS}.davit.ChannelAttention": (_davit, _OP),
    f"{_MODELS}.davit.ChannelAttentionV2": (_davit_v2, _OP),
}
