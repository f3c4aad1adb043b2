"""chain_sum: the op behind the causal forms and the one-dimensional decays of linear_attention; chain_links, the gradient
of its links.

Its gradients are chain sums themselves: with M_ij the decays between two visits, da = M (dout, c, b), and db and dc are sums with
the transpose of M, which is the walk in the other direction.
"""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op, PlainOp
from vitkern.reference.chain_sum import chain_links as links_definition
from vitkern.reference.chain_sum import chain_sum as definition

NAME = "chain_sum"


def chain_sum(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    order: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    columns: bool = False,
    reverse: bool = False,
    strict: bool = False,
    block: int = 0,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums and the state behind the last visit; the arguments are those of the reference."""
    args = (a, b, c, log_decay, state, order, cu_seqlens, columns, reverse, strict, block)
    return _call.run(OP, args, backend)


def _fake(a: Tensor, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    cu = rest[3]
    sequences = a.shape[0] if cu is None else cu.shape[0] - 1
    last = a.new_empty((sequences, a.shape[2], a.shape[3], c.shape[3]), dtype=acc)
    return a.new_empty((*a.shape[:3], c.shape[3]), dtype=acc), last


def backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    last: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    order: Tensor | None,
    cu_seqlens: Tensor | None,
    columns: bool,
    reverse: bool,
    strict: bool,
    block: int,
    gpu: str,
    need: int,
) -> tuple[Tensor | None, ...]:
    """The gradients of a, b, c, log_decay and state."""

    def walk(
        x: Tensor, y: Tensor, z: Tensor, start: Tensor | None, turned: bool, of_columns: bool
    ) -> tuple[Tensor, Tensor]:
        options = (of_columns, reverse ^ turned, strict, block, gpu)
        return OP.overload("_fwd")(x, y, z, log_decay, start, order, cu_seqlens, *options)

    if dout is None:
        dout = torch.zeros_like(last[:1, :, 0]).expand(*a.shape[:3], c.shape[3])
    flip = [None if t is None else t.mT for t in (state, dlast)]
    da = walk(dout, c, b, flip[0], False, not columns)[0] if need & 1 else None
    db = walk(c, dout, a, flip[1], True, not columns)[0] if need & 2 else None
    dc, dstate = walk(b, a, dout, dlast, True, columns) if need & 20 else (None, None)
    dlink = None
    if log_decay is not None and need & 8:
        shared = (log_decay, state, dlast, order, cu_seqlens, columns, reverse, block, gpu)
        dlink = LINKS.overload()(dout, a, b, c, *shared)
    found = (da, db, dc if need & 4 else None, dlink, dstate if need & 16 else None)
    inputs = (a, b, c, log_decay, state)
    return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, inputs, strict=True))


def _fake_links(dout: Tensor, a: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, *rest: Any) -> Tensor:
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    return log_decay.new_empty(log_decay.shape, dtype=acc)


def spans(tokens: int, cu_seqlens: Tensor | None, block: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each visit its sequence, the first visit of it, and the end of its block (of its sequence, where block is 0)."""
    step = torch.arange(tokens, device=device)
    if cu_seqlens is None:
        own, begin, stop = torch.zeros_like(step), torch.zeros_like(step), torch.full_like(step, tokens)
    else:
        bounds = cu_seqlens.long()
        own = torch.searchsorted(bounds[1:].contiguous(), step, right=True)
        begin, stop = bounds[own], bounds[own + 1]
    if block:
        stop = torch.minimum(begin + ((step - begin) // block + 1) * block, stop)
    return own, begin, stop


def _triton() -> Any:
    from vitkern.triton_kernels import chain_sum as kernels

    return kernels


def _triton_links() -> Any:
    from vitkern.triton_kernels import chain_links as kernels

    return kernels


OP = Op(
    NAME,
    ("Tensor a", "Tensor b", "Tensor c", "Tensor? log_decay", "Tensor? state", "Tensor? order", "Tensor? cu_seqlens"),
    "bool columns, bool reverse, bool strict, SymInt block, str gpu",
    differentiable=(0, 1, 2, 3, 4),
    batched=5,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out", "last"),
    autocast=False,
    composed=backward,
)
LINKS = PlainOp(
    "chain_links",
    ("Tensor dout", "Tensor a", "Tensor b", "Tensor c", "Tensor log_decay", "Tensor? state", "Tensor? dlast", "Tensor? order",
     "Tensor? cu_seqlens"),
    "bool columns, bool reverse, SymInt block, str gpu",
    outputs=1,
    batched=7,
    definition=links_definition,
    fake=_fake_links,
    gpu=Gpu(_triton_links),
)  # fmt: skip
OP.register()
LINKS.register()
