"""The 2-D selective scan block of VMamba."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.nn import _checks
from vitkern.ops.selective_scan_2d import selective_scan_2d

ROUTES = ("row", "col", "row_reverse", "col_reverse")


class SS2D(nn.Module):
    """The mixer of VMamba (Liu et al. 2024) on a map ``[B, H, W, d_model]``; returns a map of the same shape.

    A projection to a map and its gate, a depthwise convolution, four scans that add up, a norm, the gate, a projection. The maps
    are not turned for the scans, and delta is made from its low-rank factor as it is read. Parameters are those of ``SS2D`` in
    MzeroMiko/VMamba, ``vmamba.py`` (2024, the forward type ``"v0"``): ``in_proj``, ``conv2d``,
    ``x_proj_weight [4, dt_rank + 2 d_state, d_inner]``, ``dt_projs_weight [4, d_inner, dt_rank]``, ``dt_projs_bias [4, d_inner]``,
    ``A_logs [4 d_inner, d_state]``, ``Ds [4 d_inner]``, ``out_norm``, ``out_proj``.

    Args:
        d_model: channels.
        d_state: states of a channel.
        ssm_ratio: d_inner over d_model.
        dt_rank: the rank of delta; None: d_model / 16, rounded up.
        d_conv: side of the depthwise kernel, odd.
        dropout: behind the last projection.
        conv_bias, bias: whether the convolution, and the two projections, have biases.
        dt_min, dt_max: between which delta starts, at an input of zero.

    Raises:
        ValueError: d_conv is even, or x is not ``[B, H, W, d_model]``.
    """

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        dropout: float = 0.0,
        conv_bias: bool = True,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        super().__init__()
        if d_conv % 2 == 0:
            raise ValueError(f"SS2D: d_conv must be odd, got {d_conv}")
        self.d_model, self.d_state, self.d_inner = d_model, d_state, int(ssm_ratio * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        count, inner, rank = len(ROUTES), self.d_inner, self.dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, padding=d_conv // 2, groups=inner, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(count, rank + 2 * d_state, inner).uniform_(-1, 1) * inner**-0.5)
        self.dt_projs_weight = nn.Parameter(torch.empty(count, inner, rank).uniform_(-1, 1) * rank**-0.5)
        start = torch.empty(count, inner).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(start + (-(-start).expm1()).log())  # whose softplus is start
        self.A_logs = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(count * inner, 1))
        self.Ds = nn.Parameter(torch.ones(count * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.d_model)
        x, z = self.in_proj(x).chunk(2, -1)  # [B, H, W, d_inner] twice
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        low = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (len(ROUTES), -1))
        delta, b, c = low.split((self.dt_rank, self.d_state, self.d_state), -1)  # [B, H, W, 4, ...]
        y = selective_scan_2d(
            x,
            delta,
            -self.A_logs.exp().unflatten(0, (len(ROUTES), -1)),
            b,
            c,
            routes=ROUTES,
            D=self.Ds.unflatten(0, (len(ROUTES), -1)),
            delta_bias=self.dt_projs_bias,
            delta_weight=self.dt_projs_weight,
            delta_softplus=True,
        )
        return self.dropout(self.out_proj(self.out_norm(y) * F.silu(z)))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_inner={self.d_inner}, dt_rank={self.dt_rank}"
