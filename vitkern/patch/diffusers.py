"""diffusers: the linear attention of SANA, at the attention module.

| class | versions | op | not served |
|---|---|---|---|
| attention_processor.Attention | 0.32 to 0.x | linear_attention | every processor but SanaLinearAttnProcessor2_0 |
| attention_processor.SanaMultiscaleLinearAttention | 0.32 to 0.x | linear_attention | |

An attention mask is not looked at, as by the processor itself. A map of at most as many tokens as a head has channels, which the
multiscale module of DC-AE multiplies the other way round, gives the same numbers up to rounding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitkern.nn.lite_mla import multi_scale
from vitkern.ops.linear_attention import linear_attention
from vitkern.patch._attention import merged, split_heads
from vitkern.patch._windows import version_refusal


def _refusal() -> str | None:
    import diffusers

    return version_refusal("diffusers", diffusers.__version__, (0, 32), series=1)


def _sana(module: Any) -> Any:
    def forward(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        q = q if self.norm_q is None else self.norm_q(q)
        k = k if self.norm_k is None else self.norm_k(k)
        out = linear_attention(*(split_heads(t, self.heads) for t in (q, k, v)), preset="sana")
        out = self.to_out[1](self.to_out[0](merged(out).to(hidden_states.dtype)))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out

    processor = type(module.processor).__name__
    if processor != "SanaLinearAttnProcessor2_0":
        return f"its processor {processor} is not served"
    return _refusal() or forward


def _multiscale(module: nn.Module) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        x = hidden_states.movedim(1, -1)
        qkv = torch.cat([f(x) for f in (self.to_q, self.to_k, self.to_v)], -1).movedim(-1, 1)
        scales = [qkv, *(block(qkv) for block in self.to_qkv_multiscale)]
        out = self.to_out(multi_scale(scales, self.attention_head_dim, self.eps).movedim(1, -1))
        out = self.norm_out(out).movedim(-1, 1) if self.norm_type == "rms_norm" else self.norm_out(out.movedim(-1, 1))
        return out + hidden_states if self.residual_connection else out

    return _refusal() or forward


_FILE = "diffusers.models.attention_processor"
TABLE = {
    f"{_FILE}.Attention": (_sana, "linear_attention"),
    f"{_FILE}.SanaMultiscaleLinearAttention": (_multiscale, "linear_attention"),
}
