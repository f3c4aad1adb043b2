"""neighborhood_qk on a GPU: the scores of neighborhood_attention, stored. Arguments as in
vitkern/reference/neighborhood_attention.py."""

import math

import torch
import triton
from torch import Tensor

from ._host import power
from ._neighborhood_host import reasons, row_strides, rpb_strides, window
from ._neighborhood_slots import _apply, _entries, _scores, _spread
from ._window_host import alignment

TILE = 2048                             # numbers of a block of rows
ENTRY_PROGRAMS = 1024                   # of the sums of rpb's gradient, where there is work for them


def supported(q, k, rpb, kernel, dilation, stride, causal, zero, scale) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return reasons({"q": q, "k": k}, rpb, not isinstance(_scores, triton.JITFunction))


def sizes(of_queries: Tensor, of_keys: Tensor, width: int) -> tuple[int, dict]:
    """Blocks of tokens of all images, and the sizes that the kernels share; `width` of their rows."""
    batch, *lengths, heads, _ = of_queries.shape
    tokens, block = math.prod(lengths), min(64, TILE // power(width, 1))
    shared = {"heads": heads, "tokens": tokens, "GROUP": heads // of_keys.shape[-2], "BLOCK_M": block}
    return batch * -(-tokens // block), shared


def scores(x: Tensor, y: Tensor, rpb: Tensor | None, unseen: float, scale: float, shape: dict, dtype: torch.dtype) -> Tensor:
    """[B, L0, L1, L2, H, n]."""
    a = torch.empty((*x.shape[:-1], math.prod(shape["KERNEL"])), dtype=dtype, device=x.device)
    blocks, shared = sizes(x, y, x.shape[-1])
    if a.numel():
        _scores[(blocks * shared["heads"],)](
            x_ptr=x, y_ptr=y, rpb_ptr=rpb, a_ptr=a, x_strides=row_strides(x), y_strides=row_strides(y),
            d_strides=(x.stride(-1), y.stride(-1)), rpb_strides=rpb_strides(rpb), scale=float(scale), D=x.shape[-1],
            BLOCK_D=power(x.shape[-1], 1), UNSEEN=unseen,
            ALIGN=alignment([x, y]), **shape, **shared, num_warps=4,
        )  # fmt: skip
    return a


def apply(a: Tensor, y: Tensor, scale: float, cleaned: bool, shape: dict) -> Tensor:
    """[B, L0, L1, L2, H, D]."""
    out = torch.empty((*a.shape[:-1], y.shape[-1]), dtype=y.dtype, device=y.device)
    blocks, shared = sizes(a, y, y.shape[-1])
    if out.numel():
        _apply[(blocks * shared["heads"],)](
            a_ptr=a, y_ptr=y, out_ptr=out, a_strides=row_strides(a), y_strides=row_strides(y),
            d_strides=(a.stride(-1), y.stride(-1)), scale=float(scale), D=y.shape[-1], BLOCK_D=power(y.shape[-1], 1), CLEAN=cleaned,
            ALIGN=alignment([y]), **shape, **shared, num_warps=4,
        )  # fmt: skip
    return out


def spread(a: Tensor, x: Tensor, like: Tensor, scale: float, shape: dict) -> Tensor:
    """[B, L0, L1, L2, Hk, D], the shape of `like`."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    blocks, shared = sizes(a, like, x.shape[-1])
    if out.numel():
        _spread[(blocks * like.shape[-2],)](
            a_ptr=a, x_ptr=x, out_ptr=out, a_strides=row_strides(a), x_strides=row_strides(x),
            d_strides=(a.stride(-1), x.stride(-1)), scale=float(scale), D=x.shape[-1], BLOCK_D=power(x.shape[-1], 1),
            SIDE=tuple(2 * n - 1 for n in shape["KERNEL"]), ALIGN=alignment([x]), **shape, **shared, num_warps=4,
        )  # fmt: skip
    return out


def entries(a: Tensor, rpb: Tensor, shape: dict) -> Tensor:
    """The sums of a by offset, in the shape and dtype of rpb."""
    blocks, shared = sizes(a, a, 1)
    fans = rpb.numel()
    chunks = max(1, min(blocks, ENTRY_PROGRAMS // fans))
    parts = torch.zeros((chunks, *rpb.shape), dtype=torch.float32, device=a.device)
    if blocks:
        _entries[(fans * chunks,)](
            a_ptr=a, out_ptr=parts, a_strides=row_strides(a), d_strides=(a.stride(-1),), heads=shared["heads"],
            tokens=shared["tokens"], total=blocks, chunks=chunks, BLOCK_M=shared["BLOCK_M"], SIDE=tuple(rpb.shape[1:]),
            **shape, num_warps=2,
        )  # fmt: skip
    return parts.sum(0).to(rpb.dtype)


def fwd(q, k, rpb, kernel, dilation, stride, causal, zero, scale) -> Tensor:
    """[B, L0, L1, L2, H, n] in q's dtype, contiguous."""
    shape = window(q.shape[1:4], kernel, dilation, stride, causal, zero)
    return scores(q, k, rpb, -math.inf, scale, shape, q.dtype)


def bwd(dscores, q, k, rpb, kernel, dilation, stride, causal, zero, scale, need) -> tuple[Tensor | None, ...]:
    """dq, dk and drpb; None for those that `need` does not ask for."""
    shape = window(q.shape[1:4], kernel, dilation, stride, causal, zero)
    dq = apply(dscores, k, scale, True, shape) if need & 1 else None
    dk = spread(dscores, q, k, scale, shape) if need & 2 else None
    return dq, dk, entries(dscores, rpb, shape) if need & 4 and rpb is not None else None
