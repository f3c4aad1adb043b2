"""Sampled and hand-picked calls of cluster_tokens. A call returns the plan's map and lists, the index and the centres.

Labels must be equal to the last one, so that two distances that differ by rounding must not decide them: half of the
calls hold small integers, whose distances are exact in every dtype, and there ties are many; in the others ties are not
to be expected.
"""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern.testing.merge_tokens import view
from vitkern.testing.registry import Call, Entry, label


def clustered(x: Tensor, k: Any, *, backend: str | None = None, **options: Any) -> Any:
    """token_map, perm, offsets, lengths, centers, index."""
    centers, plan, index = vitkern.cluster_tokens(x, k, backend=backend, **options)
    return plan.token_map, plan.perm, plan.offsets, plan.lengths, centers.detach(), index


def make(
    number: int,
    batch: int,
    tokens: int,
    width: int,
    k: int,
    method: str,
    *,
    integers: bool = False,
    doubled: bool = False,
    mask: float | None = None,
    weight: bool = False,
    layout: str = "plain",
    shared: bool = False,
    **options: Any,
) -> Call:
    """`doubled`: the second half repeats the first; `mask`: the part that is real, the rest holding NaN; `shared`: one
    set of centers for the batch; "agglomerative" gets signs, whose cosines are exact for widths of 4, 16, 64."""
    g = torch.Generator().manual_seed(number)

    def values(*shape: int) -> Tensor:
        if integers and method == "agglomerative":
            return torch.randint(0, 2, shape, generator=g).double() * 2 - 1
        if integers:
            return torch.randint(-3, 4, shape, generator=g).double()
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = values(batch, tokens, width)
    if doubled:
        x[:, tokens - tokens // 2 :] = x[:, : tokens // 2]
    tensors = {"x": x}
    if method == "nearest":
        tensors["centers"] = values(1 if shared else batch, k, width)
    if weight:
        tensors["weight"] = torch.randint(1, 5, (batch, tokens), generator=g).double()
    if mask is not None:
        tensors["mask"] = torch.rand(batch, tokens, generator=g) < mask
        x[~tensors["mask"]] = math.nan
    if layout == "channels":
        tensors["x"] = x.movedim(1, -1).contiguous()

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {n: t.get(n) for n in ("centers", "weight", "mask")}
        x = view(layout, t["x"])
        count = None if method == "nearest" else min(k, x.shape[1])
        return (x, count), dict(options, method=method, **given)

    facts = {"B": batch, "N": tokens, "C": width, "k": k, "method": method, "integers": integers, "doubled": doubled}
    facts |= {"mask": mask, "weight": weight, "layout": layout, "shared": shared}
    text = label(number, facts | options)
    return Call(text, clustered, build, tensors, frozenset(("weight",)), seed=number)


def draw(rng: random.Random) -> Call:
    method = rng.choice(("nearest", "nearest", "dpc_knn", "dpc_knn", "dpc_knn", "kmedoids", "agglomerative"))
    integers = rng.random() < 0.5
    tokens = rng.choice((1, 2, 7, 33, 64, 100, 197)) if method != "agglomerative" else rng.choice((1, 2, 7, 33, 50))
    options: dict[str, Any] = {}
    if method == "nearest" and rng.random() < 0.4:
        options["threshold"] = rng.choice((0.0, 2.3, 5.3, 1e9))
    if method == "dpc_knn":
        options["k_neighbors"] = rng.choice((1, 2, 5, 5, 11, 40, 300))
    if method == "kmedoids":
        options["iters"] = rng.choice((0, 1, 5))
    if method == "agglomerative":
        options["linkage"] = rng.choice(("single", "complete") if integers else ("single", "complete", "average"))
    exact = integers or method == "nearest"
    return make(
        rng.randrange(2**31),
        rng.choice((1, 2, 3)),
        tokens,
        rng.choice((4, 16, 64)) if integers else rng.choice((17, 64, 100, 320)),
        min(tokens, rng.choice((1, 2, 5, 20, 70))) if method != "nearest" else rng.choice((1, 2, 5, 20, 70)),
        method,
        integers=integers,
        doubled=exact and rng.random() < 0.3,
        mask=rng.choice((None, None, 0.8, 0.3)),
        weight=method == "kmedoids" and rng.random() < 0.5,
        layout=rng.choice(("plain", "plain", "channels")),
        shared=rng.random() < 0.3,
        **options,
    )


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, 17, 8, 3, "nearest"),
        make(2, 2, 26, 8, 4, "dpc_knn", integers=True),
        make(3, 2, 30, 17, 5, "dpc_knn", mask=0.7, k_neighbors=3),
        make(4, 2, 13, 8, 4, "agglomerative", mask=0.8),
        make(5, 2, 29, 4, 5, "kmedoids", integers=True, mask=0.8),
        make(6, 2, 40, 8, 6, "nearest", integers=True, threshold=3.0, mask=0.8, layout="channels"),
        make(7, 2, 12, 16, 3, "agglomerative", integers=True, linkage="single"),
        make(8, 1, 1, 3, 1, "dpc_knn"),
        make(9, 2, 24, 16, 5, "kmedoids", weight=True, iters=2),
        make(10, 0, 12, 8, 3, "dpc_knn"),
        make(11, 2, 12, 4, 12, "dpc_knn", integers=True, doubled=True, k_neighbors=40),
        make(12, 2, 60, 65, 20, "nearest", integers=True, shared=True),
        make(13, 2, 9, 16, 4, "dpc_knn", integers=True, mask=0.2),
        make(14, 2, 12, 16, 3, "agglomerative", integers=True, linkage="complete", doubled=True),
    ]


def sizes() -> list[Call]:
    return [make(1, 3, tokens, 8, 4, "dpc_knn", mask=0.8) for tokens in (17, 30, 41)]


ENTRIES = (Entry("cluster_tokens", draw, small, sizes, gradient=False),)
