"""Modules that run their own forward with a vitkern op in place of one part: transformers' attention interface.

A module of transformers looks its attention function up by the name in its config. A patched one keeps its forward, so
that whatever the class does around attention (positions added to queries and keys, rotary embedding, pooling) stays its
own, and finds vitkern under that name.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.mask import Causal
from vitkern.ops.attention import attention
from vitkern.patch._windows import version_refusal

NAME = "vitkern"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")  # options of the interface that change what is computed


class View:
    """An object as its own methods see it, with other things under some of its names."""

    forward = None  # transformers compares it with that of the class, to checkpoint once

    def __init__(self, subject: Any, **others: Any) -> None:
        self.__dict__.update(others, _subject=subject)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._subject, name)
        if isinstance(found, MethodType) and found.__self__ is self._subject:
            return partial(found.__func__, self)  # not a method: torch.compile traces this
        return found


def refusal() -> str | None:
    """Refuses versions of transformers whose attention modules are not known."""
    import transformers

    return version_refusal("transformers", transformers.__version__, (5, 0), series=1)


def weights_wanted(asked: Any = None) -> bool:
    """Whether a module must give its attention weights: it is told to, or the model around it collects them."""
    if asked:
        return True
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    # torch.compile cannot read a context variable: the library keeps a global one for a model that is compiled whole
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return any("attentions" in key for key in collected or ())


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of the interface: ``q, k, v [B, H, N, D]`` to ``([B, N, H, D], None)``.

    A bool mask hides, a float one or a typed bias is added as it is. Without a mask a causal module is causal, as with "sdpa".
    """
    for name in _UNKNOWN:
        if options.get(name) is not None:
            raise NotImplementedError(f"{type(module).__name__}: the vitkern attention function does not take {name}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    hides = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
    mask = attention_mask if hides else Causal() if causal and attention_mask is None and query.shape[2] > 1 else None
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=None if hides else attention_mask,
        mask=mask,
        scale=scaling,
        dropout_p=dropout,
    )
    return out, None


def register() -> None:
    """Makes :func:`attend` known under its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def run_on_op(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own forward, which finds vitkern under the name in its config."""
    return type(module).forward(View(module, config=View(module.config, _attn_implementation=NAME)), *args, **kwargs)


def through_interface(module: nn.Module) -> Any:
    """Serves a module that calls the attention function that its config names."""
    reason = refusal()
    if reason:
        return reason
    register()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if weights_wanted(kwargs.get("output_attentions")):
            return type(self).forward(self, *args, **kwargs)
        return run_on_op(self, *args, **kwargs)

    return forward


_MODELS = "transformers.models"
_CLASSES = (
    "beit.modeling_beit.BeitAttention",
    "clip.modeling_clip.CLIPAttention",
    "deit.modeling_deit.DeiTAttention",
    "detr.modeling_detr.DetrSelfAttention",
    "detr.modeling_detr.DetrCrossAttention",
    "dinov2.modeling_dinov2.Dinov2Attention",
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
    "eomt.modeling_eomt.EomtAttention",
    "eomt_dinov3.modeling_eomt_dinov3.EomtDinov3Attention",
    "maskformer.modeling_maskformer.MaskFormerDetrSelfAttention",
    "maskformer.modeling_maskformer.MaskFormerDetrCrossAttention",
    "sam.modeling_sam.SamAttention",
    "sam2.modeling_sam2.Sam2MultiScaleAttention",
    "sam2.modeling_sam2.Sam2Attention",
    "sam_hq.modeling_sam_hq.SamHQAttention",
    "siglip.modeling_siglip.SiglipAttention",
    "vit.modeling_vit.ViTAttention",
)
TABLE = {f"{_MODELS}.{name}": (through_interface, "attention") for name in _CLASSES}
