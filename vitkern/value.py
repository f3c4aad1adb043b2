"""What is added to the output of attention beside the weighted values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern._export import exportable


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

    def of(self, v: Tensor) -> Tensor:
        """What is added to the output: that of ``v [B, N, Hk, Dv]``."""
        assert self.grid is not None
        heads, width = v.shape[2:]
        weight, bias = (t if t is None else t.to(v.dtype) for t in (self.weight, self.bias))
        if len(self.weight) == width:
            weight, bias = weight.repeat(heads, 1, 1, 1), None if bias is None else bias.repeat(heads)
        maps = v[:, self.prefix_tokens :].flatten(2).mT.unflatten(2, self.grid)  # [B, Hk Dv, h, w]
        padding = (weight.shape[2] // 2, weight.shape[3] // 2)
        found = torch.nn.functional.conv2d(maps, weight, bias, padding=padding, groups=heads * width)
        found = found.flatten(2).mT.unflatten(2, (heads, width))  # [B, N, Hk, Dv]
        return torch.nn.functional.pad(found, (0, 0, 0, 0, self.prefix_tokens, 0))
