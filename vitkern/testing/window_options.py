"""Sampled and hand-picked calls of window_attention with options whose windows are gathered, and with groups of heads."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import CosineScore, DepthwiseValue, bias, mask
from vitkern.testing.registry import Call, Entry, label

PARAMETERS = frozenset(("table", "logit_scale", "rel_h", "rel_w", "rate", "table0", "table1"))


def make(
    number: int,
    lengths: tuple[int, ...],
    window: Any,
    shift: Any = 0,
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    key_lengths: tuple[int, ...] | None = None,
    biases: tuple[str, ...] = (),
    masks: tuple[str, ...] = (),
    cosine: bool = False,
    pads: str = "none",
    extra: int = 0,
    of_batch: bool = False,
    keys_hidden: bool = False,
    order: bool = False,
    own_shifts: bool = False,
    lepe: str = "",
    swapped: bool = False,
    **options: Any,
) -> Call:
    """`biases` of dense, wide (a column for each further key), table, index, halo, decomposed, decay, groups; `masks` of causal,
    self, tensor; `order`: a permutation; `own_shifts`: one for each sample; `swapped`: heads in front of the map in memory."""
    g = torch.Generator().manual_seed(number)
    kv_heads, dv, key_lengths = kv_heads or heads, dv or d, key_lengths or lengths
    shared = options.get("shared_q", False)
    sides = [window] * len(lengths) if isinstance(window, int) else list(window)
    grouped = any(isinstance(w, tuple) for w in sides)
    sides = [length if w is None else w for w, length in zip(sides, lengths, strict=False)] if not grouped else [1]
    cells = options.get("context_size") or options.get("key_window_size")
    cells = [cells] * len(sides) if isinstance(cells, int) else cells
    if cells is None:
        cells = [w * k // n for w, k, n in zip(sides, key_lengths, lengths, strict=False)] if not grouped else [1]
    n, m = math.prod(sides), math.prod(cells)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def of_map(name: str, on: tuple[int, ...], count: int, width: int) -> None:
        tensors[name] = normal(batch, count, *on, width) if swapped else normal(batch, *on, count, width)

    tensors: dict[str, Tensor] = {}
    of_map("q", tuple(sides) if shared else lengths, heads, d)
    of_map("k", key_lengths, kv_heads, d)
    of_map("v", key_lengths, kv_heads, dv)
    if "dense" in biases:
        tensors["dense"] = normal(heads, n, m)
    if "wide" in biases:
        tensors["wide"] = normal(heads, n, m + extra)
    if "table" in biases:
        tensors["table"] = normal(bias.table_rows(tuple(sides), "query-key"), heads)
    if "halo" in biases:
        tensors["table"] = normal(math.prod(w + c - 1 for w, c in zip(sides, cells, strict=True)), heads)
    if "index" in biases:
        tensors["table"] = normal(7, heads)
        tensors["index"] = torch.randint(0, 7, (n, m), generator=g, dtype=torch.int32)
    if "decomposed" in biases:
        tensors["rel_h"], tensors["rel_w"] = (normal(2 * w - 1, d) for w in sides)
    if "decay" in biases:
        tensors["rate"] = -normal(heads).abs()
    if "groups" in biases:
        for i, one in enumerate(window):
            own = [length if w is None else w for w, length in zip(one, lengths, strict=True)]
            tensors[f"table{i}"] = normal(bias.table_rows(tuple(own), "query-key"), heads // len(window))
    if "tensor" in masks:
        tensors["seen"] = torch.rand(heads, n, m, generator=g) < 0.7
    if cosine:
        tensors["logit_scale"] = normal(heads) + 2.0
    if pads == "given":
        tensors["k_pad"], tensors["v_pad"] = normal(kv_heads, d), normal(kv_heads, dv)
    if extra:
        many = batch if of_batch else 1
        tensors["k_extra"], tensors["v_extra"] = normal(many, extra, kv_heads, d), normal(many, extra, kv_heads, dv)
    if keys_hidden:
        tensors["key_mask"] = torch.rand(batch, *key_lengths, generator=g) < 0.7
    if order:
        tensors["order"] = torch.stack([torch.randperm(lengths[0], generator=g) for _ in range(max(batch, 1))])
        tensors["order"] = tensors["order"][:batch].to(torch.int32)
    if own_shifts:
        tensors["shift"] = torch.stack([torch.randint(0, w, (batch,), generator=g) for w in sides], 1).to(torch.int32)
    if lepe:
        tensors["weight"], tensors["added"] = normal(kv_heads * dv, 1, 3, 3), normal(kv_heads * dv)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(options)
        kinds = {
            "dense": lambda: t["dense"],
            "wide": lambda: t["wide"],
            "table": lambda: bias.RelativePosition(t["table"]),
            "halo": lambda: bias.RelativePosition(t["table"], sign="key-query"),
            "index": lambda: bias.RelativePosition(t["table"], t["index"]),
            "decomposed": lambda: bias.DecomposedRelativePosition(
                t["rel_h"], t["rel_w"], (sides[0], sides[1]), (sides[0], sides[1])
            ),
            "decay": lambda: bias.ManhattanDecay(t["rate"], (sides[0], sides[1])),
            "groups": lambda: bias.PerHeadGroup(
                tuple(bias.RelativePosition(t[f"table{i}"]) for i in range(len(window)))
            ),
        }
        found = [kinds[kind]() for kind in biases]
        if found:
            kwargs["bias"] = found if len(found) > 1 else found[0]
        seen = {"causal": mask.Causal(), "self": mask.NoSelf(), "tensor": t.get("seen")}
        if masks:
            kwargs["mask"] = [seen[kind] for kind in masks]
        if cosine:
            kwargs["cosine"] = CosineScore(t["logit_scale"])
        if pads != "none":
            kwargs["pad_kv"] = (t["k_pad"], t["v_pad"]) if pads == "given" else "zero"
        if extra:
            kwargs["extra_kv"] = (t["k_extra"], t["v_extra"])
        for name in ("key_mask", "order"):
            if name in t:
                kwargs[name] = t[name]
        if lepe:
            kwargs["lepe"] = DepthwiseValue(t["weight"], t["added"], scope=lepe)
        main = (t[name].movedim(1, -2) if swapped else t[name] for name in "qkv")
        return (*main, window, t.get("shift", shift)), kwargs

    facts = {"L": lengths, "w": window, "s": shift, "B": batch, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv}
    if key_lengths != lengths:
        facts["Lk"] = key_lengths
    facts |= {"biases": biases, "masks": masks, "cosine": cosine, "pads": pads, "extra": extra, "lepe": lepe}
    facts |= {"key_mask": keys_hidden, "order": order, "own_shifts": own_shifts} | options
    return Call(label(number, facts), vitkern.window_attention, build, tensors, PARAMETERS, seed=number)


def draw(rng: random.Random) -> Call:
    rank = rng.choice((1, 2, 2, 2, 3))
    most = {1: 30, 2: 11, 3: 6}[rank]
    lengths = tuple(rng.randint(1, most) for _ in range(rank))
    window = tuple(rng.choice((rng.randint(1, {1: 12, 2: 6, 3: 3}[rank]), None)) for _ in range(rank))
    sides = [n if w is None else w for w, n in zip(window, lengths, strict=True)]
    heads = rng.choice((1, 2, 4))
    facts: dict[str, Any] = {"heads": heads, "kv_heads": rng.choice((1, heads)), "d": rng.choice((1, 5, 8, 16, 24))}
    facts |= {"pads": rng.choice(("none", "zero", "given")), "swapped": rng.random() < 0.3}
    kind = rng.choice(("plain", "shift", "shift", "grid", "context", "pooled", "shared", "order", "own"))
    biases = ["dense", "table"]
    if kind == "shift":
        facts |= {"shift": tuple(rng.randrange(w) for w in sides), "mask_value": rng.choice((-100.0, None, -1.5))}
        facts["pad_order"] = rng.choice(("pad_roll", "roll_pad"))
    elif kind == "grid":
        facts["partition"] = "grid"
    elif kind == "context":
        border = rng.choice(("pad", "shift"))
        facts["context_size"] = tuple(rng.randint(1, min(n, 8) if border == "shift" else 8) for n in lengths)
        facts["context_border"] = border
        biases = ["dense", "halo", "index"]
    elif kind == "pooled":
        facts["key_window_size"] = tuple(rng.randint(1, 4) for _ in lengths)
        of_axes = zip(lengths, sides, facts["key_window_size"], strict=True)
        facts["key_lengths"] = tuple(-(-n // w) * k - rng.randrange(k) for n, w, k in of_axes)
        biases = ["dense", "index"]
    elif kind == "shared":
        facts["shared_q"] = True
    elif kind == "order" and rank == 1:
        facts["order"] = True
    elif kind == "own":
        sides = [w if n % w == 0 else n for w, n in zip(sides, lengths, strict=True)]
        window = tuple(sides)
        facts |= {"own_shifts": True, "mask_value": rng.choice((0.0, -100.0, None))}
    facts["biases"] = tuple(rng.sample(biases, rng.choice((0, 1, 1))))
    if rng.random() < 0.3:
        facts["extra"], facts["of_batch"] = rng.randint(1, 3), rng.random() < 0.5
    facts["keys_hidden"] = rng.random() < 0.3
    if rng.random() < 0.3:
        facts["masks"] = (rng.choice(("causal", "self", "tensor")),)
    if rng.random() < 0.2 and facts["d"] > 1:
        facts["cosine"] = True
    elif rng.random() < 0.3:
        facts["normalizer"] = rng.choice(("none", "relu", "sigmoid"))
    if facts.get("normalizer") is None and rng.random() < 0.4:
        facts["return_stats"] = ("lse",) if kind == "context" or rng.random() < 0.5 else ("lse", "key_mean")
    if rng.random() < 0.15:
        facts |= {"dropout_p": 0.3, "dropout_seed": rng.randrange(2**62)}
    return make(rng.randrange(2**31), lengths, window, **facts)


def small() -> list[Call]:
    """Tiny calls that together reach every option."""
    # fmt: off
    return [
        make(1, (4, 6), (2, 3), partition="grid", biases=("table",)),
        make(2, (5, 7), (2, 3), (1, 2), biases=("table",), pads="given", extra=2, keys_hidden=True),
        make(3, (5, 6), 2, context_size=4, pads="zero", biases=("halo",), return_stats=("lse",)),
        make(4, (8,), 4, partition="unit", key_lengths=(24,), heads=1, biases=("index",), key_window_size=12),
        make(5, (4, 4), 2, shared_q=True, heads=4, kv_heads=2, biases=("dense",), return_stats=("lse", "key_mean")),
        make(6, (4, 6), 2, (1, 1), biases=("decomposed", "table"), mask_value=None, pads="given"),
        make(7, (4, 6), [(None, 2), (2, None)], biases=("groups",), heads=4, kv_heads=2,
             dropout_p=0.3, dropout_seed=4),
        make(8, (4, 6), (4, 3), [(0, 0), (2, 1)], heads=2, biases=("table",), return_stats=("lse",)),
        make(9, (9,), 4, order=True, masks=("causal",), return_stats=("lse", "key_mean")),
        make(10, (4, 6), (2, 3), own_shifts=True, mask_value=-3.0),
        make(11, (5, 6), 3, context_size=4, context_border="shift", cosine=True, extra=1, biases=("wide",)),
        make(12, (3, 4, 5), (2, None, 2), normalizer="none", key_lengths=(2, 4, 3), key_window_size=(1, 4, 1)),
        make(13, (2, 2, 3, 3), 2, (1, 0, 1, 0), batch=1, masks=("tensor",), partition="block", extra=1),
        make(15, (4, 5), (1, None), biases=("decay",)),
        make(16, (4, 4), 2, batch=0, keys_hidden=True),
        make(18, (5, 7), (2, 3), partition="grid", biases=("table",), pads="given"),
        make(17, (6,), 3, dropout_p=0.4, dropout_seed=3, extra=1, dv=5, swapped=True),
        make(20, (4, 6), [(None, 2), (2, None)], biases=("groups",), lepe="window", heads=4, kv_heads=2),
        make(21, (5, 6), (2, 4), (1, 1), lepe="window", pads="given", biases=("dense",)),
        make(22, (4, 5), (1, None), lepe="map", return_stats=("lse",)),
        make(19, (4, 6), [(2, 3), (1, 2)], heads=4, normalizer="argmax_k", keys_hidden=True, dropout_p=0.5, dropout_seed=6),
    ]


def sizes() -> list[Call]:
    def one(lengths: tuple[int, int]) -> Call:
        return make(2, lengths, (4, 4), (2, 1), batch=3, biases=("table",), pads="given", extra=2, keys_hidden=True)

    return [one(lengths) for lengths in ((9, 14), (17, 22), (26, 30))]


ENTRIES = (
    Entry(
        "window_attention_options",
        draw,
        small,
        sizes,
        cast=("q", "k", "v", "k_extra", "v_extra"),
        last="window_sum",
        derived=lambda: [call for call in small() if call.seed in (20, 21, 22)],
    ),
)
