"""cluster_kmeans: the op behind cluster_tokens(method="kmeans")."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._op import Op
from vitkern.reference.cluster_kmeans import cluster_kmeans as definition

NAME = "cluster_kmeans"


def cluster_kmeans(
    x: Tensor,
    start: Tensor,
    mask: Tensor | None,
    grid: list[int],
    window: int,
    temperature: float,
    iters: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """The centres ``[B, h w, C]`` after ``iters`` turns from ``start``; the arguments are those of the reference."""
    args = (x, start.detach(), mask, grid, window, temperature, iters)
    return _call.run(OP, args, backend)[0]


def _fake(x: Tensor, start: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(start.shape), x.new_empty(start.shape, dtype=acc), x.new_empty(start.shape[:2], dtype=acc)


OP = Op(
    NAME,
    ("Tensor x", "Tensor start", "Tensor? mask"),
    "SymInt[] grid, SymInt window, float temperature, SymInt iters, str gpu",
    differentiable=(0,),
    batched=3,
    definition=definition,
    fake=_fake,
    outputs=("centers", "previous", "total"),
    autocast=False,
)
OP.register()
