"""timm: linear attention, at the attention module."""

from typing import Any

from torch import Tensor, nn

from vitkern.nn.lite_mla import multi_scale
from vitkern.patch._windows import version_refusal


def _lite_mla(module: Any) -> Any:
    import timm

    def forward(self: Any, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        return self.proj(multi_scale([qkv, *(op(qkv) for op in self.aggreg)], self.dim, self.eps))

    refusal = version_refusal("timm", timm.__version__, (1, 0, 29), series=2)
    if refusal is None and type(module.kernel_func) is not nn.ReLU:
        refusal = f"kernel_func is {type(module.kernel_func).__name__}, the op's preset has ReLU"
    return refusal or forward


TABLE = {"timm.models.efficientvit_mit.LiteMLA": (_lite_mla, "linear_attention")}
