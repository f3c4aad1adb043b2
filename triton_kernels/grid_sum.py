"""grid_sum on a GPU: the sums of the columns at strips of rows, then a program for each row of the map.

The meaning of every argument is that of the reference, vitkern/reference/grid_sum.py. The transposed mask is that of the map with
its axes exchanged. A program has BLOCK_F features and BLOCK_C values of
a state, the sums over more features are added in order. No atomics.
"""

import torch
import triton
from torch import Tensor

from ._grid_tiles import rows, strips
from ._host import DTYPES, device_reasons, power

BLOCK_R, BLOCK_X = 16, 32
BLOCK_F, BLOCK_C = 32, 16               # a tile of a state: larger ones do not fit into registers


def supported(a, b, c, row, col, turned) -> list[str]:
    """Why fwd cannot run these arguments, one sentence each; [] if it can."""
    why = device_reasons("a", a, not isinstance(rows, triton.JITFunction))
    for name, t in (("a", a), ("b", b), ("c", c), ("row", row), ("col", col)):
        if t.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {t.dtype}")
    return why


class Launch:
    """What the launches of one map [B, Hs, Ws, H, .] share."""

    def __init__(self, b: Tensor, c: Tensor):
        self.batch, self.height, self.columns, self.heads, self.depth = b.shape
        self.width = c.shape[4]
        block_f = min(power(self.depth), BLOCK_F)
        self.parts = -(-self.depth // block_f)
        self.tiles = self.parts * -(-self.width // BLOCK_C)
        self.matrices = self.batch * self.heads
        self.where = {
            "height": self.height, "columns": self.columns, "heads": self.heads, "F": self.depth, "C": self.width,
            "BLOCK_R": BLOCK_R, "BLOCK_F": block_f, "BLOCK_C": BLOCK_C, "num_warps": 4,
        }  # fmt: skip

    def states(self, b: Tensor, c: Tensor, col: Tensor) -> Tensor:
        """The states above and below every strip of every column."""
        shape = (2, self.matrices, -(-self.height // BLOCK_R), self.columns, self.depth, self.width)
        found = b.new_empty(shape, dtype=torch.float32)
        strips[(self.tiles * self.columns * self.matrices,)](
            b, c, col, found, b.stride(), c.stride(), col.stride(), **self.where
        )
        return found


def fwd(a, b, c, row, col, turned) -> Tensor:
    out = a.new_empty((*a.shape[:4], c.shape[4]), dtype=torch.float32)
    if not out.numel():
        return out
    if not a.shape[4]:
        return out.zero_()
    if turned:
        a, b, c, row, col = (t.transpose(1, 2) for t in (a, b, c, col, row))
    launch = Launch(b, c)
    parts = out[None] if launch.parts == 1 else out.new_empty((launch.parts, *out.shape))
    into = parts.transpose(2, 3) if turned else parts
    rows[(launch.tiles * launch.height * launch.matrices,)](
        a, b, c, row, col, launch.states(b, c, col), into, a.stride(), b.stride(), c.stride(), row.stride(), col.stride(),
        into.stride(), BLOCK_X=BLOCK_X, **launch.where,
    )  # fmt: skip
    return out if launch.parts == 1 else parts.sum(0)
