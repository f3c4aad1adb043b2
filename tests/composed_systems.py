"""Published systems on masks and biases that take several calls, or sums and scans beside attention. As masked_systems.py."""

import math

import torch
import torch.nn.functional as F
from masked_systems import D, System, normal, qkv, scores, softmax, system, weigh
from windowed_systems import SYSTEMS, named

import vitkern
from vitkern import Rope, bias, decay, mask, modulation

__all__ = ["SYSTEMS"]

# masks and biases ----------------------------------------------------------------------------------------------------------


@system
def partial_former() -> System:
    """The scores of one layer are a bias of the next."""
    drawn = qkv(9) | named("xyz", 2, 9, 2, 8, seed=5)

    def ours(t, backend):
        first, stats = vitkern.attention(*(t[n] for n in "qkv"), return_stats=("logits",))
        return first, vitkern.attention(t["x"], t["y"], t["z"], bias=stats.logits.to(t["x"].dtype), backend=backend)

    def formula(t):
        s = scores(t["q"], t["k"])
        return softmax(s, t["v"]), softmax(scores(t["x"], t["y"]) + s, t["z"])

    return System(drawn, ours, formula)


@system
def ppgt() -> System:
    """A Gaussian kernel of the keys' norms with a width per head, pair terms added and multiplied."""
    drawn = qkv(9) | {
        "sigma": normal(2, seed=5),
        "added": normal(2, 2, 9, 9, seed=6),
        "factor": normal(2, 2, 9, 9, seed=7),
    }

    def keys(t):
        return -0.5 * t["sigma"][:, None] * t["k"].square().sum(-1).transpose(1, 2) / math.sqrt(8)  # [B, H, N]

    def ours(t, backend):
        factor = modulation.ElementwiseMask(1 + t["factor"], place="prob")
        terms = [bias.KeyBias(keys(t)), t["added"]]
        return vitkern.attention(*(t[n] for n in "qkv"), scale=1.0, bias=terms, modulation=factor, backend=backend)

    def formula(t):
        p = (scores(t["q"], t["k"], 1.0) + keys(t)[:, :, None] + t["added"]).softmax(-1)
        return weigh(p * (1 + t["factor"]), t["v"])

    return System(drawn, ours, formula)


@system
def lr_former() -> System:
    """softmax(-a |q - k|^2): the part of q alone falls out of the softmax."""
    drawn = qkv(9) | {"a": torch.tensor(0.3, dtype=D)}

    def ours(t, backend):
        keys = bias.KeyBias(-t["a"] * t["k"].square().sum(-1).transpose(1, 2))
        return vitkern.attention(*(t[n] for n in "qkv"), scale=2 * t["a"], bias=keys, backend=backend)

    def formula(t):
        distance = (t["q"][:, :, None] - t["k"][:, None]).square().sum(-1).permute(0, 3, 1, 2)
        return softmax(-t["a"] * distance, t["v"])

    return System(drawn, ours, formula)


@system
def easy_control() -> System:
    """Condition queries see their own condition; text and noise see all, and what is cached."""
    group = torch.tensor([[0] * 6 + [1] * 3 + [2] * 3])
    allow = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 1]]).bool()
    drawn = qkv(12) | named("xy", 2, 5, 2, 8, seed=5)

    def ours(t, backend):
        seen, cache = mask.Segments(group, group, allow), (t["x"], t["y"])
        return vitkern.attention(*(t[n] for n in "qkv"), mask=seen, extra_kv=cache, backend=backend)

    def formula(t):
        seen = F.pad(allow[group[0]][:, group[0]], (0, 5), value=True)
        k, v = torch.cat((t["k"], t["x"]), 1), torch.cat((t["v"], t["y"]), 1)
        return softmax(scores(t["q"], k), v, seen)

    return System(drawn, ours, formula)


