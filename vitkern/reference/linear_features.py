"""Feature maps of linear attention that have parameters, each the definition behind its class in `vitkern.feature_map`.

x [S, N, H, D] is float32 or float64, and so are the parameters.
"""

import torch
from torch import Tensor

NAMES = ("focused_width", "focused_head", "polar", "hedgehog_joint", "hedgehog_split", "hedgehog_exp", "favor", "favor_relu",
         "sign", "hash")  # fmt: skip


def width(name: str, d: int, map0: Tensor | None, map1: Tensor | None) -> int:
    """F, the number of features that a map makes of D channels."""
    if name == "polar":
        return 2 * d
    if name.startswith("hedgehog") and map0 is not None:
        return 2 * int(map0.shape[1])
    if name.startswith("favor") and map0 is not None:
        return int(map0.shape[0])
    return int(map1.shape[2]) if name == "hash" and map1 is not None else d


def kept_width(name: str, d: int) -> int:
    """How many numbers of each key head the forward keeps: the sums of "softmax", the largest key of "favor", the spreads of "hash"."""
    return {"softmax": d, "favor": 1, "hash": 2}.get(name, 0)


def features(
    x: Tensor,  # [S, N, H, D]
    side: str,  # "q" or "k"
    valid: Tensor | None,  # [S, N]: of the keys
    name: str,
    rate: float,  # the power of "focused", the eps of "hedgehog_split" and "favor"
    map0: Tensor | None,
    map1: Tensor | None,
    map2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """phi(x) [S, N, H, F], and what it rests on of all tokens [S, H, 0 or 1]."""
    nothing = x.new_empty((x.shape[0], x.shape[2], 0))  # [S, H, 0]
    if name == "sign":
        return straight_through(x), nothing
    if map0 is None:
        raise ValueError(f"linear_attention: the map {name!r} needs its parameters, got None")
    if name.startswith("focused"):
        return focused(x, map0, rate, name == "focused_width"), nothing
    if name.startswith("hedgehog"):
        return hedgehog(x, map0, map1, name.removeprefix("hedgehog_"), rate), nothing
    if name.startswith("favor"):
        found, top = favor(x, map0, rate, name == "favor_relu", side, valid)  # [S, N, H, m], [S, 1|N, H, 1]
        return found, top[:, 0] if name == "favor" and side == "k" else nothing
    if map1 is None or (name == "hash" and map2 is None):
        raise ValueError(f"linear_attention: the map {name!r} needs its parameters, got None")
    if name == "polar":
        return polar(x, map0, map1), nothing
    found, spread = hashed(x, map0, map1, map2, valid)  # type: ignore[arg-type]  # [S, N, H, bits], [S, 1, H, 1]
    return found, spread[:, 0]


def focused(x: Tensor, divisor: Tensor, power: float, by_token: bool) -> Tensor:
    """`divisor [H, D]`; the norms of a token run over all its channels, or over those of each head."""
    y = (x.relu() + 1e-6) / divisor  # [S, N, H, D]
    dims = (2, 3) if by_token else (3,)
    # the power of what is far below the largest may underflow, not its norm
    top = y.detach().amax(dims, keepdim=True)  # [S, N, 1|H, 1]
    u = (y / top) ** power  # [S, N, H, D]
    lengths = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (y, u)]  # [S, N, 1|H, 1]
    return u * (lengths[0] / lengths[1])  # [S, N, H, D]


def polar(x: Tensor, divisor: Tensor, power: Tensor) -> Tensor:
    """`divisor`, `power` [H, D]."""
    y = x / divisor  # [S, N, H, D]
    powers = power.expand_as(y)  # [S, N, H, D]
    parts = []
    for part in (y, -y):
        up = part > 0  # [S, N, H, D]
        parts.append(torch.where(up, part, 1.0).pow(torch.where(up, powers, 1.0)).masked_fill(~up, 0.0))
    return torch.cat(parts, -1)  # [S, N, H, 2 D]


def hedgehog(x: Tensor, weight: Tensor, bias: Tensor | None, form: str, eps: float) -> Tensor:
    """`weight [H, F, D]`, `bias [H, F]`."""
    y = torch.einsum("snhd,hfd->snhf", x, weight)  # [S, N, H, F]
    if bias is not None:
        y = y + bias  # [S, N, H, F]
    both = torch.cat((y, -y), -1)  # [S, N, H, 2 F]
    if form == "joint":
        return (2 * both).softmax(-1)
    if form == "split":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp(min=eps)
    return (both - both.amax(-1, keepdim=True)).exp()


def favor(
    x: Tensor, omega: Tensor, eps: float, generalised: bool, side: str, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`omega [m, D]`. Also the largest: of each query over features [S, N, H, 1], of keys over tokens and features [S, 1, H, 1]."""
    x = x * x.shape[-1] ** -0.25  # [S, N, H, D]
    y = x @ omega.mT  # [S, N, H, m]
    if generalised:
        return y.relu() + 1e-3, y
    if side == "k":
        among = y if valid is None else y.masked_fill(~valid[..., None, None], -torch.inf)  # [S, N, H, m]
        # [S, 1, H, 1]
        top = among.detach().amax((1, 3), keepdim=True) if y.shape[1] else y.detach().sum((1, 3), keepdim=True)
        top = top.masked_fill(top.isinf(), 0.0)  # [S, 1, H, 1]
    else:
        top = y.detach().amax(3, keepdim=True)  # [S, N, H, 1]
    return ((y - x.square().sum(-1, keepdim=True) / 2 - top).exp() + eps) * len(omega) ** -0.5, top


def straight_through(x: Tensor) -> Tensor:
    """The sign, whose gradient passes where x lies in (-1, 1)."""
    passed = torch.where(x.abs() < 1, x, 0.0)
    return x.detach().sign() + (passed - passed.detach())


def hashed(x: Tensor, anchors: Tensor, matrix: Tensor, mean: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`anchors [H|1, M, D]`, `matrix [H|1, M, bits]`, `mean [H|1, M]`. Also the spread [S, 1, H, 1]."""
    far = (x[..., None, :] - anchors).square().sum(-1)  # [S, N, H, M]
    if valid is None:
        count = far.new_full((1, 1, 1, 1), max(x.shape[1], 1) * far.shape[3])  # [1, 1, 1, 1]
        spread = far.sum((1, 3), keepdim=True) / count  # [S, 1, H, 1]
    else:
        count = valid.sum(1).clamp(min=1).to(x.dtype)[:, None, None, None] * far.shape[3]  # [S, 1, 1, 1]
        spread = far.masked_fill(~valid[..., None, None], 0.0).sum((1, 3), keepdim=True) / count  # [S, 1, H, 1]
    kappa = (-far / (2 * spread)).exp() - mean  # [S, N, H, M]
    return straight_through(torch.einsum("snhm,hmb->snhb", kappa, matrix.expand(x.shape[2], -1, -1))), spread
