"""mask_from_logits: the visible cells of predicted masks, resized, compared and filled in one pass. No public function: it is
the kernel of :class:`vitkern.mask.FromLogits`."""

from typing import Any

import torch
from torch import Tensor

from vitkern.mask import FromLogits, seen_cells
from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import PlainOp


def mask_from_logits(m: FromLogits, *, backend: str | None = None) -> Tensor:
    """bool ``[B, Q, cells]`` of ``size``: True where the query sees the cell."""
    args = (m.logits.detach(), m.open_rows, *m.size, float(m.threshold), m.empty == "full", m.inclusive)
    return _call.run(OP, args, backend)


def _triton() -> Any:
    from vitkern.triton_kernels import mask_from_logits as kernels

    return kernels


def _fake(logits: Tensor, open_rows: Tensor | None, height: int, width: int, *rest: Any) -> Tensor:
    return logits.new_empty((*logits.shape[:2], height * width), dtype=torch.bool)


OP = PlainOp(
    "mask_from_logits",
    ("Tensor logits", "Tensor? open_rows"),
    "SymInt height, SymInt width, float threshold, bool full, bool inclusive, str gpu",
    outputs=1,
    batched=2,
    definition=seen_cells,
    fake=_fake,
    gpu=Gpu(_triton),
)
OP.register()
