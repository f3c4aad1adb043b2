"""The blocks that merging serves: where their parts are, and their forward with a merge between attention and MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitkern.bias import KeyBias
from vitkern.ops import _checks
from vitkern.ops.attention import attention
from vitkern.patch import _HOOKS
from vitkern.patch._interface import register, run_on_op
from vitkern.patch._windows import dropout_rate


@dataclass(frozen=True)
class Kind:
    """One block class. `key` names the projection that gives the keys, a third of its output where `packed`."""

    key: str
    packed: bool
    heads: Callable[[nn.Module], int]
    forward: Callable[..., Tensor]  # (block, tower, layer, x): the block's own steps around tower.merge
    refusal: Callable[[nn.Module], str | None]
    prefix: Callable[[nn.Module, nn.Module | None], int]  # (block, the first module that has `num_prefix_tokens`)
    key_norm: Callable[[nn.Module], nn.Module | None] = lambda block: None  # of [B, H, N, D], where the block has one


LEAST_ROWS = (
    1000  # images x heads x tokens from which vitkern.attention is the faster one on a CPU; below, calling it costs
)


def _on_op(module: Any, x: Tensor, log_size: Tensor | None, fused: bool) -> bool:
    """Whether vitkern.attention takes this call: a fused attention was asked for, sizes are known, it is the faster one."""
    if log_size is None or not fused or any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    if module.__dict__.get("forward") is not None:  # whoever gave it a forward wants that to run
        return False
    heads = getattr(module, "num_heads", None) or module.num_attention_heads
    few = _checks.known(x.shape[0] * x.shape[1] * heads < LEAST_ROWS)
    return x.is_cuda or (x.device.type == "cpu" and not few)


def _additive(log_size: Tensor | None, x: Tensor) -> Tensor | None:
    """The same as a mask of PyTorch's attention, [B, 1, 1, N]."""
    return None if log_size is None else log_size.to(x.dtype)[:, None, None, :]


def _timm_attend(a: Any, x: Tensor, log_size: Tensor | None) -> Tensor:
    if not _on_op(a, x, log_size, a.fused_attn):
        return a(x, attn_mask=_additive(log_size, x))
    q, k, v = (t.transpose(1, 2) for t in a.qkv(x).unflatten(-1, (3, a.num_heads, -1)).unbind(2))  # [B, H, N, D]
    q, k, v = (t.transpose(1, 2) for t in (a.q_norm(q), a.k_norm(k), v))  # [B, N, H, D]
    out = attention(q, k, v, bias=KeyBias(log_size[:, None]), scale=a.scale, dropout_p=dropout_rate(a.attn_drop))
    out = a.norm(out.flatten(2))
    gate = getattr(a, "gate", None)
    return a.proj_drop(a.proj(out if gate is None else out * gate(x).sigmoid()))


def _transformers_attend(a: Any, x: Tensor, log_size: Tensor | None) -> Tensor:
    if not _on_op(a, x, log_size, a.config._attn_implementation == "sdpa"):
        return a(x, attention_mask=_additive(log_size, x))[0]
    register()
    return run_on_op(a, x, attention_mask=KeyBias(log_size[:, None]))[0]


def _timm_forward(block: Any, tower: Any, layer: int, x: Tensor) -> Tensor:
    x = x + block.drop_path1(block.ls1(_timm_attend(block.attn, block.norm1(x), tower.log_size(x))))
    x = tower.merge(x, layer)
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _vit_forward(block: Any, tower: Any, layer: int, x: Tensor) -> Tensor:
    x = block.dropout(_transformers_attend(block.attention, block.layernorm_before(x), tower.log_size(x))) + x
    x = tower.merge(x, layer)
    return block.dropout(block.mlp(block.layernorm_after(x))) + x


def _dinov2_forward(block: Any, tower: Any, layer: int, x: Tensor) -> Tensor:
    attended = _transformers_attend(block.attention, block.norm1(x), tower.log_size(x))
    x = block.drop_path(block.layer_scale1(attended)) + x
    x = tower.merge(x, layer)
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


def _clip_forward(block: Any, tower: Any, layer: int, x: Tensor) -> Tensor:
    x = x + _transformers_attend(block.self_attn, block.layer_norm1(x), tower.log_size(x))
    x = tower.merge(x, layer)
    return x + block.mlp(block.layer_norm2(x))


def _timm_refusal(block: Any) -> str | None:
    kind = type(block.attn).__qualname__
    return None if kind == "Attention" else f"its attention is {kind}, which merging does not serve"


def _transformers_refusal(block: Any) -> str | None:
    config = (block.self_attn if hasattr(block, "self_attn") else block.attention).config
    if type(config).__name__ == "CLIPTextConfig":
        return "the text tower of CLIP is causal"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention implementation must be 'sdpa' or 'eager', it is {config._attn_implementation!r}"
    return None


def _timm_key_norm(block: Any) -> nn.Module | None:
    norm = getattr(block.attn, "k_norm", None)
    return None if isinstance(norm, nn.Identity) else norm


def _timm_prefix(block: Any, owner: Any) -> int:
    return 1 if owner is None else owner.num_prefix_tokens


def _registers_prefix(block: Any, owner: Any) -> int:
    return 1 + block.attention.config.num_register_tokens


def _in_transformers(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_VIT = Kind(
    "attention.k_proj",
    False,
    lambda block: block.attention.num_attention_heads,
    _vit_forward,
    _transformers_refusal,
    lambda block, owner: 1,
)
_DINOV2 = Kind(_VIT.key, False, _VIT.heads, _dinov2_forward, _transformers_refusal, _VIT.prefix)
KINDS = {
    "timm.models.vision_transformer.Block": Kind(
        "attn.qkv",
        True,
        lambda block: block.attn.num_heads,
        _timm_forward,
        _timm_refusal,
        _timm_prefix,
        _timm_key_norm,
    ),
    _in_transformers("vit") + "ViTLayer": _VIT,
    _in_transformers("deit") + "DeiTLayer": Kind(
        _VIT.key, False, _VIT.heads, _vit_forward, _transformers_refusal, lambda block, owner: 2
    ),
    _in_transformers("dinov2") + "Dinov2Layer": _DINOV2,
    _in_transformers("dinov2_with_registers") + "Dinov2WithRegistersLayer": Kind(
        _VIT.key, False, _VIT.heads, _dinov2_forward, _transformers_refusal, _registers_prefix
    ),
    _in_transformers("clip") + "CLIPEncoderLayer": Kind(
        "self_attn.k_proj",
        False,
        lambda block: block.self_attn.num_heads,
        _clip_forward,
        _transformers_refusal,
        lambda block, owner: 1,
    ),
}