@system
def mbt() -> System:
    """Each modality with copies of the latents, packed; the copies are averaged afterwards."""
    ends = torch.tensor([0, 10, 18], dtype=torch.int32)
    drawn = {"a": normal(7, 2, 8), "b": normal(5, 2, 8, seed=1), "l": normal(3, 2, 8, seed=2)}

    def parts(out):
        return out[:7], out[10:15], (out[7:10] + out[15:]) / 2

    def ours(t, backend):
        x = torch.cat((t["a"], t["l"], t["b"], t["l"]))
        return parts(vitkern.attention_varlen(x, x, x, ends, ends, 10, 10, backend=backend))

    def formula(t):
        sequences = [torch.cat((t[n], t["l"]))[None] for n in "ab"]
        return parts(torch.cat([softmax(scores(x, x), x)[0] for x in sequences]))

    return System(drawn, ours, formula)


@system
def enhanced_vit() -> System:
    """A learned temperature, the own token hidden, rotary positions."""
    drawn = qkv(9) | {"tau": torch.tensor(0.4, dtype=D), "angle": normal(1, 9, 1, 4, seed=5)}

    def ours(t, backend):
        rope = Rope(t["angle"].cos(), t["angle"].sin(), "half")
        given = {"scale": t["tau"], "mask": mask.NoSelf(), "rope": rope}
        return vitkern.attention(*(t[n] for n in "qkv"), **given, backend=backend)

    def formula(t):
        c, s = t["angle"].cos(), t["angle"].sin()
        q, k = (
            torch.cat((x[..., :4] * c - x[..., 4:] * s, x[..., 4:] * c + x[..., :4] * s), -1) for x in (t["q"], t["k"])
        )
        return softmax(t["tau"] * scores(q, k, 1.0), t["v"], ~torch.eye(9).bool())

    return System(drawn, ours, formula)


@system
def mvs_former() -> System:
    """A scale that grows with the length, and the weights of the class token."""
    scale = 8**-0.5 * math.log(9) / math.log(20)

    def ours(t, backend):
        given = {"scale": scale, "return_stats": ("row",), "stat_rows": (0,)}
        out, stats = vitkern.attention(*(t[n] for n in "qkv"), **given, backend=backend)
        return out, stats.row.to(out.dtype)

    def formula(t):
        p = scores(t["q"], t["k"], scale).softmax(-1)
        return weigh(p, t["v"]), p[:, :, :1]

    return System(qkv(9), ours, formula)


@system
def mavors() -> System:
    """One rotary index for a chunk of four tokens; grouped queries."""
    drawn = qkv(12, heads=4, kv=2) | {"angle": normal(1, 3, 1, 4, seed=5)}

    def ours(t, backend):
        of_token = t["angle"].repeat_interleave(4, 1)
        rope = Rope(of_token.cos(), of_token.sin(), "half")
        return vitkern.attention(*(t[n] for n in "qkv"), rope=rope, backend=backend)

    def formula(t):
        chunk = torch.arange(12) // 4
        c, s = t["angle"].cos()[:, chunk], t["angle"].sin()[:, chunk]
        q, k = (
            torch.cat((x[..., :4] * c - x[..., 4:] * s, x[..., 4:] * c + x[..., :4] * s), -1) for x in (t["q"], t["k"])
        )
        return softmax(scores(q, k), t["v"])

    return System(drawn, ours, formula)


@system
def lvsm() -> System:
    """Queries and keys divided by their root mean square, with learned gains."""
    drawn = qkv(9) | {"of_q": normal(8, seed=5), "of_k": normal(8, seed=6)}

    def ours(t, backend):
        q, k = (F.rms_norm(t[n], (8,), t[f"of_{n}"], 1e-6) for n in "qk")
        return vitkern.attention(q, k, t["v"], backend=backend)

    def formula(t):
        q, k = (t[n] / (t[n].square().mean(-1, keepdim=True) + 1e-6).sqrt() * t[f"of_{n}"] for n in "qk")
        return softmax(scores(q, k), t["v"])

    return System(drawn, ours, formula)


