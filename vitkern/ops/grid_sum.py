"""grid_sum: the op behind the two-dimensional decays of linear_attention, and grid_links, the gradient of its links.

The transpose of M walks along the key's row, then along the query's column: the same sum on the map with its axes exchanged
(turned), so that the gradients of a, b and c are grid sums too.
"""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op, PlainOp
from vitkern.reference.grid_sum import grid_links as links_definition
from vitkern.reference.grid_sum import grid_sum as definition

NAME = "grid_sum"


def grid_sum(
    a: Tensor, b: Tensor, c: Tensor, row: Tensor, col: Tensor, turned: bool = False, *, backend: str | None = None
) -> Tensor:
    """The sums; the arguments are those of the reference."""
    return _call.run(OP, (a, b, c, row, col, turned), backend)


def _fake(a: Tensor, b: Tensor, c: Tensor, *rest: Any) -> Tensor:
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    return a.new_empty((*a.shape[:4], c.shape[4]), dtype=acc)


def backward(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, row: Tensor, col: Tensor, turned: bool, gpu: str, need: int
) -> tuple[Tensor | None, ...]:
    """The gradients of a, b, c, row and col."""

    sums, links = OP.overload("_fwd"), (row, col)
    da = sums(dout, c, b, *links, turned, gpu) if need & 1 else None
    db = sums(c, dout, a, *links, not turned, gpu) if need & 2 else None
    dc = sums(b, a, dout, *links, not turned, gpu) if need & 4 else None
    drow, dcol = LINKS.overload()(dout, a, b, c, *links, turned, gpu) if need & 24 else (None, None)
    found = (da, db, dc, drow if need & 8 else None, dcol if need & 16 else None)
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(found, (a, b, c, row, col), strict=True))


def _fake_links(
    dout: Tensor, a: Tensor, b: Tensor, c: Tensor, row: Tensor, col: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    return row.new_empty(row.shape, dtype=acc), col.new_empty(col.shape, dtype=acc)


def _triton() -> Any:
    from vitkern.triton_kernels import grid_sum as kernels

    return kernels


def _triton_links() -> Any:
    from vitkern.triton_kernels import grid_links as kernels

    return kernels


OP = Op(
    NAME,
    ("Tensor a", "Tensor b", "Tensor c", "Tensor row", "Tensor col"),
    "bool turned, str gpu",
    differentiable=(0, 1, 2, 3, 4),
    batched=5,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out",),
    autocast=False,
    composed=backward,
)
LINKS = PlainOp(
    "grid_links",
    ("Tensor dout", "Tensor a", "Tensor b", "Tensor c", "Tensor row", "Tensor col"),
    "bool turned, str gpu",
    outputs=2,
    batched=6,
    definition=links_definition,
    fake=_fake_links,
    gpu=Gpu(_triton_links),
)
OP.register()
LINKS.register()
