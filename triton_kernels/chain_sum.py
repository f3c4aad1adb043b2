"""chain_sum on a GPU: a program carries a slice of the columns of one head's state along its sequence.

The meaning of every argument is that of the reference, vitkern/reference/chain_sum.py. Where a state has at most one decay and
MAX_STEP_DEPTH rows, BLOCK_T visits make one step: products with the state before them, and among themselves under the decays
between them; links are summed forwards, never as a difference. The others go visit by visit. No atomics.
"""

import torch
import triton
from torch import Tensor

from ._chain_tiles import COLUMNS, NONE, ROWS, SHARED, steps, visits
from ._host import DTYPES, device_reasons, power

BLOCK_T = 16
MAX_DEPTH = 256
MAX_STEP_DEPTH = 64  # wider products of steps do not fit into registers


def supported(a, b, c, log_decay, state, order, cu_seqlens, columns, reverse, strict, block) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    why = device_reasons("a", a, not isinstance(steps, triton.JITFunction))
    for name, t in (("a", a), ("b", b), ("c", c), ("log_decay", log_decay), ("state", state)):
        if t is not None and t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    if max(a.shape[3], c.shape[3]) > MAX_DEPTH + 1:
        why.append(f"a state may have {MAX_DEPTH + 1} rows and columns, it has {a.shape[3]} and {c.shape[3]}")
    return why


class Launch:
    """What the launches of one call share."""

    def __init__(self, a, c, log_decay, order, cu_seqlens, columns, reverse, block):
        batch, self.tokens, self.heads, self.depth = a.shape
        self.width = c.shape[3]
        self.sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.kind = NONE if log_decay is None else SHARED if log_decay.shape[3] == 1 else COLUMNS if columns else ROWS
        self.block_f = power(self.depth)
        self.block_c = 16 if self.block_f > 64 else 32
        self.blocks = -(-self.width // self.block_c)
        self.grid = (self.blocks * self.heads * self.sequences,)
        self.steps = -(-self.tokens // BLOCK_T)
        self.in_steps = self.kind in (NONE, SHARED) and self.block_f <= MAX_STEP_DEPTH
        self.where = {
            "order_ptr": order, "bounds_ptr": cu_seqlens, "tokens": self.tokens, "heads": self.heads, "F": self.depth,
            "C": self.width, "KIND": self.kind, "REVERSE": reverse, "BLOCK": block, "BLOCK_T": BLOCK_T, "BLOCK_F": self.block_f,
            "BLOCK_C": self.block_c, "num_warps": 4,
        }  # fmt: skip

    def walk(self, a, b, c, log_decay, state, strict, keep):
        """out, last, and with `keep` the states before the steps."""
        out = a.new_empty((*a.shape[:3], self.width), dtype=torch.float32)
        last = a.new_empty((self.sequences, self.heads, self.depth, self.width), dtype=torch.float32)
        kept = None
        if keep:
            kept = a.new_empty((self.sequences, self.heads, self.steps, self.depth, self.width), dtype=torch.float32)
        if self.grid[0]:
            kernel = steps if self.in_steps else visits
            kernel[self.grid](
                a, b, c, log_decay, None if state is None else state.contiguous(), out, last, kept, a.stride(), b.stride(),
                c.stride(), strides_of(log_decay), out.stride(), STRICT=strict, **self.where,
            )  # fmt: skip
        return out, last, kept


def strides_of(t: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else t.stride()


def fwd(
    a, b, c, log_decay, state, order, cu_seqlens, columns, reverse, strict, block
) -> tuple[Tensor, Tensor]:
    launch = Launch(a, c, log_decay, order, cu_seqlens, columns, reverse, block)
    return launch.walk(a, b, c, log_decay, state, strict, False)[:2]

