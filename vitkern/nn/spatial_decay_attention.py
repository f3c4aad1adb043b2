"""Softmax attention on a grid whose scores fall with the distance of the tokens: RMT's, with fixed rates, and PPMA's, with rates
that the tokens give."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vitkern.bias import ManhattanDecay, PolylinePath
from vitkern.nn import _checks
from vitkern.ops.attention import attention
from vitkern.rope import Rope
from vitkern.value import DepthwiseValue


class _SpatialDecay(nn.Module):
    """What both have: projections, rotation by the index of the token, a depthwise convolution of the values, and the choice
    between the whole map and its axes one after the other."""

    angle: Tensor

    def __init__(self, embed_dim: int, num_heads: int, value_factor: int, decomposed: bool) -> None:
        super().__init__()
        width = _checks.heads(self, embed_dim, num_heads)
        if width % 2:
            raise ValueError(f"{type(self).__name__}: the head size must be even, got {width}")
        if value_factor < 1:
            raise ValueError(f"{type(self).__name__}: value_factor must be at least 1, got {value_factor}")
        self.embed_dim, self.num_heads, self.decomposed, self.scaling = embed_dim, num_heads, decomposed, width**-0.5
        values = embed_dim * value_factor
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, values)
        self.lepe = nn.ModuleDict({"conv": nn.Conv2d(values, values, 5, padding=2, groups=values)})
        self.out_proj = nn.Linear(values, embed_dim)
        self.register_buffer("angle", 10000.0 ** -torch.linspace(0, 1, width // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.embed_dim)
        grid = (x.shape[1], x.shape[2])
        q, k, v = (
            p(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        turns = torch.arange(grid[0] * grid[1], device=x.device, dtype=self.angle.dtype)[:, None] * self.angle
        rope = Rope(turns.cos()[None, :, None], turns.sin()[None, :, None])
        conv: Any = self.lepe["conv"]
        lepe = DepthwiseValue(conv.weight, conv.bias, grid)
        if self.decomposed:
            q, k = rope.turn(q, None), rope.turn(k, None)
            out = self._by_axes(x, *(t.unflatten(1, grid) for t in (q, k, v))).flatten(1, 2) + lepe.of(v)
        else:
            out = self._on_map(x, q, k, v, rope, lepe)
        return self.out_proj(out.flatten(-2).unflatten(1, grid))

    if TYPE_CHECKING:
        __call__ = forward

    def _on_map(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, lepe: DepthwiseValue) -> Tensor:
        raise NotImplementedError

    def _by_axes(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _along_rows(self, q: Tensor, k: Tensor, v: Tensor, bias: ManhattanDecay | PolylinePath) -> Tensor:
        """Every row ``[B, H, W, heads, D]`` by itself; bias of ``[B H]`` samples of W tokens."""
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return attention(*flat, scale=self.scaling, bias=bias).unflatten(0, q.shape[:2])

    def _along_columns(self, q: Tensor, k: Tensor, v: Tensor, bias: ManhattanDecay | PolylinePath) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self._along_rows(q, k, v, bias).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, decomposed={self.decomposed}"


class RetentionAttention2d(_SpatialDecay):
    """Manhattan self-attention of RMT (Fan et al. 2024, eq. 4 to 6) on maps ``[B, H, W, C]``; returns maps of the same shape.

    ``rate_h (|dy| + |dx|)`` with ``rate_h = ln(1 - 2^-(initial_value + heads_range h / heads))`` is added to the scores, as in
    the released code; ``compat="paper"`` multiplies the weights by its exponential instead. A depthwise 5 x 5 convolution of the
    values is added. Parameters are those of ``VisionRetentionAll`` and ``VisionRetentionChunk`` in qhfan/RMT (2024):
    ``q_proj``, ``k_proj``, ``v_proj``, ``lepe.conv``, ``out_proj``.

    Args:
        embed_dim: channels C.
        num_heads: heads; divides embed_dim.
        value_factor: the values have so many times the channels.
        initial_value, heads_range: of the rates.
        decomposed: attention along the rows, then along the columns (the early stages of RMT), instead of on the whole map.
        compat: "code" or "paper".

    Raises:
        ValueError: num_heads does not divide embed_dim, the head size is odd, compat is unknown, or x is not ``[B, H, W, C]``.
    """

    rate: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        value_factor: int = 1,
        initial_value: float = 2.0,
        heads_range: float = 4.0,
        decomposed: bool = False,
        compat: str = "code",
    ) -> None:
        super().__init__(embed_dim, num_heads, value_factor, decomposed)
        if compat not in ("code", "paper"):
            raise ValueError(f"RetentionAttention2d: compat must be 'code' or 'paper', got {compat!r}")
        self.place = "logit" if compat == "code" else "prob"
        exponent = initial_value + heads_range * torch.arange(num_heads) / num_heads
        self.register_buffer("rate", torch.log(1 - 2.0**-exponent), persistent=False)

    def _decay(self, rows: int, columns: int) -> ManhattanDecay:
        return ManhattanDecay(self.rate, (rows, columns), self.place)

    def _on_map(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, lepe: DepthwiseValue) -> Tensor:
        return attention(q, k, v, scale=self.scaling, bias=self._decay(*x.shape[1:3]), rope=rope, lepe=lepe)

    def _by_axes(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self._along_rows(q, k, v, self._decay(1, x.shape[2]))
        return self._along_columns(q, k, out, self._decay(1, x.shape[1]))


class PolylinePathAttention(_SpatialDecay):
    """Polyline path masked attention (Zhao et al. 2025) on maps ``[B, H, W, C]``; returns maps of the same shape.

    Every token gives a log-decay of its link to the left and one upwards,
    ``-exp(A_log_h) softplus(dt_linear(x)_h + dt_bias_h)``. Their sums L along the query's row and the key's column are added to
    the scores: ``½ softmax(S + L) v + ½ softmax(S + Lᵀ) v``. A depthwise 5 x 5 convolution of the values is added. Parameters
    are those of ``MambaAttentionAllDouble`` and ``MambaAttentionChunkDouble`` in zhongchenzhao/PPMA (2025): ``q_proj``,
    ``k_proj``, ``v_proj``, ``lepe.conv``, ``out_proj``, ``path_embed.dt_linear``, ``path_embed.dt_bias``, ``path_embed.A_log``.

    Args:
        embed_dim: channels C.
        num_heads: heads; divides embed_dim.
        value_factor: the values have so many times the channels.
        decomposed: the mean of attention along rows, then columns, and along columns, then rows (the early stages of PPMA).

    Raises:
        ValueError: num_heads does not divide embed_dim, the head size is odd, or x is not ``[B, H, W, C]``.
    """

    def __init__(self, embed_dim: int, num_heads: int, value_factor: int = 1, decomposed: bool = False) -> None:
        super().__init__(embed_dim, num_heads, value_factor, decomposed)
        self.path_embed = nn.ParameterDict({"dt_bias": torch.full((num_heads,), -4.0), "A_log": torch.zeros(num_heads)})
        self.path_embed.add_module("dt_linear", nn.Linear(embed_dim // num_heads, 2, bias=False))

    def _links(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log-decays of rows and columns, ``[B, H, W, heads]``."""
        made = self.path_embed.get_submodule("dt_linear")(x.unflatten(-1, (self.num_heads, -1)))  # [B, H, W, heads, 2]
        steps = softplus(made + self.path_embed["dt_bias"][:, None]) * -self.path_embed["A_log"].exp()[:, None]
        row, col = steps.unbind(-1)
        return row, col

    def _on_map(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: Rope, lepe: DepthwiseValue) -> Tensor:
        row, col = self._links(x)
        q, k = rope.turn(q, None), rope.turn(k, None)
        first, second = (
            attention(q, k, v, scale=self.scaling, bias=PolylinePath(row, col, turned)) for turned in (False, True)
        )
        return (first + second) / 2 + lepe.of(v)

    def _by_axes(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row, col = self._links(x)
        rows, columns = (
            t.flatten(0, 1)[:, None] for t in (row, col.transpose(1, 2))
        )  # [B H, 1, W, heads], [B W, 1, H, heads]
        along, down = (PolylinePath(t, torch.zeros_like(t)) for t in (rows, columns))
        first = self._along_columns(q, k, self._along_rows(q, k, v, along), down)
        return (first + self._along_rows(q, k, self._along_columns(q, k, v, down), along)) / 2
