"""Sampled and hand-picked calls of window_attention and window_attention_qkvpacked."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import CosineScore
from vitkern.bias import SIGNS, RelativePosition, table_rows
from vitkern.ops._dropout import Stream
from vitkern.testing.registry import Call, Entry

SHARD = Stream(11, 1 + (3 << 32))  # from head 1 of image 3 on
HEAD_SIZES = (1, 7, 8, 10, 15, 16, 24, 30, 32, 48, 64, 72, 96, 128, 256)


def make(
    seed: int,
    lengths: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    bias: str = "none",
    cosine: bool = False,
    pads: str = "none",
    layout: str = "plain",
    packed: bool = False,
    spread: float = 1.0,
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """A call in float64. `bias`: none, dense, row, table, index, abs; `pads`: none, zero, given; `layout`: plain, packed,
    channels, heads, batch (a view of each kind)."""
    g = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None or packed else kv_heads
    dv = d if dv is None or packed else dv
    n = math.prod(window)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * spread

    tensors: dict[str, Tensor] = {}
    if packed:
        tensors["qkv"] = normal(batch, *lengths, 3, heads, d)
    else:
        for name, h, width in (("q", heads, d), ("k", kv_heads, d), ("v", kv_heads, dv)):
            tensors[name] = normal(*leaf_shape(layout, batch, lengths, h, width))
    parameters = set()
    if bias in ("table", "abs", "index"):
        rows = {"table": table_rows(window, "query-key"), "abs": table_rows(window, "abs"), "index": 5}[bias]
        tensors["table"] = normal(rows, heads)
        parameters.add("table")
        if bias == "index":
            tensors["index"] = torch.randint(0, rows, (n, n), generator=g, dtype=torch.int32)
    elif bias != "none":
        tensors["bias"] = normal(*{"dense": (heads, n, n), "row": (heads, 1, n)}[bias])
    if cosine:
        tensors["logit_scale"] = torch.randn(heads, 1, 1, generator=g, dtype=torch.float64) + 3.5
        parameters.add("logit_scale")
    if pads == "given":
        tensors["k_pad"], tensors["v_pad"] = normal(kv_heads, d), normal(kv_heads, dv)
    sign = options.pop("sign", "query-key")

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(options)
        if bias in ("table", "abs"):
            kwargs["bias"] = RelativePosition(t["table"], sign="abs" if bias == "abs" else sign)
        elif bias == "index":
            kwargs["bias"] = RelativePosition(t["table"], t["index"])
        elif bias != "none":
            kwargs["bias"] = t["bias"]
        if cosine:
            kwargs["cosine"] = CosineScore(t["logit_scale"])
        if pads != "none":
            kwargs["pad_kv"] = (t["k_pad"], t["v_pad"]) if pads == "given" else "zero"
        groups = (("q", heads), ("k", kv_heads), ("v", kv_heads))
        main = (t["qkv"],) if packed else tuple(view(layout, t[name], len(lengths), h) for name, h in groups)
        return (*main, window, shift), kwargs

    facts = {"L": lengths, "w": window, "s": shift, "B": batch, "H": heads, "Hk": kv_heads, "D": d, "Dv": dv}
    facts |= {"bias": bias, "cosine": cosine, "pads": pads, "layout": "qkv" if packed else layout} | options
    label = f"seed={seed} " + " ".join(f"{k}={v}" for k, v in facts.items())
    function = vitkern.window_attention_qkvpacked if packed else vitkern.window_attention
    return Call(label, function, build, tensors, frozenset(parameters), expanded_gradient, seed)


def leaf_shape(layout: str, batch: int, lengths: tuple[int, ...], heads: int, width: int) -> tuple[int, ...]:
    if layout == "packed":  # one slice of a packed projection
        return (batch, *lengths, 3, heads, width)
    if layout == "channels":  # channels first, as convolutions leave it
        return (batch, heads * width, *lengths)
    if layout == "heads":  # heads first, as SDPA wants it
        return (batch, heads, *lengths, width)
    if layout == "batch":  # one image, expanded
        return (1, *lengths, heads, width, batch)
    return (batch, *lengths, heads, width)


def view(layout: str, t: Tensor, axes: int, heads: int) -> Tensor:
    """The leaf as [B, *L, H, D]; nothing is copied."""
    if layout == "packed":
        return t.select(1 + axes, 1)
    if layout == "channels":
        return t.movedim(1, -1).unflatten(-1, (heads, -1))
    if layout == "heads":
        return t.movedim(1, -2)
    if layout == "batch":
        return t.select(-1, 0).expand(t.shape[-1], *t.shape[1:-1])
    return t


def draw(rng: random.Random, packed: bool = False) -> Call:
    rank = rng.choice((1, 2, 2, 2, 3))
    most = {1: 40, 2: 17, 3: 8}[rank]
    lengths = tuple(rng.randint(1, most) for _ in range(rank))
    window = tuple(rng.randint(1, {1: 24, 2: 9, 3: 4}[rank]) for _ in range(rank))
    if rng.random() < 0.1 and rank == 2:
        window = (rng.randint(9, 14), rng.randint(9, 14))
    shift = tuple(rng.choice((0, w // 2, w - 1, rng.randrange(w))) for w in window)
    heads = rng.choice((1, 2, 3, 4))
    d = rng.choice(HEAD_SIZES if math.prod(window) < 40 else HEAD_SIZES[:9])
    cosine = rng.random() < 0.25 and d > 1  # a direction of one dimension has no gradient to compare
    options: dict[str, Any] = {
        "pad_order": rng.choice(("pad_roll", "roll_pad")),
        "mask_value": rng.choice((-100.0, -100.0, -200.0, -1.5, None, 0.0)),
    }
    if not cosine and rng.random() < 0.5:
        options["scale"] = rng.choice((0.0, 0.3, 1.0))
    if rng.random() < 0.15:
        options |= {"dropout_p": rng.choice((0.1, 0.5)), "dropout_seed": rng.randrange(2**62)}
    if rng.random() < 0.5:
        options["return_stats"] = ("lse",)
    layout = rng.choice(("plain", "plain", "packed", "heads", "batch", "channels"))
    kv_heads = rng.choice([h for h in range(1, heads + 1) if heads % h == 0])
    return make(
        rng.randrange(2**31),
        lengths,
        window,
        shift,
        batch=rng.choice((0, 1, 2, 3)) if rng.random() < 0.3 else 2,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        dv=rng.choice((d, d, rng.choice(HEAD_SIZES[:10]))),
        bias=rng.choice(("none", "dense", "row", "table", "table", "index", "abs")),
        cosine=cosine,
        pads=rng.choice(("none", "zero", "given")),
        layout=layout,
        packed=packed,
        spread=rng.choice((1.0, 1.0, 0.1, 3.0)),
        expanded_gradient=rng.random() < 0.2,
        sign=rng.choice(SIGNS[:2]),
        **options,
    )


def small(packed: bool = False) -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, (4, 4), (2, 2), (0, 0), d=8, packed=packed),
        make(2, (5, 6), (3, 2), (1, 1), d=8, bias="table", pads="given", scale=0.3, packed=packed),
        make(3, (5, 6), (3, 3), (1, 2), d=8, bias="dense", pad_order="roll_pad", mask_value=None, packed=packed),
        make(4, (4, 5), (4, 3), (2, 0), d=16, cosine=True, bias="table", pads="zero", mask_value=-200.0, packed=packed),
        make(5, (9,), (4,), (2,), heads=4, kv_heads=2, d=8, dv=16, bias="row", return_stats=("lse",), packed=packed),
        make(6, (3, 4, 5), (2, 2, 3), (1, 0, 2), batch=1, d=8, bias="index", pads="given", packed=packed),
        make(7, (2, 3), (4, 4), (2, 1), d=8, bias="abs", dropout_p=0.4, dropout_seed=SHARD, packed=packed),
        make(8, (1, 1), (7, 7), (3, 3), batch=1, heads=1, d=8, pads="given", packed=packed),
        make(9, (8, 8), (8, 8), (4, 4), batch=1, heads=1, d=32, bias="table", layout="packed", packed=packed),
        make(10, (4, 4), (2, 2), (1, 1), batch=0, d=8, bias="table", packed=packed),
    ]


def sizes(packed: bool = False) -> list[Call]:
    lengths = ((5, 6), (9, 7), (13, 8))
    return [make(1, length, (4, 4), (2, 2), batch=3, d=8, bias="table", packed=packed) for length in lengths]


ENTRIES = (
    Entry("window_attention", draw, small, sizes, cast=("q", "k", "v")),
    Entry(
        "window_attention_qkvpacked",
        lambda rng: draw(rng, packed=True),
        lambda: small(packed=True),
        lambda: sizes(packed=True),
        cast=("qkv",),
    ),
)
