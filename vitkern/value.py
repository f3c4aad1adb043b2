"""What is added to the output of attention beside the weighted values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern._export import exportable
from vitkern.ops.depthwise_value import depthwise_value


@exportable
@dataclass(frozen=True, eq=False)
class DepthwiseValue:
    """Locally-enhanced positional encoding (CSWin, Dong et al. 2022, eq. 7): ``out += conv(v)``, a depthwise convolution of the
    values on their map, zeros around it.

    ``weight [Hk Dv, 1, kh, kw]``, or ``[Dv, 1, kh, kw]`` for all heads, with odd sides; ``bias`` its first axis. ``grid`` are
    the sides of the map, which ``window_attention`` knows; the first ``prefix_tokens`` lie on none and get nothing.
    ``scope="window"``, in ``window_attention`` alone: zeros around every window, whose pads have their values (``pad_kv``).
    """

    weight: Tensor
    bias: Tensor | None = None
    grid: tuple[int, int] | None = None
    prefix_tokens: int = 0
    scope: str = "map"

    def of(self, v: Tensor, *, backend: str | None = None) -> Tensor:
        """What is added to the output: that of ``v [B, N, Hk, Dv]``, in its dtype."""
        assert self.grid is not None
        found = depthwise_value(v[:, self.prefix_tokens :], self.weight, self.bias, self.grid, backend=backend)
        return torch.nn.functional.pad(found, (0, 0, 0, 0, self.prefix_tokens, 0)) if self.prefix_tokens else found
