"""Floating-point operations for ``torch.utils.flop_counter``: after ``import vitkern.flops`` a FlopCounterMode counts every op.

As torch counts its own attention: two operations for each multiply-add of a product, none for exponentials, masks and copies. A
backward of attention makes the scores anew and counts five products for the two of the forward; any other counts twice its
forward. Masks that skip tiles are not subtracted; a packed call counts its longest sequence of keys for every query. It is a
module of its own because torch's counter takes longer to import than vitkern.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import vitkern  # noqa: F401 -- defines the ops

Shape = Any


def _pairs(q: Shape, k: Shape, v: Shape, keys: int) -> int:
    """Scores and output of q [..., H, D] with so many keys each, and values of [..., Dv]."""
    return 2 * math.prod(q[:-1]) * keys * (q[-1] + v[-1])


def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return _pairs(q, k, v, names["max_k"] if names["cu_k"] is not None else k[1])


def _windows(sides: Any, window: Any) -> int:
    """Rows of all windows of a map, pads included."""
    return math.prod(-(-n // w) * w for n, w in zip(sides, window, strict=True))


def _window_attention(q: Shape, k: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    rows = (q[0], _windows(q[1:-2], names["window"]), *q[-2:])
    return _pairs(rows, k, v, math.prod(names["window"]))


def _packed_windows(qkv: Shape, *rest: Any, names: dict[str, Any]) -> int:
    part = (*qkv[:-3], *qkv[-2:])
    return _window_attention(part, part, part, names=names)


def _neighborhood(q: Shape, k: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    more = 0 if names["k_extra"] is None else names["k_extra"][1]
    return _pairs(q, k, v, math.prod(names["kernel"]) + more)


def _neighborhood_av(attention: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(attention) * v[-1]


def _sampled(q: Shape, k: Shape, v: Shape, coords: Shape, *rest: Any, names: dict[str, Any]) -> int:
    samples = math.prod(coords[:-1])  # four corners of a key and of a value each
    return _pairs(q, k, v, coords[3]) + 8 * samples * (k[-1] + v[-1])


def _deformable(value: Shape, locations: Shape, weights: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 8 * math.prod(locations[:-1]) * value[-1]


def _linear(q: Shape, k: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    tokens = math.prod(k[:-2]) * k[-2] + math.prod(q[:-2]) * q[-2]
    return 2 * tokens * q[-1] * v[-1]


def _channel(q: Shape, k: Shape, v: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(q) * (k[-1] + v[-1])


def _scan(u: Shape, delta: Shape, a: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 9 * math.prod(u) * names["routes"][0] * a[-1]


def _chain(a: Shape, b: Shape, c: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 4 * math.prod(a) * c[-1]


def _soft_merge(x: Shape, logits: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(logits) * x[-1]


def _match(metric: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(metric[:-2]) * (metric[-2] // 2) ** 2 * metric[-1]


def _cluster(x: Shape, centers: Shape | None, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(x) * (x[-2] if centers is None else centers[-2])


def _kmeans(x: Shape, start: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 4 * math.prod(x) * min(start[-2], names["window"] ** 2 or start[-2]) * names["iters"]


def _reconstruct(y: Shape, x: Shape, centers: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(x) * centers[-2] + 2 * math.prod(x[:-1]) * names["k"] * y[-1]


def _depthwise(v: Shape, weight: Shape, *rest: Any, names: dict[str, Any]) -> int:
    return 2 * math.prod(v) * weight[2] * weight[3]


def _none(*rest: Any, names: dict[str, Any]) -> int:
    return 0


ATTENTION = 2.5  # backward over forward
FORMULAS: dict[str, tuple[Callable[..., int], float]] = {
    "attention": (_attention, ATTENTION),
    "window_attention": (_window_attention, ATTENTION),
    "window_attention_qkvpacked": (_packed_windows, ATTENTION),
    "neighborhood_attention": (_neighborhood, ATTENTION),
    "neighborhood_qk": (lambda q, k, *rest, names: 2 * math.prod(q) * math.prod(names["kernel"]), 2.0),
    "neighborhood_av": (_neighborhood_av, 2.0),
    "sampled_window_attention": (_sampled, ATTENTION),
    "deformable_attention": (_deformable, 2.0),
    "linear_attention": (_linear, 2.0),
    "channel_attention": (_channel, 2.0),
    "selective_scan": (_scan, 2.0),
    "chain_sum": (_chain, 2.0),
    "chain_links": (lambda dout, *args, names: _chain(*args, names=names), 2.0),
    "grid_sum": (_chain, 2.0),
    "grid_links": (lambda dout, *args, names: _chain(*args, names=names), 2.0),
    "soft_merge": (_soft_merge, 2.0),
    "bipartite_match": (_match, 2.0),
    "cluster_tokens": (_cluster, 2.0),
    "cluster_kmeans": (_kmeans, 2.0),
    "reconstruct_tokens": (_reconstruct, 2.0),
    "depthwise_value": (_depthwise, 2.0),
    **dict.fromkeys(
        ("feature_rows", "mask_from_logits", "merge_plan", "merge_tokens", "unmerge_tokens", "select_tokens", "restore_tokens",
         "window_rows", "window_sum"),
        (_none, 0.0),
    ),
}  # fmt: skip


def _register(name: str, formula: Callable[..., int], backward: float) -> None:
    packets = torch.ops.vitkern
    own = [a.name for a in getattr(packets, name).default._schema.arguments]
    for suffix, factor in (("", 1.0), ("_fwd", 1.0), ("_bwd", backward)):
        packet = getattr(packets, f"{name}{suffix}", None)
        if packet is None:
            continue
        arguments = [a.name for a in packet.default._schema.arguments]
        first = next(i for i in range(len(arguments)) if arguments[i : i + len(own)] == own)

        def count(*args: Any, first: int = first, factor: float = factor, **_: Any) -> int:
            given = args[first : first + len(own)]
            return int(factor * formula(*given, names=dict(zip(own, given, strict=True))))

        register_flop_formula(packet)(count)


for _name, (_formula, _backward) in FORMULAS.items():
    _register(_name, _formula, _backward)
