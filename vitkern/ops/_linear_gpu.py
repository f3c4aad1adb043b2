"""linear_attention on CUDA devices: Triton, and CUDA C++ for what it serves."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _cuda
from vitkern.ops._gpu import Cuda, Gpu

_OPTIONS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? key_weight, Tensor? cu_q, Tensor? cu_k, SymInt map, float rate, "
    "SymInt divisor, float eps, float scale, float offset"
)
_cuda.define(
    f"_linear_attention_cuda_fwd({_OPTIONS}, SymInt splits, SymInt query_splits, Tensor(a!) parts, Tensor(b!) out, "
    "Tensor(c!) state) -> ()",
    f"_linear_attention_cuda_bwd(Tensor dout, Tensor? dstate, Tensor state, {_OPTIONS}, bool detach, SymInt splits, "
    "SymInt query_splits, Tensor(a!) factors, Tensor(b!) parts, Tensor(c!)? dq, Tensor(d!)? dk, Tensor(e!)? dv, "
    "Tensor(f!)? dweight) -> ()",
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
    feature_map, pairs = args[14], args[PAIRS]
    reasons = ["sums over all pairs are for the other back-ends"] if pairs else []
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
    missing = backends.load("_cuda")
    return [*reasons, missing] if missing else reasons


def splits(sequences: int, heads: int, tokens: int) -> int:
    """Runs of tiles of the tokens of a sequence and head: from the shape alone, between one and four waves of blocks, of
    eight tiles each or more beyond the first wave."""
    units, tiles = max(sequences * heads, 1), max(-(-tokens // TILE), 1)
    blocks = min(max(units * tiles // 8, WAVE), 4 * WAVE)
    each = -(-tiles // -(-blocks // units))
    return -(-tiles // each)


@dataclass(frozen=True)
class _Call:
    """The arguments of the op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    key_weight: Tensor | None
    cos_q: None
    sin_q: None
    cos_k: None
    sin_k: None
    cu_q: Tensor | None
    cu_k: Tensor | None
    map0: None
    map1: None
    map2: None
    feature_map: str
    rate: float
    normalizer: str
    eps: float
    scale: float
    offset: float
    half: bool
    detach: bool
    pairs: bool

    @property
    def sequences(self) -> int:
        return self.q.shape[0] * self._each

    @property
    def _each(self) -> int:
        return self.q.shape[1] * self.q.shape[3] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def splits(self) -> tuple[int, int]:
        """Runs of the keys, and of the queries; of packed sequences as if all had the same length."""
        each = 1 if self.cu_q is None else max(self._each, 1)
        keys, queries = (splits(self.sequences, t.shape[5], t.shape[2] * t.shape[4] // each) for t in (self.k, self.q))
        return keys, queries

    @property
    def options(self) -> tuple[Any, ...]:
        weight = None if self.key_weight is None else self.key_weight.float()
        tensors = (self.q, self.k, self.v, self.key_mask, weight, self.cu_q, self.cu_k)
        divisor = (DIVISORS.index(self.normalizer), self.eps, self.scale, self.offset)
        return (*tensors, MAPS.index(self.feature_map), self.rate, *divisor)

    def parts(self, runs: int) -> Tensor:
        slot = (self.q.shape[6] + 1) * (self.v.shape[6] + 4)
        return self.q.new_empty((runs, self.sequences * self.k.shape[5], slot), dtype=torch.float32)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(*args)
    q, v, lead = call.q, call.v, (call.sequences, call.k.shape[5])
    out = v.new_empty((*q.shape[:6], v.shape[6]))
    state, kept = (
        q.new_empty((*lead, *rest), dtype=torch.float32) for rest in ((q.shape[6] + 1, v.shape[6] + 1), (0,))
    )
    runs = call.splits
    _cuda.ops._linear_attention_cuda_fwd(*call.options, *runs, call.parts(runs[0]), out, state)
    return out, state, kept


def backward(
    dout: Any, dstate: Any, _dkept: Any, state: Tensor, _kept: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    *inputs, need = args
    call = _Call(*inputs)
    q, k, v, weight = call.q, call.k, call.v, call.key_weight
    if dout is None:
        dout = v.new_zeros((*q.shape[:6], v.shape[6]))
    elif dout.stride(6) != 1:
        dout = dout.contiguous()
    dq, dk, dv = (t.new_empty(t.shape) if need >> bit & 1 else None for bit, t in enumerate((q, k, v)))
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if need & 8 and weight is not None else None
    runs = call.splits
    _cuda.ops._linear_attention_cuda_bwd(
        dout, None if dstate is None else dstate.float().contiguous(), state, *call.options, call.detach, *runs,
        q.new_empty((3, *q.shape[:6]), dtype=torch.float32), call.parts(runs[1]), dq, dk, dv, dweight,
    )  # fmt: skip
    return dq, dk, dv, None if dweight is None or weight is None else dweight.to(weight.dtype), *(None,) * 7


PAIRS = 22  # the place of `pairs` among the arguments


def triton() -> Any:
    from vitkern.triton_kernels import linear_attention, linear_pairs

    return Forms(linear_attention, linear_pairs)


@dataclass(frozen=True)
class Forms:
    """Triton modules, by states and by all pairs: the argument `pairs` chooses."""

    states: Any
    pairs: Any

    def of(self, pairs: bool) -> Any:
        return self.pairs if pairs else self.states

    def supported(self, *args: Any) -> list[str]:
        why = self.of(args[PAIRS]).supported(*args)
        if args[14] == "polar" and args[5] is not None:
            why.append("the features of polar must not be rotated, which comes after the exchange of their halves")
        return why

    def fwd(self, *args: Any) -> tuple[Tensor, ...]:
        return self.of(args[PAIRS]).fwd(*args)

    def bwd(self, *args: Any) -> tuple[Tensor | None, ...]:
        return self.of(args[-2]).bwd(*args)


GPU = Gpu(triton, Cuda(refusals, forward, backward))
