"""mask_from_logits: the keys that predicted masks show, resized, compared, filled and packed to bits in one pass. No public
function: it is the kernel of :class:`vitkern.mask.FromLogits`."""

from typing import Any

import torch
from torch import Tensor

from vitkern.mask import FromLogits, seen_words
from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import PlainOp


def mask_from_logits(m: FromLogits, queries: int, keys: int, *, backend: str | None = None) -> Tensor:
    """int32 ``[B, queries, ceil(keys / 32)]``: bit j % 32 of word j // 32 is 1 where the query sees key j."""
    return _call.run(OP, m.among(queries, keys), backend)


def _triton() -> Any:
    from vitkern.triton_kernels import mask_from_logits as kernels

    return kernels


def _fake(logits: Tensor, *rest: Any) -> Tensor:
    queries, keys = rest[6:8]
    return logits.new_empty((logits.shape[0], queries, -(-keys // 32)), dtype=torch.int32)


OP = PlainOp(
    "mask_from_logits",
    ("Tensor logits", "Tensor? open_rows"),
    "SymInt height, SymInt width, float threshold, bool full, bool inclusive, SymInt queries, SymInt keys, "
    "SymInt first_query, SymInt first_key, str gpu",
    outputs=1,
    batched=2,
    definition=seen_words,
    fake=_fake,
    gpu=Gpu(_triton),
)
OP.register()
