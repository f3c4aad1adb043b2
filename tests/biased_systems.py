"""Published systems on attention and attention_varlen: biases, rotations and lengths. As masked_systems.py."""

import math

import torch
import torch.nn.functional as F
from masked_systems import SYSTEMS, D, System, normal, qkv, scores, softmax, system, weigh
from torch import Tensor

import vitkern
from vitkern import Rope, bias

__all__ = ["SYSTEMS"]

# biases --------------------------------------------------------------------------------------------------------------------


@system
def tome() -> System:
    drawn = qkv(8, 11) | {"size": normal(2, 11, seed=7).abs() + 1}
    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), bias=bias.KeyBias(t["size"].log()[:, None]), backend=backend
    )

    def formula(t):
        e = scores(t["q"], t["k"]).exp() * t["size"][:, None, None]
        return weigh(e / e.sum(-1, keepdim=True), t["v"])

    return System(drawn, ours, formula)


@system
def look_here() -> System:
    """Distance inside a field of view per head; the class token, without bias, stands behind the patches for them."""
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(3, dtype=D), torch.arange(4, dtype=D), indexing="ij"))
    dy, dx = y - y[:, None], x - x[:, None]  # key minus query
    seen = torch.stack((dx >= 0, dx <= 0, dy >= 0, (dy <= 0) & (dx.abs() <= -dy)))
    drawn = qkv(13, heads=4) | {"slope": normal(4, seed=8).abs()}

    def ours(t, backend):
        xy = torch.stack((y, x), -1)[None].to(t["q"].dtype)
        first = vitkern.attention(t["q"][:, :1], t["k"], t["v"], backend=backend)
        rest = vitkern.attention(
            *(t[n][:, 1:] for n in "qkv"), bias=bias.EuclideanDistance(t["slope"], xy, xy), mask=seen[None],
            extra_kv=(t["k"][:, :1], t["v"][:, :1]), backend=backend,
        )  # fmt: skip
        return torch.cat((first, rest), 1)

    def formula(t):
        far = -t["slope"][:, None, None] * (dy.square() + dx.square()).sqrt().to(t["q"].dtype)
        far = F.pad(far.masked_fill(~seen, -math.inf), (1, 0, 1, 0))
        return softmax(scores(t["q"], t["k"]) + far, t["v"])

    return System(drawn, ours, formula)


def buckets(offset: Tensor, alpha: float = 1.0, beta: float = 3.0, gamma: float = 8.0) -> Tensor:
    """iRPE's piecewise index: near offsets exact, far ones logarithmic."""
    size = offset.abs().double()
    far = alpha + (size.clamp(min=alpha) / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
    return torch.where(size <= alpha, offset, offset.sign() * far.round().clamp(max=beta).long())


@system
def irpe() -> System:
    """The product of the buckets of both axes: as a bias, and met by queries, keys and values."""
    y, x = torch.arange(15) // 5, torch.arange(15) % 5
    index = (buckets(y[:, None] - y) + 3) * 7 + buckets(x[:, None] - x) + 3
    drawn = qkv(15) | {"table": normal(49, 2, seed=3)}
    drawn |= {f"r_{n}": normal(49, h, 8, seed=4) / 2 for n, h in (("q", 2), ("k", 1), ("v", 2))}

    def ours(t, backend):
        context = bias.ContextualPosition(t["r_q"], t["r_k"], t["r_v"], index)
        biases = (bias.RelativePosition(t["table"], index.int()), context)
        return tuple(vitkern.attention(*(t[n] for n in "qkv"), bias=b, backend=backend) for b in biases)

    def formula(t):
        s = scores(t["q"], t["k"])
        r = {n: t[f"r_{n}"][index].expand(-1, -1, 2, -1) for n in "qkv"}
        met = s + torch.einsum("bihd,ijhd->bhij", t["q"], r["q"]) + torch.einsum("bjhd,ijhd->bhij", t["k"], r["k"])
        p = met.softmax(-1)
        out = weigh(p, t["v"]) + torch.einsum("bhij,ijhd->bihd", p, r["v"])
        return softmax(s + t["table"][index].permute(2, 0, 1), t["v"]), out

    return System(drawn, ours, formula)


@system
def better_rpe() -> System:
    """Shaw's clipped distances on q and k; DTrans: an index per sample, on k and v."""
    i = torch.arange(13)
    clipped = (i - i[:, None]).clamp(-3, 3) + 3
    own = torch.randint(0, 7, (2, 13, 13), generator=torch.Generator().manual_seed(0))
    drawn = qkv(13) | {n: normal(7, 1, 8, seed=i) / 2 for i, n in enumerate(("a_q", "a_k", "b_k", "b_v"), 5)}

    def ours(t, backend):
        shaw = bias.ContextualPosition(t["a_q"], t["a_k"], None, clipped)
        trans = bias.ContextualPosition(None, t["b_k"], t["b_v"], own)
        return tuple(vitkern.attention(*(t[n] for n in "qkv"), bias=b, backend=backend) for b in (shaw, trans))

    def formula(t):
        s = scores(t["q"], t["k"])
        a, b = t["a_q"][clipped, 0], t["a_k"][clipped, 0]  # [N, N, D]
        shaw = s + torch.einsum("bihd,ijd->bhij", t["q"], a) + torch.einsum("bjhd,ijd->bhij", t["k"], b)
        p = (s + torch.einsum("bjhd,bijd->bhij", t["k"], t["b_k"][own, 0])).softmax(-1)
        return softmax(shaw, t["v"]), weigh(p, t["v"]) + torch.einsum("bhij,bijd->bihd", p, t["b_v"][own, 0])

    return System(drawn, ours, formula)


@system
def plain_detr() -> System:
    """An MLP of the offsets to the box's edges gives every query a row and a column of biases per head."""
    grid = (5, 7)
    drawn = qkv(6, 35) | {"box": normal(2, 6, 4, seed=3) * 3, "w_y": normal(2, 2, seed=4), "w_x": normal(2, 2, seed=5)}

    def axes(t):
        """[B, Nq, H, gh] and [B, Nq, H, gw]."""
        for first, side, w in ((0, grid[0], "w_y"), (1, grid[1], "w_x")):
            edges = t["box"][..., first::2]  # [B, Nq, 2]
            delta = torch.arange(side, dtype=edges.dtype)[:, None] - edges[:, :, None]
            yield F.relu(delta @ t[w]).transpose(2, 3)

    def ours(t, backend):
        b = bias.DecomposedRelativePosition(*axes(t), None, grid)
        return vitkern.attention(*(t[n] for n in "qkv"), bias=b, backend=backend)

    def formula(t):
        y, x = axes(t)
        b = (y[..., :, None] + x[..., None, :]).flatten(3).transpose(1, 2)
        return softmax(scores(t["q"], t["k"]) + b, t["v"])

    return System(drawn, ours, formula)


@system
def ufc() -> System:
    """A matching cost as a bias that learns, and the head mean of the logits as an output that learns."""
    drawn = qkv(7, 12) | {"cost": normal(2, 1, 7, 12, seed=5)}

    def ours(t, backend):
        out, stats = vitkern.attention(
            *(t[n] for n in "qkv"), bias=t["cost"], return_stats=("logits_mean",), backend=backend
        )
        return out, stats.logits_mean.to(out.dtype)

    def formula(t):
        s = scores(t["q"], t["k"])
        return softmax(s + t["cost"], t["v"]), s.mean(1)

    return System(drawn, ours, formula)


@system
def relation_net() -> System:
    """Geometry sampled bilinearly, at the offsets of boxes, from one map that all pairs share."""
    place = normal(2, 9, 2, seed=4)
    drawn = qkv(9) | {"map": normal(1, 2, 8, 8, seed=5)}

    def geometry(t):
        apart = (place[:, :, None] - place[:, None]).to(t["map"].dtype).clamp(-3, 3) / 3  # [B, N, N, 2]
        return F.grid_sample(t["map"].expand(2, -1, -1, -1), apart, align_corners=False)

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), bias=geometry(t), backend=backend
    )
    return System(drawn, ours, lambda t: softmax(scores(t["q"], t["k"]) + geometry(t), t["v"]))


