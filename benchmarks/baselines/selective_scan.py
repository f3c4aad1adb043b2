"""What people run today instead of selective_scan where no CUDA kernel is: the routes as copies, and the loop over steps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.selective_scan import Case

STEPS = 8  # that are compiled together: more of them gain nothing, and a loop of all takes minutes to compile


def steps(step: Tensor, x: Tensor, gain: Tensor, read: Tensor, rate: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """y [T, N, C] of T steps, and the state [N, C, S] behind them."""
    decay = (step[..., None] * rate).exp()  # [T, N, C, S]
    moved = (step * x)[..., None] * gain[:, :, None]
    ys = []
    for t in range(len(step)):
        h = decay[t] * h + moved[t]
        ys.append((h * read[t, :, None]).sum(-1))
    return torch.stack(ys), h


class Eager:
    """Mamba's and VMamba's PyTorch forms: routes flipped and transposed, and the loop, a few steps of size C S at a time."""

    def __init__(self, case: Case, steps: Any = steps) -> None:
        self.case = case
        self.steps = steps

    def routes(self, x: Tensor) -> list[Tensor]:
        """[L, B, ...] in the order of each route."""
        if len(self.case.grid) == 1:
            rows = x.transpose(0, 1)
            return [rows, rows.flip(0)][: self.case.routes]
        rows, columns = x.flatten(1, 2).transpose(0, 1), x.transpose(1, 2).flatten(1, 2).transpose(0, 1)
        return [rows, rows.flip(0), columns, columns.flip(0)]

    def back(self, y: Tensor, route: int) -> Tensor:
        """A route's [L, B, C] on the map."""
        y = (y.flip(0) if route % 2 else y).transpose(0, 1)
        if len(self.case.grid) == 1:
            return y
        high, wide = self.case.grid
        return y.unflatten(1, (high, wide)) if route < 2 else y.unflatten(1, (wide, high)).transpose(1, 2)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        case, u = self.case, inputs["u"]
        axis = len(case.grid) + 1
        given = {n: inputs[n] if case.routes > 1 else inputs[n].unsqueeze(axis) for n in ("delta", "B", "C")}
        rates, skips, shifts = (inputs[n] if case.routes > 1 else inputs[n][None] for n in ("A_log", "D", "delta_bias"))
        delta = given["delta"].float()
        if case.rank:
            delta = torch.einsum("...rk,rck->...rc", delta, inputs["delta_weight"])

        def along(t: Tensor) -> Tensor:
            """[L, R B, ...] of [B, *grid, R, ...]: every route in its own order."""
            return torch.cat([self.routes(part)[r] for r, part in enumerate(t.float().unbind(axis))], 1)

        def of_routes(p: Tensor) -> Tensor:
            return p.repeat_interleave(case.batch, 0)

        x = along(torch.stack([u] * case.routes, axis))
        step = F.softplus(along(delta) + of_routes(shifts))
        b, c = (along(given[n])[..., 0, :] for n in "BC")
        rate = -of_routes(rates).exp()
        h, ys = rate * 0, []  # with a gradient from the first step on: one compiled form for all
        for at in range(0, len(step), STEPS):
            y, h = self.steps(*(t[at : at + STEPS] for t in (step, x, b, c)), rate, h)
            ys.append(y)
        y = torch.cat(ys) + of_routes(skips) * x
        out = sum(self.back(part, r) for r, part in enumerate(y.chunk(case.routes, 1)))
        if "z" in inputs:
            out = out * F.silu(inputs["z"].float())
        return out.to(u.dtype)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return Eager(case, torch.compile(steps, dynamic=False)) if name == "compiled" else Eager(case)
