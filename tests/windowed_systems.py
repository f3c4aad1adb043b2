"""Published systems on windows and small groups of tokens, some of several calls. As masked_systems.py."""

import math

import torch
import torch.nn.functional as F
from biased_systems import SYSTEMS
from masked_systems import System, normal, qkv, scores, softmax, system, weigh
from torch import Tensor

import vitkern
from vitkern import DepthwiseValue, bias

__all__ = ["SYSTEMS"]


def named(letters: str, *shape: int, seed: int = 0) -> dict[str, Tensor]:
    return {letter: normal(*shape, seed=seed + i) for i, letter in enumerate(letters)}


def windows(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, Hs, Ws, H, D]` as `[B · windows, N, H, D]`."""
    cut = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # [B, nH, nW, h, w, H, D]
    return cut.flatten(3, 4).flatten(0, 2)


def joined(x: Tensor, batch: int, rows: int, height: int, width: int) -> Tensor:
    """The inverse of `windows`; rows of windows."""
    cut = x.unflatten(1, (height, width)).unflatten(0, (batch, rows, -1)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)


def convolved(v: Tensor, weight: Tensor) -> Tensor:
    """A depthwise convolution of a map `[B, Hs, Ws, H, D]` with zeros around it."""
    maps = v.flatten(3).permute(0, 3, 1, 2)
    out = F.conv2d(maps, weight, padding=weight.shape[-1] // 2, groups=maps.shape[1])
    return out.permute(0, 2, 3, 1).unflatten(3, v.shape[3:])


def table_bias(table: Tensor, height: int, width: int) -> Tensor:
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    row = (y[:, None] - y + height - 1) * (2 * width - 1) + x[:, None] - x + width - 1
    return table[row].permute(2, 0, 1)


@system
def craft() -> System:
    """Half of the heads in windows (4, 2) with shift (2, 1), half in (2, 4) with (1, 2), each with a table; plus a convolution."""
    shapes, shifts = [(4, 2), (2, 4)], [(2, 1), (1, 2)]
    drawn = named("qkv", 2, 8, 12, 4, 4) | named("ab", 21, 2, seed=4) | {"w": normal(16, 1, 3, 3, seed=7)}

    def ours(t, backend):
        tables = bias.PerHeadGroup((bias.RelativePosition(t["a"]), bias.RelativePosition(t["b"])))
        added = DepthwiseValue(t["w"])
        return vitkern.window_attention(
            *(t[n] for n in "qkv"), shapes, shifts, bias=tables, mask_value=-math.inf, lepe=added, backend=backend
        )

    def half(t, g):
        (h, w), shift = shapes[g], shifts[g]
        q, k, v = (t[n][..., 2 * g : 2 * g + 2, :].roll((-shift[0], -shift[1]), (1, 2)) for n in "qkv")
        region = torch.zeros(8, 12).long()
        region[8 - shift[0] :] += 1
        region[:, 12 - shift[1] :] += 2
        region[: 8 - h, : 12 - w] = 0
        place = windows(region[None, ..., None, None], h, w)[:, :, 0, 0]  # [windows, N]
        seen = (place[:, None] == place[:, :, None])[:, None].repeat(2, 1, 1, 1)
        s = scores(windows(q, h, w), windows(k, h, w)) + table_bias(t["ab"[g]], h, w)
        out = joined(softmax(s, windows(v, h, w), seen), 2, 8 // h, h, w)
        return out.roll(shift, (1, 2))

    return System(drawn, ours, lambda t: torch.cat((half(t, 0), half(t, 1)), -2) + convolved(t["v"], t["w"]))


@system
def vidt() -> System:
    """Patches in windows; detection tokens under one softmax over themselves and the patches."""
    drawn = named("qkv", 2, 5, 2, 8) | named("xyz", 2, 6, 6, 2, 8, seed=4) | {"table": normal(25, 2, seed=9)}

    def ours(t, backend):
        table = bias.RelativePosition(t["table"])
        patches = vitkern.window_attention(t["x"], t["y"], t["z"], 3, bias=table, backend=backend)
        further = tuple(t[n].flatten(1, 2) for n in "yz")
        return patches, vitkern.attention(*(t[n] for n in "qkv"), extra_kv=further, backend=backend)

    def formula(t):
        x, y, z = (windows(t[n], 3, 3) for n in "xyz")
        patches = joined(softmax(scores(x, y) + table_bias(t["table"], 3, 3), z), 2, 2, 3, 3)
        k, v = (torch.cat((t[a], t[b].flatten(1, 2)), 1) for a, b in ("ky", "vz"))
        return patches, softmax(scores(t["q"], k), v)

    return System(drawn, ours, formula)


@system
def sg_former() -> System:
    """Pooled keys and windows, side by side; the significance of a key is the mean weight it receives; plus a convolution."""
    drawn = named("qkv", 2, 6, 6, 2, 8) | {"w": normal(16, 1, 3, 3, seed=7)}

    def pooled(x):
        return x.unflatten(2, (3, 2)).unflatten(1, (3, 2)).mean((2, 4)).flatten(1, 2)

    def ours(t, backend):
        few = [pooled(t[n]) for n in "kv"]
        out, stats = vitkern.attention(t["q"].flatten(1, 2), *few, return_stats=("key_mean",), backend=backend)
        near, local = vitkern.window_attention(
            *(t[n] for n in "qkv"), 3, lepe=DepthwiseValue(t["w"]), return_stats=("key_mean",), backend=backend
        )
        return out, stats.key_mean.to(out.dtype), near, local.key_mean.to(out.dtype)

    def formula(t):
        p = scores(t["q"].flatten(1, 2), pooled(t["k"])).softmax(-1)
        q, k, v = (windows(t[n], 3, 3) for n in "qkv")
        local = scores(q, k).softmax(-1)
        near = joined(weigh(local, v), 2, 2, 3, 3) + convolved(t["v"], t["w"])
        received = joined(local.mean(2).transpose(1, 2)[..., None], 2, 2, 3, 3)[..., 0]
        return weigh(p, pooled(t["v"])), p.mean(2).transpose(1, 2), near, received

    return System(drawn, ours, formula)


@system
def favit() -> System:
    """Channels in parts of 2 : 7 : 7 with one head each; 49 keys; the values gain a convolution of themselves."""
    parts = (4, 14, 14)
    drawn = {"q": normal(2, 60, 1, 32), "k": normal(2, 49, 1, 32, seed=1), "v": normal(2, 49, 1, 32, seed=2)}
    drawn["w"] = normal(32, 1, 3, 3, seed=3)

    def split(t):
        return zip(*(t[n].split(parts, -1) for n in "qkv"), t["w"].split(parts), strict=True)

    def ours(t, backend):
        outs = []
        for q, k, v, w in split(t):
            values = v + DepthwiseValue(w, grid=(7, 7)).of(v, backend=backend)
            outs.append(vitkern.attention(q, k, values, backend=backend))
        return torch.cat(outs, -1)

    def formula(t):
        return torch.cat(
            [softmax(scores(q, k), v + convolved(v.unflatten(1, (7, 7)), w).flatten(1, 2)) for q, k, v, w in split(t)],
            -1,
        )

    return System(drawn, ours, formula)


@system
def swin_3d() -> System:
    """Padded windows of 5, 7 and 3 voxels: contextual terms of position and of colour, and tables on the values."""
    seen = (torch.arange(7) < torch.tensor([5, 7, 3])[:, None])[:, None, None]
    index = [torch.randint(0, 6, (3, 7, 7), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    drawn = qkv(7, batch=3) | named("abcdef", 6, 2, 8, seed=4)

    def ours(t, backend):
        values = (t["c"][:, None] + t["f"]).flatten(0, 1)  # one table of values for the pairs of indices
        terms = [
            bias.ContextualPosition(t["a"], t["b"], None, index[0]),
            bias.ContextualPosition(t["d"], t["e"], None, index[1]),
            bias.ContextualPosition(None, None, values, 6 * index[0] + index[1]),
        ]
        return vitkern.attention(*(t[n] for n in "qkv"), bias=terms, mask=seen, backend=backend)

    def formula(t):
        s, added = scores(t["q"], t["k"]), []
        for (a, b, c), i in zip(("abc", "def"), index, strict=True):
            s = (
                s
                + torch.einsum("bihd,bijhd->bhij", t["q"], t[a][i])
                + torch.einsum("bjhd,bijhd->bhij", t["k"], t[b][i])
            )
            added.append(t[c][i])
        p = s.masked_fill(~seen, -math.inf).softmax(-1)
        return weigh(p, t["v"]) + sum(torch.einsum("bhij,bijhd->bihd", p, values) for values in added)

    return System(drawn, ours, formula)


@system
def fit() -> System:
    """Groups of 8 tokens; latents of a group read it and write to it; all latents attend to each other."""
    drawn = named("qkv", 6, 8, 2, 8) | {"l": normal(6, 2, 2, 8, seed=5)}

    def all_of(t, attend):
        latents = t["l"].reshape(2, 6, 2, 8)
        q, k, v = (t[n] for n in "qkv")
        return attend(q, k, v), attend(t["l"], k, v), attend(q, t["l"], t["l"]), attend(latents, latents, latents)

    return System(
        drawn,
        lambda t, backend: all_of(t, lambda q, k, v: vitkern.attention(q, k, v, backend=backend)),
        lambda t: all_of(t, lambda q, k, v: softmax(scores(q, k), v)),
    )


@system
def attention_swin_unet() -> System:
    """The weights of every window come out, to be used in the decoder."""
    drawn = named("qkv", 2, 6, 6, 2, 8) | {"table": normal(25, 2, seed=9)}

    def ours(t, backend):
        table = bias.RelativePosition(t["table"])
        out, stats = vitkern.window_attention(
            *(t[n] for n in "qkv"), 3, bias=table, return_stats=("probs",), backend=None
        )
        return out, stats.probs.to(out.dtype)

    def formula(t):
        q, k, v = (windows(t[n], 3, 3) for n in "qkv")
        p = (scores(q, k) + table_bias(t["table"], 3, 3)).softmax(-1)
        return joined(weigh(p, v), 2, 2, 3, 3), p

    return System(drawn, ours, formula)
