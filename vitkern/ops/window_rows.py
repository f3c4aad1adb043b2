"""window_rows, window_sum: the ops that gather the windows of a map in front of attention, and put its rows back."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.ops._window_places import Places
from vitkern.reference.window_rows import window_rows as definition
from vitkern.reference.window_rows import window_sum as sum_definition

NAME = "window_rows"
SUM = "window_sum"


def window_rows(x: Tensor, places: Places, fill: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The rows ``[B * windows, N, H, D]`` of a map ``[B, *L, H, D]``, pads filled."""
    return _call.run(ROWS, (x, fill, *places), backend)


def blank_rows(x: Tensor, places: Places, fill: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """A tensor like `window_rows` gives, without values: no kernel runs."""
    return _rows_fake(x, fill, *places)


def window_sum(rows: Tensor, places: Places, lengths: Any, *, pads: bool = False, backend: str | None = None) -> Any:
    """The map ``[B, *L, H, D]`` that sums the rows of each token, and the sum over pads ``[H, D]``."""
    return _call.run(SUMS, (rows, *places, list(lengths), pads), backend)


def _rows_fake(x: Tensor, fill: Any, index: Any, owners: Any, counts: Any, cells: Any, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0] * math.prod(counts), math.prod(cells), *x.shape[-2:]))


def _sum_fake(
    rows: Tensor, index: Any, owners: Any, counts: Any, cells: Any, most: Any, lengths: Any, *_: Any
) -> tuple[Tensor, Tensor]:
    batch = rows.shape[0] // math.prod(counts)
    acc = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty((batch, *lengths, *rows.shape[-2:])), rows.new_empty(rows.shape[-2:], dtype=acc)


def _rows_backward(dout: Tensor | None, *args: Any) -> tuple[Tensor | None, Tensor | None]:
    x, fill, *places, gpu, need = args
    dx = dfill = None
    if dout is not None:
        wanted = fill is not None and bool(need & 2)
        dx, total = SUMS.overload("_fwd")(dout, *places, x.shape[1:-2], wanted, gpu)
        dfill = total.to(fill.dtype) if wanted else None
    return dx if need & 1 else None, dfill


def _sum_backward(dout: Tensor | None, dtotal: Tensor | None, total: Tensor, *args: Any) -> Tensor | None:
    rows, index, owners, counts, cells, most, lengths, pads, gpu, need = args
    if not need & 1 or (dout is None and dtotal is None):
        return None
    if dout is None:
        dout = rows.new_zeros((rows.shape[0] // math.prod(counts), *lengths, *rows.shape[-2:]))
    fill = dtotal if pads else None
    return ROWS.overload("_fwd")(dout, fill, index, owners, counts, cells, most, gpu)


def _triton() -> Any:
    from vitkern.triton_kernels import window_rows as kernels

    return kernels


class _Sums(Gpu):
    """The Triton module of both ops, whose functions for the sums have names of their own."""

    def triton_refusals(self, args: tuple[Any, ...]) -> list[str]:
        return super().triton_refusals((args[0], None, *args[1:6]))

    def forward(self, op: Any, *args: Any) -> Any:
        *inputs, named = args
        chosen = named or self.choose(tuple(inputs))
        return _triton().sums(*inputs) if chosen == "triton" else op.definition(*args)


_PLACES = ("Tensor index", "Tensor owners")
ROWS = Op(
    NAME,
    ("Tensor x", "Tensor? fill", *_PLACES),
    "SymInt[] counts, SymInt[] cells, SymInt[] most, str gpu",
    differentiable=(0, 1),
    batched=0,
    definition=definition,
    fake=_rows_fake,
    gpu=Gpu(_triton),
    outputs=("rows",),
    autocast=False,
    composed=_rows_backward,
)
SUMS = Op(
    SUM,
    ("Tensor rows", *_PLACES),
    "SymInt[] counts, SymInt[] cells, SymInt[] most, SymInt[] lengths, bool pads, str gpu",
    differentiable=(0,),
    batched=0,
    definition=sum_definition,
    fake=_sum_fake,
    gpu=_Sums(_triton),
    outputs=("out", "total"),
    autocast=False,
    composed=_sum_backward,
)
ROWS.register()
SUMS.register()
