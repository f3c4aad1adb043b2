"""depthwise_value: the op behind DepthwiseValue, which adds a depthwise convolution of the values to the output of attention."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.depthwise_value import depthwise_value as definition

NAME = "depthwise_value"


def depthwise_value(
    v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """The convolved values; the arguments are those of the reference."""
    return _call.run(OP, (v, weight, bias, list(grid)), backend)


def _fake(v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _triton() -> Any:
    from vitkern.triton_kernels import depthwise_value as kernels

    return kernels


OP = Op(
    NAME,
    ("Tensor v", "Tensor weight", "Tensor? bias"),
    "SymInt[] grid, str gpu",
    differentiable=(0, 1, 2),
    batched=1,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out",),
    autocast=False,
)
OP.register()
