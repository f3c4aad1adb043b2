"""Feature maps of linear attention that have parameters: small frozen dataclasses of tensors and numbers.

``map.dense(x, side, valid)`` is the definition: ``x [S, N, H, D]``, side ``"q"`` or ``"k"``, ``valid [S, N]`` bool or None, gives
``[S, N, H, F]`` in float32 (float64 for float64). ``per_token`` says that a token's features depend on that token alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vitkern._export import exportable
from vitkern.reference import linear_features

NAMES = ("relu", "elu1", "identity", "leaky_relu", "softmax", "silu_norm")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(t: Tensor, x: Tensor) -> Tensor:
    """A parameter of H D elements as [H, D], in the dtype of x [S, N, H, D]."""
    return t.to(x.dtype).reshape(x.shape[2:])


@exportable
@dataclass(frozen=True, eq=False)
class Exp:
    """``exp(rate x)`` (InLine attention, Han et al. 2024: rate 0.2)."""

    rate: float = 1.0
    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        return (self.rate * _wide(x)).exp()


@exportable
@dataclass(frozen=True, eq=False)
class Focused:
    """FLatten Transformer (Han et al. 2023): ``r = max(x, 0) + 1e-6``, ``y = r / softplus(scale)``, ``u = y^power``,
    ``phi = u |y| / |u|``. The norms run over all channels of a token, ``norm="width"`` as released, or over those of each
    head, ``"head"``. ``scale`` has H D elements, of any shape (``[1, 1, C]`` in the released code)."""

    scale: Tensor
    power: float = 3.0
    norm: str = "width"
    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        x = _wide(x)
        return linear_features.focused(x, softplus(_per_channel(self.scale, x)), self.power, self.norm == "width")


@exportable
@dataclass(frozen=True, eq=False)
class Polar:
    """PolaFormer (Meng et al. 2025): ``y = x / softplus(scale)`` in parts ``x+ = max(y, 0)^power`` and ``x- = max(-y, 0)^power``.
    The first half of v's channels is weighted by ``[q+, q-]``, the second by ``[q-, q+]``, both against ``[k+, k-]``, each with its
    own denominator. ``scale`` has H D elements, ``power`` H D (``1 + 4 sigmoid(p)`` as released), of any shape."""

    scale: Tensor
    power: Tensor
    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        """Of the queries ``[q+, q-]``; the other half of v takes its halves exchanged."""
        x = _wide(x)
        return linear_features.polar(x, softplus(_per_channel(self.scale, x)), _per_channel(self.power, x))


@exportable
@dataclass(frozen=True, eq=False)
class Hedgehog:
    """Learned features (Zhang et al. 2024) of ``y = W x + b``, ``weight [H, F, D]``, ``bias [H, F]``. Three maps bear the name:
    ``"joint"`` softmax over 2 F of ``[2 y, -2 y]``; ``"split"`` ``[softmax(y), softmax(-y)]``, each entry at least ``eps``;
    ``"exp"`` ``[exp(y - m), exp(-y - m)]`` with ``m = max |y|``."""

    weight: Tensor
    bias: Tensor | None = None
    form: str = "joint"
    eps: float = 1e-6
    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        x = _wide(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear_features.hedgehog(x, self.weight.to(x.dtype), bias, self.form, self.eps)


@exportable
@dataclass(frozen=True, eq=False)
class Favor:
    """Positive random features of the softmax kernel (Performer, Choromanski et al. 2021), ``omega [m, D]``, x scaled by
    ``D^-1/4``: ``m^-1/2 (exp(<omega, x> - |x|^2 / 2 - max) + eps)``, the maximum of ``<omega, x>`` over the features of a query,
    over features and valid tokens of the keys. ``generalised``: ``max(<omega, x>, 0) + 1e-3``."""

    omega: Tensor
    eps: float = 1e-4
    generalised: bool = False
    per_token: ClassVar[bool] = False

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        x = _wide(x)
        return linear_features.favor(x, self.omega.to(x.dtype), self.eps, self.generalised, side, valid)[0]


@exportable
@dataclass(frozen=True, eq=False)
class Sign:
    """``sign(x)`` in {-1, 0, 1} (ShiftAddViT, You et al. 2023); straight-through gradient where ``|x| < 1``."""

    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        return linear_features.straight_through(_wide(x))


@exportable
@dataclass(frozen=True, eq=False)
class Hash:
    """Kernelised hash codes (EcoFormer, Liu et al. 2022): ``sign(kappa A)``, ``kappa_m = exp(-|x - anchor_m|^2 / (2 sigma^2)) -
    mean_m``, ``sigma^2`` the mean of ``|x - anchor_m|^2`` over anchors and valid tokens. ``anchors [H|1, M, D]``,
    ``A [H|1, M, bits]``, ``mean [H|1, M]``. Straight-through gradient where ``|kappa A| < 1``."""

    anchors: Tensor
    A: Tensor
    mean: Tensor
    per_token: ClassVar[bool] = False

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        x = _wide(x)
        anchors, matrix, mean = (t.to(x.dtype) for t in (self.anchors, self.A, self.mean))
        return linear_features.hashed(x, anchors, matrix, mean, valid)[0]


OBJECTS = (Exp, Focused, Polar, Hedgehog, Favor, Sign, Hash)