# rotations and lengths -----------------------------------------------------------------------------------------------------


def angles(grid: tuple[int, ...], width: int) -> Tensor:
    """[N, width / 2]: an equal share of the channels for every axis."""
    places = torch.cartesian_prod(*(torch.arange(n, dtype=D) for n in grid)).view(-1, len(grid))
    share = width // 2 // len(grid)
    frequency = 10.0 ** -(torch.arange(share, dtype=D) / share)
    return (places[..., None] * frequency).flatten(1)


def spun(x: Tensor, angle: Tensor) -> Tensor:
    """x [..., N, H, D] by angles [N, D / 2], channels in two halves, by the matrix of every pair."""
    a, b = x.chunk(2, -1)
    c, s = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


@system
def lavin_dit() -> System:
    """Grouped queries and a rotation of three axes."""
    angle = angles((2, 3, 2), 12)
    rope = Rope(angle.cos()[None, :, None], angle.sin()[None, :, None], "half")
    ours = lambda t, backend: vitkern.attention(*(t[n] for n in "qkv"), rope=rope, backend=backend)  # noqa: E731
    return System(
        qkv(12, heads=4, kv=2, d=12), ours, lambda t: softmax(scores(spun(t["q"], angle), spun(t["k"], angle)), t["v"])
    )


@system
def fit_v2() -> System:
    """Images of three sizes in one row: LayerNorm of queries and keys, a rotation of two axes; image after image in the formula."""
    grids = ((2, 3), (4, 2), (1, 1))
    lengths = [math.prod(g) for g in grids]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    each = [angles(g, 8) for g in grids]
    angle = torch.cat(each)
    rope = Rope(angle.cos()[None, :, None], angle.sin()[None, :, None], "half")
    total = sum(lengths)
    drawn = {n: normal(total, 2, 8, seed=i) for i, n in enumerate("qkv")}
    drawn |= {"w_q": normal(8, seed=3) + 1, "w_k": normal(8, seed=4) + 1}

    def normed(t):
        return (F.layer_norm(t[n], (8,), t[f"w_{n}"]) for n in "qk")

    def ours(t, backend):
        q, k = normed(t)
        most = max(lengths)
        return vitkern.attention_varlen(q, k, t["v"], bounds, bounds, most, most, rope=rope, backend=backend)

    def formula(t):
        q, k = normed(t)
        parts = []
        for a, q1, k1, v1 in zip(each, *(x.split(lengths) for x in (q, k, t["v"])), strict=True):
            parts.append(softmax(scores(spun(q1, a)[None], spun(k1, a)[None]), v1[None])[0])
        return torch.cat(parts)

    return System(drawn, ours, formula)
