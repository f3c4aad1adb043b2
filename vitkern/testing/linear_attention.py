"""Sampled and hand-picked calls of linear_attention."""

import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import feature_map
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import HEAD_SIZES, leaf_shape, view

LEARNED = (
    "focused",
    "focused_head",
    "polar",
    "hedgehog_joint",
    "hedgehog_split",
    "hedgehog_exp",
    "favor",
    "favor_relu",
)
STEPS = ("sign", "hash")  # their gradient is not the derivative
POSITIVE = ("relu", "elu1", "softmax", "silu_norm", "exp", *LEARNED)
SIGNED = ("identity", "leaky_relu", *STEPS)
PRESETS = (
    "efficientvit",
    "timm",
    "linear_transformer",
    "mlla",
    "rala",
    "inline",
    "efficient_attention",
    "lucidrains",
    "lion_lit",
)


def make(
    seed: int,
    batch: int,
    queries: tuple[int, ...],
    keys: tuple[int, ...] | None = None,
    *,
    heads: int = 2,
    kv_heads: int | None = None,
    d: int = 8,
    dv: int | None = None,
    name: str | None = "relu",
    masked: bool = False,
    weight: str = "none",
    rope: str = "none",
    layout: str = "plain",
    lengths: tuple[tuple[int, int], ...] = (),
    expanded_gradient: bool = False,
    **options: Any,
) -> Call:
    """`queries`, `keys`: sides of the maps. `weight`: none, heads, shared. `rope`: none, or `layout order`. `lengths`: of packed
    sequences of queries and of keys, in place of the maps."""
    g = torch.Generator().manual_seed(seed)
    keys, kv_heads, dv = queries if keys is None else keys, kv_heads or heads, dv or d
    if lengths:
        batch, layout = 1, "plain"
        queries, keys = ((sum(pair[i] for pair in lengths),) for i in (0, 1))

    def leaf(sides: tuple[int, ...], count: int, width: int) -> Tensor:
        return torch.randn(leaf_shape(layout, batch, sides, count, width), generator=g, dtype=torch.float64)

    tensors = {"q": leaf(queries, heads, d), "k": leaf(keys, kv_heads, d), "v": leaf(keys, kv_heads, dv)}
    if masked:
        tensors["mask"] = torch.rand((batch, *keys), generator=g) < 0.7
    if weight != "none":
        shape = (batch, *keys, kv_heads if weight == "heads" else 1)
        tensors["weight"] = torch.rand(shape, generator=g, dtype=torch.float64) + 0.5
    parameters = _parameters(name, heads, d, g)
    tensors |= parameters
    if rope != "none":
        pairs, tokens = max(d // 4, 1), torch.Size(queries).numel()
        angles = torch.randn(1, tokens, heads if kv_heads == heads else 1, pairs, generator=g, dtype=torch.float64)
        tensors |= {"cos": angles.cos(), "sin": angles.sin()}
    for i, cu in enumerate(("cu_q", "cu_k")):
        if lengths:
            tensors[cu] = torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(torch.int32)

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        of = {"q": (queries, heads), "k": (keys, kv_heads), "v": (keys, kv_heads)}
        args = [view(layout, t[n], len(sides), count) for n, (sides, count) in of.items()]
        more: dict[str, Any] = {"key_mask": t.get("mask"), "key_weight": t.get("weight")}
        if lengths:
            args = [x[0] for x in args]
            more = {n: None if x is None else x[0] for n, x in more.items()}
            more |= {"cu_seqlens": t["cu_q"], "cu_seqlens_k": t["cu_k"]}
        if name is not None:
            more["feature_map"] = _map(name, t)
        if rope != "none":
            style, order = rope.split()
            more |= {"rope": vitkern.Rope(t["cos"], t["sin"], style), "rope_order": order}
        return tuple(args), more | options

    facts = {
        "B": batch,
        "Nq": queries,
        "Nk": keys,
        "H": heads,
        "Hk": kv_heads,
        "D": d,
        "Dv": dv,
        "map": name,
        "masked": masked,
    }
    facts |= {"weight": weight, "rope": rope, "layout": layout, "lengths": lengths}
    named = frozenset(("weight", "cos", "sin", *parameters))
    return Call(label(seed, facts | options), vitkern.linear_attention, build, tensors, named, expanded_gradient, seed)


def _parameters(name: str | None, heads: int, d: int, g: torch.Generator) -> dict[str, Tensor]:
    """The tensors of a feature map, of shapes that are no whole vectors."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if name in ("focused", "focused_head"):
        return {"scale": 1 + 0.5 * normal(1, 1, heads * d)}
    if name == "polar":
        return {"scale": 1 + 0.5 * normal(1, 1, heads * d), "power": 1 + 2 * normal(heads, d).sigmoid()}
    if name is not None and name.startswith("hedgehog"):
        made = {"map_weight": normal(heads, 5, d) * d**-0.5}
        return made if name == "hedgehog_split" else made | {"bias": normal(heads, 5) * 0.5}
    if name is not None and name.startswith("favor"):
        return {"omega": normal(11, d) * 0.5}
    if name == "hash":
        own = 1 if heads == 3 else heads
        return {"anchors": normal(own, 6, d), "A": normal(own, 6, 3), "mean": normal(own, 6) * 0.1 + 0.5}
    return {}


def _map(name: str, t: dict[str, Tensor]) -> Any:
    """The feature map of a name, from its tensors."""
    if name in ("focused", "focused_head"):
        return feature_map.Focused(t["scale"], norm="head" if name == "focused_head" else "width")
    if name == "polar":
        return feature_map.Polar(t["scale"], t["power"])
    if name.startswith("hedgehog"):
        return feature_map.Hedgehog(t["map_weight"], t.get("bias"), name.removeprefix("hedgehog_"), eps=0.1)
    if name.startswith("favor"):
        return feature_map.Favor(t["omega"], generalised=name == "favor_relu")
    if name == "hash":
        return feature_map.Hash(t["anchors"], t["A"], t["mean"])
    return {"exp": feature_map.Exp(0.5), "sign": feature_map.Sign()}.get(name, name)


def draw(rng: random.Random) -> Call:
    heads = rng.choice((1, 2, 3, 4))
    kv_heads = rng.choice([h for h in range(1, heads + 1) if heads % h == 0])
    d = rng.choice(HEAD_SIZES[:12])
    signed = rng.random() < 0.3
    name: str | None = rng.choice(SIGNED if signed else POSITIVE)
    normalizers = ("none", "subtract", "abs_max") if signed else ("sum", "sum", "mean", "none", "max", "subtract")
    options: dict[str, Any] = {"normalizer": rng.choice(normalizers)}
    if rng.random() < 0.2:
        name, options = None, {"preset": rng.choice(PRESETS)}
    if rng.random() < 0.3:
        options["scale"] = rng.choice((0.3, 1.7))
    if rng.random() < 0.2:
        options["offset"] = rng.choice((1.0, 0.25))
    if rng.random() < 0.3:
        options["return_state"] = True
    kind = rng.choice(("plain", "plain", "cross", "grid", "windows", "packed"))
    queries: tuple[int, ...] = (rng.choice((1, 7, 63, 65, 200, 700)),)
    keys = queries
    lengths: tuple[tuple[int, int], ...] = ()
    if kind == "cross":
        keys = (rng.choice((1, 7, 64, 130)),)
    elif kind in ("grid", "windows"):
        window = (rng.choice((1, 3, 4)), rng.choice((2, 5)))
        queries = keys = (window[0] * rng.choice((1, 2)), window[1] * rng.choice((1, 3)))
        if kind == "windows":
            options["window_size"] = window
    elif kind == "packed":
        pairs = [(n, rng.choice((n, n, 5))) for n in rng.choices((0, 1, 17, 64, 100), k=4)]
        lengths = (*pairs, (3, 4))
    if name in (*LEARNED, "hash") and not str(name).startswith("favor") or options.get("preset") == "rala":
        kv_heads = heads
    dv = rng.choice((d, d, 1, 17, 40))
    if name == "polar":
        options.pop("return_state", None)
        dv = max(dv, 2)
    rope = "none"
    if kind in ("plain", "grid") and d > 1 and name not in STEPS and rng.random() < 0.3:
        orders = ("before",) if str(name).startswith(("hedgehog", "favor")) else ("before", "after")
        rope = f"{rng.choice(('interleaved', 'half'))} {rng.choice(orders)}"
    if options.get("preset") == "rala" and lengths:
        options = {"preset": "mlla"}
    return make(
        rng.randrange(2**31), rng.choice((1, 2, 3)), queries, keys, heads=heads, kv_heads=kv_heads, d=d,
        dv=dv, name=name, masked=rng.random() < 0.3,
        weight=rng.choice(("none", "none", "heads", "shared")),
        rope=rope, layout=rng.choice(("plain", "packed", "channels", "heads", "batch")), lengths=lengths,
        expanded_gradient=rng.random() < 0.2, **options,
    )  # fmt: skip


def small() -> list[Call]:
    """Tiny calls that together reach every branch of a kernel."""
    return [
        make(1, 2, (9,), masked=True, return_state=True),
        make(2, 2, (5,), (7,), heads=4, kv_heads=2, d=5, dv=3, name="elu1", normalizer="mean", weight="heads"),
        make(3, 2, (6,), name="softmax", normalizer="none", masked=True, scale=0.5, layout="packed"),
        make(4, 2, (6,), name="identity", normalizer="subtract", masked=True, layout="heads", return_state=True),
        make(5, 2, (4, 6), name="elu1", rope="interleaved after", normalizer="mean", window_size=None),
        make(6, 2, (4, 6), name="silu_norm", window_size=(2, 3), offset=0.5, layout="channels", return_state=True),
        make(
            7,
            1,
            (),
            lengths=((3, 3), (0, 2), (5, 4), (1, 0)),
            name="elu1",
            masked=True,
            weight="shared",
            return_state=True,
        ),
        make(8, 2, (7,), name="leaky_relu", normalizer="abs_max", offset=0.5, eps=0.75, return_state=True),
        make(9, 2, (7,), name="exp", normalizer="max", eps=20.0, rope="half after", layout="batch"),
        make(10, 2, (5,), heads=3, name="focused", preset="flatten"),
        make(11, 0, (5,)),
        make(12, 2, (150,), (140,), heads=6, kv_heads=2, d=20, dv=40, name="softmax", return_state=True),
        make(13, 1, (600,), d=16, name="identity", normalizer="none", rope="half before"),
        make(14, 1, (70,), name=None, preset="retnet", heads=1, d=33),
        make(15, 1, (70,), name=None, preset="rala", masked=True),
        make(16, 2, (5,), heads=3, name="focused", masked=True, weight="heads"),
        make(17, 2, (70,), heads=2, d=5, dv=7, name="polar", normalizer="mean", masked=True),
        make(18, 2, (7,), d=5, dv=3, name="hedgehog_joint", layout="channels"),
        make(19, 1, (9,), (6,), name="hedgehog_split", masked=True),
        make(20, 2, (7,), name="hedgehog_exp", rope="half after", offset=0.5),
        make(21, 2, (7,), (90,), heads=4, kv_heads=2, name="favor", masked=True, return_state=True),
        make(22, 1, (), lengths=((3, 3), (0, 2), (5, 80), (1, 0)), name="favor_relu"),
        make(23, 2, (9,), name="sign", normalizer="abs_max"),
        make(24, 1, (), lengths=((3, 3), (70, 2), (5, 80)), heads=3, name="hash", normalizer="none", masked=True),
        make(25, 2, (4, 6), name="hash", window_size=(2, 3), normalizer="subtract"),
        make(34, 1, (6,), d=8, dv=5, name="polar", rope="half after", masked=True),
        make(35, 2, (70,), heads=2, d=9, dv=19, name="polar", rope="interleaved after", normalizer="mean", offset=0.5),
        *by_pairs(),
    ]


def by_pairs() -> list[Call]:
    """Calls of so few tokens that they are sums over all pairs."""
    return [
        make(26, 2, (5,), masked=True, weight="heads", scale=0.5),
        make(27, 2, (3,), (4,), heads=4, kv_heads=2, d=9, dv=11, name="elu1", normalizer="mean", offset=0.5),
        make(
            28, 2, (4, 6), name="silu_norm", window_size=(2, 3), normalizer="subtract", masked=True, layout="channels"
        ),
        make(29, 2, (5,), name="identity", normalizer="abs_max", eps=0.75, offset=0.5, layout="packed"),
        make(30, 1, (6,), name="exp", normalizer="max", eps=10.0, weight="shared", layout="heads"),
        make(31, 2, (5,), name="leaky_relu", normalizer="none", offset=0.5, masked=True, rope="half before"),
        make(32, 1, (70,), (66,), heads=2, kv_heads=1, d=104, dv=112, name="elu1", masked=True, layout="channels"),
        make(33, 1, (1,), (20,), heads=3, name=None, preset="retnet", expanded_gradient=True),
        make(
            36, 2, (8, 9), heads=4, kv_heads=2, d=16, dv=12, window_size=(2, 3), masked=True, weight="heads", offset=0.5
        ),
        make(37, 16, (4,), heads=3, d=9, dv=11, name="silu_norm", normalizer="subtract", layout="packed"),
    ]


def derived() -> list[Call]:
    """A map with parameters each, and every divisor by all pairs, but what has no gradient by design: the largest key of "favor"
    (it cancels out, but for eps) and the divisor of "retnet"."""
    learned = [
        make(40 + i, 1, (3,), (4,), d=4, dv=3, name=name, masked=True, eps=0.0, weight="heads")
        for i, name in enumerate(LEARNED)
    ]
    turned = make(50, 1, (3,), d=4, dv=3, name="polar", rope="half after", normalizer="none")
    return [*learned, turned, *(call for call in by_pairs() if call.seed not in (32, 33))]


def sizes() -> list[Call]:
    return [
        make(1, 3, (n,), (m,), name="elu1", weight="heads", masked=True, dv=7) for n, m in ((17, 9), (30, 20), (41, 7))
    ]


ENTRIES = (Entry("linear_attention", draw, small, sizes, cast=("q", "k", "v"), derived=derived),)
