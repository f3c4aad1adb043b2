"""deformable_attention in CUDA C++: the private ops, their limits, and the sort between the two halves of the backward."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _cuda
from vitkern.ops._gpu import Cuda

LEVELS = 8
_PLACES = "Tensor locations, Tensor weights"
_LEVELS = "SymInt[] shapes, SymInt[] points, bool nearest"
_cuda.define(
    f"_deformable_attention_cuda(Tensor value, {_PLACES}, {_LEVELS}, Tensor(a!) out) -> ()",
    f"_deformable_attention_cuda_places(Tensor dout, Tensor value, {_PLACES}, {_LEVELS}, Tensor(a!)? dlocations, "
    "Tensor(b!)? dweights, Tensor(c!)? keys) -> ()",
    f"_deformable_attention_cuda_cells(Tensor dout, {_PLACES}, Tensor order, Tensor begin, {_LEVELS}, "
    "Tensor(a!) dvalue) -> ()",
)


def refusals(args: tuple[Any, ...]) -> list[str]:
    """The limits of csrc/cuda/deformable_attention.cu, each as a sentence where this call is beyond it."""
    value, locations, weights, shapes, points = args[:5]
    reasons = [
        f"{name} must be float32, bfloat16 or float16, it is {t.dtype}"
        for name, t in (("value", value), ("sampling_locations", locations), ("attention_weights", weights))
        if t.dtype not in _cuda.TYPES
    ]
    if value.shape[3] > 1 and value.stride(3) != 1:
        reasons.append(f"the channels of value must be contiguous, their stride is {value.stride(3)}")
    if len(points) > LEVELS:
        reasons.append(f"spatial_shapes may hold {LEVELS} levels, it holds {len(points)}")
    if max(shapes) >= 2**24 or value.shape[1] >= 2**31:
        reasons.append("the sides of a level must be below 2^24, and all cells fewer than 2^31")
    missing = backends.load("_cuda")
    return [*reasons, missing] if missing else reasons


def _normalized(weights: Tensor) -> Tensor:
    return weights.float().flatten(3).softmax(-1).view(weights.shape)


def forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], nearest: bool, normalize: bool
) -> Tensor:  # fmt: skip
    out = value.new_empty((*locations.shape[:3], value.shape[3]))
    if out.numel():
        soft = _normalized(weights) if normalize else weights
        _cuda.ops._deformable_attention_cuda(value, locations, soft, shapes, points, nearest, out)
    return out


def backward(
    dout: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], nearest: bool,
    normalize: bool, need: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dvalue, dlocations, dweights = (
        t.new_empty(t.shape) if need >> bit & 1 else None for bit, t in enumerate((value, locations, weights))
    )
    if not weights.numel():
        return None if dvalue is None else dvalue.zero_(), dlocations, dweights
    soft = _normalized(weights) if normalize else weights
    dsoft = torch.empty_like(soft) if normalize and need & 4 else dweights
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    keys = value.new_empty(weights.numel(), dtype=torch.int64) if need & 1 else None
    levels = shapes, points, nearest
    _cuda.ops._deformable_attention_cuda_places(dout, value, locations, soft, *levels, dlocations, dsoft, keys)
    if dvalue is not None and keys is not None:
        ordered, order = torch.sort(keys, stable=True)
        padded = sum((h + 1) * (w + 1) for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        named = torch.arange(value.shape[0] * value.shape[2] * padded + 1, device=value.device)
        begin = torch.searchsorted(ordered, named)
        _cuda.ops._deformable_attention_cuda_cells(dout, locations, soft, order, begin, *levels, dvalue)
    if normalize and dsoft is not None:
        mean = (soft * dsoft).flatten(3).sum(3)[..., None, None]
        dweights = (soft * (dsoft - mean)).to(weights.dtype)
    return dvalue, dlocations, dweights


CUDA = Cuda(refusals, forward, backward)
