"""feature_rows: the op that makes the features of linear attention where the sums are another op's."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.feature_rows import feature_rows as definition

NAME = "feature_rows"


def feature_rows(
    x: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    feature_map: str = "identity",
    rate: float = 0.0,
    scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """The rows; the arguments are those of the reference."""
    return _call.run(OP, (x, mask, weight, feature_map, rate, scale), backend)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _triton() -> Any:
    from vitkern.triton_kernels import feature_rows as kernels

    return kernels


OP = Op(
    NAME,
    ("Tensor x", "Tensor? mask", "Tensor? weight"),
    "str feature_map, float rate, float scale, str gpu",
    differentiable=(0, 2),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out",),
    autocast=False,
)
OP.register()
