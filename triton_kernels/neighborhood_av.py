"""neighborhood_av on a GPU: stored weights applied to the values of every window. Arguments as in
vitkern/reference/neighborhood_attention.py."""

import triton
from torch import Tensor

from ._neighborhood_host import reasons, window
from ._neighborhood_slots import _apply
from .neighborhood_qk import apply, scores, spread


def supported(a, v, kernel, dilation, stride, causal, zero) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    return reasons({"attention": a, "v": v}, None, not isinstance(_apply, triton.JITFunction))


def fwd(a, v, kernel, dilation, stride, causal, zero) -> Tensor:
    """[B, L0, L1, L2, H, Dv] in v's dtype, contiguous."""
    return apply(a, v, 1.0, False, window(v.shape[1:4], kernel, dilation, stride, causal, zero))


def bwd(dout, a, v, kernel, dilation, stride, causal, zero, need) -> tuple[Tensor | None, ...]:
    """da and dv; None for those that `need` does not ask for."""
    shape = window(v.shape[1:4], kernel, dilation, stride, causal, zero)
    da = scores(dout, v, None, 0.0, 1.0, shape, a.dtype) if need & 1 else None
    return da, spread(a, dout, v, 1.0, shape) if need & 2 else None
