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

NAMES = ("relu", "elu1", "identity", "leaky_relu", "softmax", "silu_norm")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        y = (x.relu() + 1e-6) / softplus(self.scale.to(x.dtype)).reshape(x.shape[2:])  # [S, N, H, D]
        dims = (2, 3) if self.norm == "width" else (3,)
        top = y.detach().amax(
            dims, keepdim=True
        )  # [S, N, 1|H, 1]: the power of what is far below it may underflow, not its norm
        u = (y / top) ** self.power  # [S, N, H, D]
        lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (y, u)]  # [S, N, 1|H, 1]
        return u * (lengths[0] / lengths[1])


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
        y = x / softplus(self.scale.to(x.dtype)).reshape(x.shape[2:])  # [S, N, H, D]
        power = self.power.to(x.dtype).reshape(x.shape[2:]).expand_as(y)  # [S, N, H, D]
        parts = []
        for part in (y, -y):
            up = part > 0
            parts.append(torch.where(up, part, 1.0).pow(torch.where(up, power, 1.0)).masked_fill(~up, 0.0))
        return torch.cat(parts, -1)  # [S, N, H, 2 D]


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
        y = torch.einsum("snhd,hfd->snhf", x, self.weight.to(x.dtype))
        if self.bias is not None:
            y = y + self.bias.to(x.dtype)
        both = torch.cat((y, -y), -1)  # [S, N, H, 2 F]
        if self.form == "joint":
            return (2 * both).softmax(-1)
        if self.form == "split":
            return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp(min=self.eps)
        return (both - both.amax(-1, keepdim=True)).exp()


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
        x = x * x.shape[-1] ** -0.25
        y = x @ self.omega.to(x.dtype).mT  # [S, N, H, m]
        if self.generalised:
            return y.relu() + 1e-3
        if side == "k":
            among = y if valid is None else y.masked_fill(~valid[..., None, None], -torch.inf)
            top = (
                among.detach().amax((1, 3), keepdim=True) if y.shape[1] else y.sum((1, 3), keepdim=True)
            )  # [S, 1, H, 1]
            top = top.masked_fill(top.isinf(), 0.0)
        else:
            top = y.detach().amax(3, keepdim=True)  # [S, N, H, 1]
        return ((y - x.square().sum(-1, keepdim=True) / 2 - top).exp() + self.eps) * len(self.omega) ** -0.5


class _StraightThrough(torch.autograd.Function):
    """The sign, whose gradient passes where the argument lies in (-1, 1)."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() < 1, g, 0.0)


@exportable
@dataclass(frozen=True, eq=False)
class Sign:
    """``sign(x)`` in {-1, 0, 1} (ShiftAddViT, You et al. 2023); straight-through gradient where ``|x| < 1``."""

    per_token: ClassVar[bool] = True

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        return _StraightThrough.apply(_wide(x))


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
        far = (x[..., None, :] - anchors).square().sum(-1)  # [S, N, H, M]
        if valid is None:
            spread = far.mean((1, 3), keepdim=True)  # [S, 1, H, 1]
        else:
            count = valid.sum(1).clamp(min=1).to(x.dtype)[:, None, None, None] * far.shape[3]
            spread = far.masked_fill(~valid[..., None, None], 0.0).sum((1, 3), keepdim=True) / count  # [S, 1, H, 1]
        kappa = (-far / (2 * spread)).exp() - mean  # [S, N, H, M]
        return _StraightThrough.apply(torch.einsum("snhm,hmb->snhb", kappa, matrix.expand(x.shape[2], -1, -1)))


OBJECTS = (Exp, Focused, Polar, Hedgehog, Favor, Sign, Hash)
