"""Decays of linear attention: how the weight of a key falls with its distance from the query. Small frozen dataclasses of tensors.

``.dense(q, k)`` is the definition: the factors M of the products ``<phi(q_i), phi(k_j)>`` of ``q [B, N, H, F]``, as a tensor
that broadcasts to ``[B, H, N, N]``. Rates are natural logarithms for each step, normally at most 0. `linear_attention` never
makes M: it takes time linear in the tokens, forward and backward. Grids are row-major, rows first. Gradients go to every
floating-point field.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern import bias
from vitkern._export import exportable
from vitkern.reference.grid_sum import mask

PATHS = ("both", "row_first", "col_first")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _placed(m: Tensor, order: Tensor | None) -> Tensor:
    """M of the visits as M of the tokens, on its axes 2 and 3."""
    if order is None:
        return m
    visit = torch.argsort(order.long())
    return m[:, :, visit[:, None], visit]


@exportable
@dataclass(frozen=True, eq=False)
class Retention:
    """``exp(rate_h |i - j|)``, ``rate [H]`` (RetNet, Sun et al. 2023). ``order [N]`` int32: the token at each place of a chain."""

    rate: Tensor
    order: Tensor | None = None

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[1, H, N, N]``."""
        place = torch.arange(q.shape[1], device=self.rate.device, dtype=_wide(self.rate).dtype)
        m = (_wide(self.rate)[:, None, None] * (place[:, None] - place).abs()).exp()
        return _placed(m[None], self.order)


@exportable
@dataclass(frozen=True, eq=False)
class Gated:
    """The exponential of the links between two tokens (gated linear attention, Yang et al. 2024; Mamba-2, Dao and Gu 2024).

    Entry p of ``log_alpha [B, N, H]`` is the link from token p - 1 to p; entry 0 acts on an initial state alone. Keys behind the
    query take the links of ``log_alpha_backward``, the same tensor where it is None. ``[B, N, H, F]`` (a rate for each feature)
    is for causal calls. ``order [N]`` int32: the token at each place of a chain; links stay with their tokens. Packed sequences
    have no B.
    """

    log_alpha: Tensor
    log_alpha_backward: Tensor | None = None
    order: Tensor | None = None

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, N, N]``; of rates for each feature ``[B, H, N, N, F]``, right for the keys up to the query alone."""
        found = []
        for links in (self.log_alpha, self.log_alpha if self.log_alpha_backward is None else self.log_alpha_backward):
            links = _wide(links) if self.order is None else _wide(links)[:, self.order.long()]  # [B, N, H, ...]
            along = (
                torch.cat((torch.zeros_like(links[:, :1]), links[:, 1:]), 1).cumsum(1).transpose(1, 2)
            )  # [B, H, N, ...]
            found.append(along[:, :, :, None] - along[:, :, None])  # [B, H, N, N, ...]
        at = torch.arange(q.shape[1], device=q.device)
        later = (at[:, None] < at).reshape(len(at), len(at), *(1,) * (found[0].dim() - 4))
        return _placed(torch.where(later, -found[1], found[0]).exp(), self.order)


@exportable
@dataclass(frozen=True, eq=False)
class Manhattan:
    """``exp(rate_h (|dy| + |dx|))`` on a grid, ``rate [H]`` (RMT, Fan et al. 2024), or a pair of rates for rows and columns."""

    rate: Tensor | tuple[Tensor, Tensor]
    grid: tuple[int, int]

    @property
    def rates(self) -> tuple[Tensor, Tensor]:
        return self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[1, H, N, N]``."""
        place = bias.coordinates(self.grid, q.device)
        rows, columns = ((place[:, None, axis] - place[:, axis]).abs() for axis in (0, 1))  # [N, N]
        of_rows, of_columns = (_wide(r)[:, None, None] for r in self.rates)
        return (of_rows * rows + of_columns * columns).exp()[None]


@exportable
@dataclass(frozen=True, eq=False)
class Polyline:
    """The exponential of the links along the query's row and then the key's column, ``paths="row_first"`` (PPMA, Zhao et al. 2025);
    ``"col_first"`` goes along the query's column and the key's row, ``"both"`` is their mean.

    ``row, col [B, Hs, Ws, H]``: ``row[y, x]`` is the link of (y, x) with its left, ``col[y, x]`` with its upper neighbour.
    """

    row: Tensor
    col: Tensor
    grid: tuple[int, int]
    paths: str = "both"

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, H, N, N]``."""
        m = mask(_wide(self.row), _wide(self.col)).permute(0, 5, 1, 2, 3, 4).flatten(4).flatten(2, 3)  # [B, H, N, N]
        turned = m.transpose(2, 3)
        return {"row_first": m, "col_first": turned, "both": (m + turned) / 2}[self.paths]


Decay = Retention | Gated | Manhattan | Polyline
DECAYS = (Retention, Gated, Manhattan, Polyline)
