"""What is added to the output of attention beside the weighted values."""

import math
from dataclasses import dataclass
from typing import Any

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
    the sides of the map, which ``window_attention`` knows; the first ``prefix_tokens`` lie on none and get nothing. In
    ``attention_varlen`` every sequence is a map of its own: ``grid`` is a tuple of their sides ``(h, w)``.
    ``scope="window"``, in ``window_attention`` alone: zeros around every window, whose pads have their values (``pad_kv``).
    """

    weight: Tensor
    bias: Tensor | None = None
    grid: tuple[int, int] | tuple[tuple[int, int], ...] | None = None
    prefix_tokens: int = 0
    scope: str = "map"

    def of(self, v: Tensor, sides: Any = None, *, backend: str | None = None) -> Tensor:
        """What is added to the output: that of ``v [B, N, Hk, Dv]`` on maps of `sides`, or of `grid`, in v's dtype."""
        sides = self.grid if sides is None else sides
        found = depthwise_value(v[:, self.prefix_tokens :], self.weight, self.bias, sides, backend=backend)
        return torch.nn.functional.pad(found, (0, 0, 0, 0, self.prefix_tokens, 0)) if self.prefix_tokens else found

    def of_packed(self, v: Tensor, *, backend: str | None = None) -> Tensor:
        """That of packed sequences ``v [T, Hk, Dv]``; those of one size that follow each other are done at once."""
        assert self.grid is not None
        runs: list[list[Any]] = []
        for sides in self.grid:
            if runs and runs[-1][0] == sides:
                runs[-1][1] += 1
            else:
                runs.append([sides, 1])
        lengths = [count * (math.prod(sides) + self.prefix_tokens) for sides, count in runs]
        parts = [
            self.of(part.unflatten(0, (count, -1)), sides, backend=backend).flatten(0, 1)
            for part, (sides, count) in zip(v.split(lengths), runs, strict=True)
        ]
        return torch.cat(parts) if parts else torch.zeros_like(v)
