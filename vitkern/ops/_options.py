"""The keyword arguments of the public functions, once for all their overloads; for type checkers alone."""

from typing import Any, TypedDict

from torch import Tensor

from vitkern.cosine import CosineScore
from vitkern.rope import Rope
from vitkern.value import DepthwiseValue


class AttentionOptions(TypedDict, total=False):
    """Of attention and attention_varlen, but return_stats."""

    bias: Any
    mask: Any
    modulation: Any
    normalizer: str
    cosine: CosineScore | None
    rope: Rope | None
    scale: float | Tensor | None
    sink: Tensor | None
    extra_kv: tuple[Tensor, Tensor | None] | None
    key_index: Tensor | None
    lepe: DepthwiseValue | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    topk: int | None
    stat_rows: tuple[int, ...] | None
    query_weight: Tensor | None
    backend: str | None


class WindowOptions(TypedDict, total=False):
    """Of window_attention and window_attention_qkvpacked, but return_stats."""

    bias: Any
    mask: Any
    cosine: CosineScore | None
    scale: float | Tensor | None
    normalizer: str
    partition: str
    context_size: int | tuple[int, ...] | None
    pad_order: str
    pad_kv: str | tuple[Tensor | None, Tensor | None] | None
    mask_value: float | None
    extra_kv: tuple[Tensor, Tensor] | None
    shared_q: bool
    lepe: DepthwiseValue | None
    order: Tensor | None
    dropout_p: float
    dropout_seed: int | Tensor | None
    key_mask: Tensor | None
    key_window_size: int | tuple[int, ...] | None
    context_border: str
    backend: str | None


class NeighborhoodOptions(TypedDict, total=False):
    """Of neighborhood_attention, but return_stats."""

    dilation: int | tuple[int, ...]
    stride: int | tuple[int, ...]
    is_causal: bool | tuple[bool, ...]
    rpb: Tensor | None
    scale: float | None
    border: str
    key_mask: Tensor | None
    extra_kv: tuple[Tensor, Tensor] | None
    backend: str | None


class LinearOptions(TypedDict, total=False):
    """Of linear_attention, but return_state."""

    feature_map: Any
    normalizer: str | None
    eps: float | None
    scale: float | None
    key_mask: Tensor | None
    key_weight: Tensor | None
    offset: float | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    window_size: Any
    rope: Any
    rope_order: str | None
    decay: Any
    causal: bool | int
    initial_state: Any
    lepe: Any
    preset: str | None
    backend: str | None


class ScanOptions(TypedDict, total=False):
    """Of selective_scan, but return_state."""

    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool
    route: str
    cu_seqlens: Tensor | None
    initial_state: Tensor | None
    backend: str | None
