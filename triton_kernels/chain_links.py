"""chain_links on a GPU: the gradient of the links of chain_sum, where they meet the states before the steps, which a first walk
keeps. The meaning of every argument is that of the reference, vitkern/reference/chain_sum.py. No atomics.
"""

import torch
from torch import Tensor

from . import chain_sum
from ._chain_tiles import step_links, visit_links
from .chain_sum import BLOCK_T, Launch


def supported(dout, a, b, c, log_decay, state, dlast, order, cu_seqlens, columns, reverse, block) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    return chain_sum.supported(a, b, c, log_decay, state, order, cu_seqlens, columns, reverse, False, block)


def fwd(dout, a, b, c, log_decay, state, dlast, order, cu_seqlens, columns, reverse, block) -> Tensor:
    launch = Launch(a, c, log_decay, order, cu_seqlens, columns, reverse, block)
    _, last, kept = launch.walk(a, b, c, log_decay, state, False, True)
    parts = a.new_zeros((launch.blocks, *log_decay.shape), dtype=torch.float32)
    if launch.grid[0]:
        kernel, inside = step_links, None
        if not launch.in_steps:
            kernel = visit_links
            shape = (launch.grid[0], BLOCK_T, launch.block_f, launch.block_c)
            inside = a.new_empty(shape, dtype=torch.float32)
        kernel[launch.grid](
            dout, a, b, c, log_decay, None if dlast is None else dlast.contiguous(), last, kept, inside, parts,
            dout.stride(), a.stride(), b.stride(), c.stride(), log_decay.stride(), parts.stride(), **launch.where,
        )  # fmt: skip
    return parts.sum(0)
