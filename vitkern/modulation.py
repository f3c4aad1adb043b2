"""Typed modulations: what multiplies or mixes the scores (``place="logit"``, before the biases) or the weights
(``place="prob"``, after the normaliser, never renormalised). ``.dense(q, k)`` is the factor, broadcastable to the scores
``[B, H, Nq, Nk]``; a modulation that mixes heads or replaces the softmax defines ``.apply`` instead."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern._export import exportable
from vitkern.bias import coordinates

MODES = ("exact", "published")


@exportable
@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """``sum_k alpha_kh exp(-d^2 / (2 (sigma_kh^2 + eps)))`` times the scores, d the distance on ``grid`` (GMM mask, 2024).

    ``sigma, alpha [K, H]``. Prefix tokens have the factor 1. ``mode="published"``: exp(-d^2) is raised to a power in
    float32 as in the published code, so that the term is 0 from d^2 = 104 on.
    """

    sigma: Tensor
    alpha: Tensor
    grid: tuple[int, int]
    prefix_tokens: int = 0
    eps: float = 1e-5
    mode: str = "exact"
    place = "logit"

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[H, N, N]``."""
        xy = coordinates(self.grid, q.device)
        factor = self.of_squares((xy[:, None] - xy[None, :]).square().sum(-1))  # [H, n, n]
        return torch.nn.functional.pad(factor, (self.prefix_tokens, 0, self.prefix_tokens, 0), value=1.0)

    def of_squares(self, square: Tensor) -> Tensor:
        """The factor ``[H, *]`` at these squared distances ``[*]``."""
        acc = torch.promote_types(self.sigma.dtype, torch.float32)
        square = square.to(acc)
        sigma, alpha = (
            t.to(acc).reshape(*t.shape, *[1] * square.dim()) for t in (self.sigma, self.alpha)
        )  # [K, H, 1 ...]
        width = 2 * (sigma.square() + self.eps)
        if self.mode == "published":
            gone = (-square).to(torch.float32).exp() == 0
            bells = (-square / width).exp().masked_fill(gone, 0.0)
        else:
            bells = (-square / width).exp()  # [K, H, *]
        return (alpha * bells).sum(0)


@exportable
@dataclass(frozen=True, eq=False)
class ElementwiseMask:
    """A learned factor of any score shape: on the scores, or with ``place="prob"`` on the weights (URPE, Luo et al. 2022)."""

    weight: Tensor
    place: str = "logit"

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        return self.weight


@exportable
@dataclass(frozen=True, eq=False)
class SoftCausal:
    """``ratio + (1 - ratio) [j <= i]`` times the weights (iLLaMA, Wang et al. 2024): the softmax runs over all keys. ``ratio``
    is a float or one element, with gradient."""

    ratio: float | Tensor
    place = "prob"

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[Nq, Nk]``."""
        i, j = (torch.arange(n, device=q.device) for n in (q.shape[1], k.shape[1]))
        acc = torch.promote_types(q.dtype, torch.float32)
        past = (j[None, :] <= i[:, None]).to(acc)
        return past + (1 - past) * self.ratio


@exportable
@dataclass(frozen=True, eq=False)
class TalkingHeads:
    """Heads mixed before and after the softmax (Shazeer et al. 2020; CaiT): ``s_g <- sum_h pre_weight[g, h] s_h + pre_bias[g]``
    on the scores, ``P_g <- sum_h post_weight[g, h] P_h + post_bias[g]`` on the weights of visible keys."""

    pre_weight: Tensor | None = None
    pre_bias: Tensor | None = None
    post_weight: Tensor | None = None
    post_bias: Tensor | None = None

    def apply(self, s: Tensor, place: str) -> Tensor:
        """The scores (``"logit"``) or weights (``"prob"``) ``[B, H, Nq, Nk]``, mixed."""
        weight, offset = (self.pre_weight, self.pre_bias) if place == "logit" else (self.post_weight, self.post_bias)
        if weight is not None:
            s = torch.einsum("gh,bhij->bgij", weight.to(s.dtype), s)
        return s if offset is None else s + offset.to(s.dtype)[:, None, None]


@exportable
@dataclass(frozen=True, eq=False)
class Policy:
    """Soft pruning in training (DynamicViT, Rao et al. 2021): in place of the softmax
    ``P_ij = (e_ij + eps / Nk) / (sum_j e_ij + eps)``, ``e_ij = exp(s_ij - max_j s_ij) M_ij``, ``M_ij = keep[b, j]`` and 1 on
    the diagonal. ``keep [B|1, Nk]`` with gradient; the maximum runs over all visible keys and counts as a constant."""

    keep: Tensor
    eps: float = 1e-6
    keep_diagonal: bool = True

    def apply(self, e: Tensor, visible: Tensor) -> Tensor:
        """The weights for ``e = exp(s - max)`` of ``[B, H, Nq, Nk]``, before what is hidden gets none."""
        m = self.keep.to(e.dtype)[:, None, None, :]  # [B|1, 1, 1, Nk]
        m = m.masked_fill(~visible & m.isnan(), 0.0)
        if self.keep_diagonal:
            m = m + (1 - m) * self._diagonal(e)
        e = e * m
        total = e.sum(-1, keepdim=True) + self.eps
        total = total.masked_fill(~visible.any(-1, keepdim=True), 1.0)  # never 0: finite gradients
        return (e + self._share(e)) / total

    def _share(self, e: Tensor) -> float | Tensor:
        """What every weight gets."""
        return self.eps / max(1, e.shape[3])

    def _diagonal(self, e: Tensor) -> Tensor:
        """1 where a query meets the key of its own place, ``[Nq, Nk]``."""
        return torch.eye(e.shape[2], e.shape[3], dtype=e.dtype, device=e.device)
