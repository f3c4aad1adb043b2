"""Selective scans as published models call them: shapes, inputs, and the work that cannot be avoided."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vitkern

from ._random import moved, tensors

BASELINES = ("eager", "compiled")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so. A grid of two sides is scanned along four routes with a delta of `rank`; one
    length is scanned along `routes`, gated by z."""

    model: str
    batch: int
    grid: tuple[int, ...]
    channels: int
    states: int
    rank: int = 0
    routes: int = 4

    def __str__(self) -> str:
        size = "x".join(map(str, self.grid))
        return f"{self.model}, {size}, C={self.channels}, S={self.states}, R={self.routes}, batch {self.batch}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        axes = (self.batch, *self.grid)
        routed = (*axes, self.routes) if self.routes > 1 else axes
        own = (self.routes,) if self.routes > 1 else ()
        shapes = {"u": (*axes, self.channels), "delta": (*routed, self.rank or self.channels)}
        shapes |= {name: (*routed, 1, self.states) for name in "BC"}
        if not self.rank:
            shapes["z"] = (*axes, self.channels)
        parameters = {"A_log": (*own, self.channels, self.states)}
        parameters |= {name: (*own, self.channels) for name in ("D", "delta_bias")}
        if self.rank:
            parameters["delta_weight"] = (*own, self.channels, self.rank)
        made = tensors(torch.float32, device, grad, 1, **parameters)
        return tensors(dtype, device, grad, **shapes) | made

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> Tensor:
        given = {name: t for name, t in inputs.items() if name != "A_log"} | {"A": -inputs["A_log"].exp()}
        if self.rank:
            return vitkern.selective_scan_2d(**given, delta_softplus=True, backend=backend)
        route = "both" if self.routes == 2 else "forward"
        return vitkern.selective_scan(**given, delta_softplus=True, route=route, backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: u, z, out and, of every route, delta, B and C once; backward reads them and dout and writes their gradients.
        An exponential for every state and two for a softplus, again in the backward. Operations: delta A, delta u B, the
        state and y are 6; three times that in the backward; the low-rank delta 2, 6 with backward."""
        visits = float(self.batch * math.prod(self.grid) * self.routes)
        pixels = visits / self.routes
        elements = pixels * self.channels * (2 if self.rank else 3) + visits * (
            (self.rank or self.channels) + 2 * self.states
        )
        again = pixels * self.channels
        lowered = 2.0 * visits * self.channels * self.rank
        return {
            "bytes": moved(elements * 2 + elements + again if backward else elements, 1, dtype),
            "flops": 6.0 * visits * self.channels * self.states * (4 if backward else 1)
            + lowered * (3 if backward else 1),
            "exps": visits * self.channels * (self.states + 2) * (2 if backward else 1),
        }


CASES = [  # the second stages: the oracle of a first one holds gigabytes
    Case("VMamba-T v0 stage 2", 1, (28, 28), 384, 16, 12),
    Case("VMamba-T stage 2", 2, (28, 28), 192, 1, 12),
    Case("Vim-T", 2, (197,), 384, 16, routes=2),
    Case("Mamba-130M", 1, (256,), 1536, 16, routes=1),
]
GPU_CASES = [
    Case("VMamba-T v0 stage 1", 64, (56, 56), 192, 16, 6),
    Case("VMamba-T stage 1", 128, (56, 56), 96, 1, 6),
    Case("Vim-T", 128, (197,), 384, 16, routes=2),
    Case("Mamba-130M", 8, (2048,), 1536, 16, routes=1),
]
