"""timm: linear attention, and attention of one context vector, at the attention module."""

from typing import Any

from torch import Tensor, nn

from vitkern.nn.lite_mla import multi_scale
from vitkern.ops.soft_merge import soft_merge
from vitkern.patch._windows import undropped_refusal, version_refusal


def _lite_mla(module: Any) -> Any:
    import timm

    def forward(self: Any, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        return self.proj(multi_scale([qkv, *(op(qkv) for op in self.aggreg)], self.dim, self.eps))

    refusal = version_refusal("timm", timm.__version__, (1, 0, 29), series=2)
    if refusal is None and type(module.kernel_func) is not nn.ReLU:
        refusal = f"kernel_func is {type(module.kernel_func).__name__}, the op's preset has ReLU"
    return refusal or forward


def _mobilevit(module: Any) -> Any:
    """MobileViTv2 (Mehta & Rastegari 2022): one context vector for each place in a patch, the keys of its tokens weighted by
    the softmax of one score each; the values, rectified, times it."""
    import timm

    def forward(self: Any, x: Tensor, x_prev: Tensor | None = None) -> Tensor:
        if x_prev is not None or undropped_refusal(self, "soft_merge"):
            return type(self).forward(self, x, x_prev)
        query, key, value = self.qkv_proj(x).split((1, self.embed_dim, self.embed_dim), 1)  # [B, 1 | C, P, N]
        keys, scores = (t.transpose(1, 2).flatten(0, 1).mT for t in (key, query))  # [B P, N, C | 1], views where B = 1
        context = soft_merge(keys, scores).view(len(x), x.shape[2], -1).mT[..., None]  # [B, C, P, 1]
        return self.out_drop(self.out_proj(value.relu() * context))

    refusal = version_refusal("timm", timm.__version__, (1, 0, 29), series=2)
    return refusal or undropped_refusal(module, "soft_merge") or forward


TABLE = {
    "timm.models.efficientvit_mit.LiteMLA": (_lite_mla, "linear_attention"),
    "timm.models.mobilevit.LinearSelfAttention": (_mobilevit, "soft_merge"),
}
