"""linear_attention on CUDA devices: Triton, and CUDA C++ for the forward of what it serves."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _cuda
from vitkern.ops._gpu import Cuda, Gpu

_cuda.define(
    "_linear_attention_cuda_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? key_weight, Tensor? cu_q, "
    "Tensor? cu_k, SymInt map, float rate, SymInt divisor, float eps, float scale, float offset, SymInt query_splits, "
    "Tensor(a!) parts, Tensor(b!) out, Tensor(c!) state) -> ()"
)
DTYPES = (torch.bfloat16, torch.float16)
MAPS = ("relu", "elu1", "identity", "leaky_relu", "exp", "silu_norm")
DIVISORS = ("sum", "mean", "none", "max", "abs_max", "subtract")
WIDTH = 128
TILE = 64
WAVE = 132  # blocks: one for each of the multiprocessors of a large GPU


def refusals(args: tuple[Any, ...]) -> list[str]:
    """The limits of csrc/cuda/linear_attention.cu, each as a sentence where this call is beyond it."""
    q, k, v, _, weight, cos = args[:6]
    feature_map = args[14]
    reasons = []
    if q.dtype not in DTYPES or v.dtype != q.dtype:
        reasons.append(f"the dtype must be bfloat16 or float16, that of q is {q.dtype}, that of v {v.dtype}")
    for name, t in (("q and k", q), ("v", v)):
        if t.shape[6] % 8 or t.shape[6] > WIDTH:
            reasons.append(f"the head size of {name} must be a multiple of 8 up to {WIDTH}, it is {t.shape[6]}")
    for name, t in zip("qkv", (q, k, v), strict=True):
        if t.stride(6) != 1:
            reasons.append(f"the last dimension of {name} must be contiguous, its stride is {t.stride(6)}")
    if feature_map not in MAPS:
        reasons.append(f"the feature map must be one of {', '.join(MAPS)}, it is {feature_map}")
    if cos is not None:
        reasons.append("rope must be applied before the feature map, it is applied after")
    if weight is not None and weight.dtype == torch.float64:
        reasons.append("key_weight must not be float64")
    missing = (backends.triton_missing(), backends.load("_cuda"))  # the gradients are Triton's
    return reasons + [reason for reason in missing if reason]


def splits(sequences: int, heads: int, tokens: int) -> int:
    """Runs of tiles of the tokens of a sequence and head: from the shape alone, between one and four waves of blocks, of
    eight tiles each or more beyond the first wave."""
    units, tiles = max(sequences * heads, 1), max(-(-tokens // TILE), 1)
    blocks = min(max(units * tiles // 8, WAVE), 4 * WAVE)
    each = -(-tiles // -(-blocks // units))
    return -(-tiles // each)


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Any, key_weight: Any, _cos_q: Any, _sin_q: Any, _cos_k: Any, _sin_k: Any,
    cu_q: Any, cu_k: Any, _map0: Any, _map1: Any, _map2: Any, feature_map: str, rate: float, normalizer: str, eps: float,
    scale: float, offset: float, _half: bool, _detach: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    heads, kv_heads, width, channels = q.shape[5], k.shape[5], q.shape[6], v.shape[6]
    each = q.shape[1] * q.shape[3] if cu_q is None else cu_q.shape[0] - 1
    sequences = q.shape[0] * each
    # of packed sequences the lengths are not known here: runs as of sequences of equal lengths
    tokens = [t.shape[2] * t.shape[4] // (1 if cu_q is None else max(each, 1)) for t in (q, k)]
    out = v.new_empty((*q.shape[:6], channels))
    state = q.new_empty((sequences, kv_heads, width + 1, channels + 1), dtype=torch.float32)
    slots = (splits(sequences, kv_heads, tokens[1]), sequences * kv_heads, (width + 1) * (channels + 4))
    _cuda.ops._linear_attention_cuda_fwd(
        q, k, v, key_mask, None if key_weight is None else key_weight.float(), cu_q, cu_k, MAPS.index(feature_map), rate,
        DIVISORS.index(normalizer), eps, scale, offset, splits(sequences, heads, tokens[0]),
        q.new_empty(slots, dtype=torch.float32), out, state,
    )  # fmt: skip
    return out, state, q.new_empty((sequences, kv_heads, 0), dtype=torch.float32)


def triton() -> Any:
    from vitkern.triton_kernels import linear_attention as kernels

    return kernels


def backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The gradients, by the Triton kernels: the states are the same."""
    return triton().bwd(*args)


GPU = Gpu(triton, Cuda(refusals, forward, backward))