@system
def wide_attention() -> System:
    """Very many heads of two channels, with a softmax and without."""

    def ours(t, backend):
        q, k, v = (t[n] for n in "qkv")
        whole = vitkern.attention(q, k, v, backend=backend)
        return whole, vitkern.linear_attention(q, k, v, feature_map="elu1", backend=backend)

    def formula(t):
        s = torch.einsum("bihd,bjhd->bhij", F.elu(t["q"]) + 1, F.elu(t["k"]) + 1)
        return softmax(scores(t["q"], t["k"]), t["v"]), weigh(s / (s.sum(-1, keepdim=True) + 1e-6), t["v"])

    return System(qkv(33, heads=64, d=2), ours, formula)


@system
def arc_encoder() -> System:
    """Queries are means of four tokens; the keys stay."""

    def pooled(t):
        return t["q"].unflatten(1, (3, 4)).mean(2)

    def ours(t, backend):
        return vitkern.attention(pooled(t), t["k"], t["v"], backend=backend)

    return System(qkv(12), ours, lambda t: softmax(scores(pooled(t), t["k"]), t["v"]))


# sums and scans ------------------------------------------------------------------------------------------------------------


@system
def transform_matcher() -> System:
    """Additive attention over many matches: a softmax pools the queries to one, and their products with the keys to one."""
    drawn = named("xk", 2, 50, 2, 4) | named("ab", 1, 1, 2, 4, seed=5)

    def both(t, attend):
        probes = [t[n].expand(2, -1, -1, -1) for n in "ab"]
        pooled = attend(probes[0], t["x"], t["x"])
        product = pooled * t["k"]
        return pooled, attend(probes[1], product, product)

    return System(
        drawn,
        lambda t, backend: both(t, lambda q, k, v: vitkern.attention(q, k, v, backend=backend)),
        lambda t: both(t, lambda q, k, v: softmax(scores(q, k), v)),
    )


@system
def lion() -> System:
    """Voxels in the order of their windows, scanned in packed groups of equal size."""
    cells = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(3))
    order = vitkern.window_order(F.pad(cells, (1, 0)), (4, 4, 4), major="x")[0].long()
    ends = torch.tensor([0, 16, 32, 40], dtype=torch.int32)
    drawn = {"u": normal(40, 6), "delta": normal(40, 6, seed=1).abs(), "A": -normal(6, 3, seed=2).abs()}
    drawn |= named("BC", 40, 3, seed=3)

    def ours(t, backend):
        given = (t["u"][order], t["delta"][order], t["A"], t["B"][order], t["C"][order])
        return vitkern.selective_scan(*given, cu_seqlens=ends, backend=backend)

    def formula(t):
        rows = []
        for first, last in ((0, 16), (16, 32), (32, 40)):
            state = torch.zeros_like(t["A"])
            for i in order[first:last]:
                gain = t["delta"][i]
                state = (gain[:, None] * t["A"]).exp() * state + (gain * t["u"][i])[:, None] * t["B"][i]
                rows.append(state @ t["C"][i])
        return torch.stack(rows)

    return System(drawn, ours, formula)


@system
def diffusion_rwkv() -> System:
    """Bi-WKV: sums that decay on both sides, the own token with a bonus; numerator and denominator are one call."""
    n = 20
    drawn = {"k": normal(2, n, 5), "v": normal(2, n, 5, seed=1), "w": normal(5, seed=2).abs(), "u": normal(5, seed=3)}

    def ours(t, backend):
        k = t["k"] - t["k"].detach().amax(1, keepdim=True)
        ones, values = torch.ones_like(k)[..., None], torch.stack((t["v"], torch.ones_like(k)), -1)
        given = {"feature_map": "identity", "normalizer": "none", "decay": decay.Retention(-t["w"] / n)}
        near = k.exp()[..., None] * values
        sums = vitkern.linear_attention(ones, k.exp()[..., None], values, **given, backend=backend) - near
        sums = sums * (t["w"] / n).exp()[:, None] + near * t["u"].exp()[:, None]
        return sums[..., 0] / sums[..., 1]

    def formula(t):
        far = (torch.arange(n)[:, None] - torch.arange(n)).abs()[None, :, :, None]
        s = torch.where(far == 0, (t["u"] + t["k"])[:, None], t["k"][:, None] - (far - 1) * t["w"] / n)
        return (s.softmax(2) * t["v"][:, None]).sum(2)

    return System(drawn, ours, formula)
