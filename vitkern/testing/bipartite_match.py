"""Sampled and hand-picked calls of bipartite_match.

Two partners whose similarities differ by rounding are equally right. So a call returns the score, the similarity to the
chosen partner (worked out again in float64) and the roles; the partner itself only where integer metrics make every
product exact.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.registry import Call, Entry, label


def judged(
    metric: Tensor, *, exact: bool, similarity: str = "cosine", backend: str | None = None, **options: Any
) -> Any:
    """score, similarity to the chosen partner (0 for a token that has none and names itself, else NaN), role, and dst."""
    found = vitkern.bipartite_match(metric, similarity=similarity, backend=backend, **options)
    m = metric.detach().double()
    m = m.mean(2) if m.dim() == 4 else m
    if similarity == "cosine":
        m = m / m.square().sum(-1, keepdim=True).sqrt().clamp(min=options.get("eps", 1e-12))
    partner = m.gather(1, found.dst.long()[..., None].expand(m.shape))
    itself = found.dst == torch.arange(m.shape[1], device=m.device)
    attained = torch.where(found.score > -math.inf, (m * partner).sum(-1), torch.where(itself, 0.0, math.nan))
    return found.score, attained.float(), found.role, *((found.dst,) if exact else ())


def make(
    number: int,
    batch: int,
    tokens: int,
    width: int,
    *,
    heads: int | None = None,
    integers: bool = False,
    damage: str = "none",
    partition: str = "alternate",
    mask: bool = False,
    protect: int | str = 1,
    segments: int = 0,
    strided: bool = False,
    **options: Any,
) -> Call:
    """`damage`: none, zero, nan, inf (some rows), same (all rows equal); `partition`: also index, batch index, pair."""
    g = torch.Generator().manual_seed(number)
    shape = (batch, tokens, width) if heads is None else (batch, tokens, heads, width)
    metric = torch.randn(shape, generator=g, dtype=torch.float64)
    if integers:
        metric = torch.randint(-4, 5, shape, generator=g).double()
        options["similarity"] = "dot"
    if damage == "same":
        metric = metric[:, :1].expand(shape).clone()
    elif damage != "none":
        hit = torch.rand(batch, tokens, generator=g) < 0.2
        metric[hit] = {"zero": 0.0, "nan": math.nan, "inf": math.inf}[damage]
    tensors = {"metric": metric}
    if strided:
        tensors["metric"] = torch.stack((metric, metric + 1), 2)
    if mask:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < 0.8
    if protect == "mask":
        tensors["protect"] = torch.rand(batch, tokens, generator=g) < 0.2
    if segments:
        tensors["segments"] = torch.randint(0, segments, (batch, tokens), generator=g)
    if partition in ("index", "batch index", "pair"):
        order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(batch if partition != "index" else 1)])
        tensors["index"] = order[:, : (2 * tokens) // 3] if partition == "pair" else order[:, : (tokens + 2) // 3]

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(options, exact=integers, protect=t.get("protect", protect), mask=t.get("mask"))
        kwargs["segments"] = t.get("segments")
        kwargs["partition"] = t.get("index", partition)
        if partition == "pair":
            half = t["index"].shape[1] // 2
            kwargs["partition"] = (t["index"][:, :half], t["index"][:, half:])
        return (t["metric"].select(2, 0) if strided else t["metric"],), kwargs

    facts = {"B": batch, "N": tokens, "C": width, "H": heads, "integers": integers, "damage": damage}
    facts |= {"partition": partition, "mask": mask, "protect": protect, "segments": segments, "strided": strided}
    text = label(number, facts | options)
    return Call(text, judged, build, tensors, seed=number)


def draw(rng: random.Random) -> Call:
    rows, columns = rng.randint(1, 14), rng.randint(1, 14)
    tokens = rng.choice((rows * columns, rows * columns + 1, rows * columns + 5))
    options: dict[str, Any] = {}
    partition = rng.choice(("alternate", "alternate", "random2d", "index", "batch index", "pair"))
    if partition == "random2d":
        options |= {"stride": (rng.randint(1, 3), rng.randint(1, 3)), "seed": rng.randrange(2**40)}
    window = rng.choice((None, None, None, rng.randint(0, 20), (rng.randint(0, 3), rng.randint(0, 3))))
    if window is not None:
        options["window"] = window
    if partition == "random2d" or isinstance(window, tuple):
        options["grid"] = (rows, columns)
    integers = rng.random() < 0.4
    heads = rng.choice((None, None, 1, 4)) if not integers else None
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.choice((1, 3, 16, 17, 64, 100, 320)),
        heads=heads,
        integers=integers,
        damage=rng.choice(("none", "none", "zero", "nan", "inf", "same")) if heads is None else "none",
        partition=partition,
        mask=rng.random() < 0.3,
        protect=rng.choice((0, 1, 2, 5, "mask")),
        segments=rng.choice((0, 0, 1, 3)),
        strided=rng.random() < 0.3,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 17, 8),
        make(2, 2, 26, 8, integers=True),
        make(3, 2, 30, 65, integers=True, damage="same", protect=0),
        make(4, 2, 29, 4, partition="random2d", grid=(4, 7), damage="zero", seed=7),
        make(5, 3, 20, 8, heads=3, mask=True, segments=2, strided=True),
        make(6, 2, 40, 8, integers=True, window=3, damage="nan", protect=5),
        make(7, 2, 37, 8, partition="batch index", window=(1, 2), grid=(6, 6), damage="inf"),
        make(8, 1, 1, 3, protect=0),
        make(9, 2, 24, 16, partition="pair", protect="mask", integers=True),
        make(10, 0, 12, 8),
        make(11, 2, 12, 8, protect=12),
        make(12, 1, 60, 8, partition="index", similarity="dot"),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, tokens, 8, heads=2, mask=True, partition="index") for tokens in (17, 30, 41)]


ENTRIES = (Entry("bipartite_match", draw, small, sizes, gradient=False),)
