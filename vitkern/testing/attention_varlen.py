"""Sampled and hand-picked calls of attention_varlen."""

import math
import random
from typing import Any

import torch
from torch import Tensor

import vitkern
from vitkern import DepthwiseValue, Rope
from vitkern.bias import (
    ContextualPosition,
    DecomposedRelativePosition,
    KeyBias,
    ManhattanDecay,
    PolylinePath,
    RelativePosition,
    RowBias,
    table_rows,
)
from vitkern.mask import Causal, NoSelf, Segments
from vitkern.modulation import GaussianMixture, Policy
from vitkern.testing.attention_inputs import NORMALIZERS
from vitkern.testing.registry import Call, Entry, label
from vitkern.testing.window_attention import HEAD_SIZES


def packed(
    seed: int, lengths: tuple[tuple[int, int], ...], *, heads: int = 2, kv_heads: int = 1, d: int = 8, bias: bool = True,
    rows: bool = False, causal: bool = False, ids: bool = False, grid: tuple[int, int] | None = None, named: int = 0,
    values: bool = True, maps: tuple[tuple[int, int], ...] = (), beside: str = "", sides: tuple[int, int] = (1, 1),
    **options: Any,
) -> Call:  # fmt: skip
    """A call of attention_varlen: (queries, keys) of each sequence; `rows`: a bias per query in place of one per key; `grid`: of
    the longest sequence, for tables of offsets; `named`: so many keys of each query; `values`: whether there are any; `maps`: the
    sides of every sequence, behind a prefix of one token, for a convolution of the values; `beside`: some of "expanded",
    "no self", "turned", "relative", "axes", "policy", "context", "path", joined by "+"; `sides`: of the grid of
    the longest sequence, for these."""
    g = torch.Generator().manual_seed(seed)
    of_queries, of_keys = ([n[i] for n in lengths] for i in (0, 1))
    longest = (max(of_queries, default=0), max(of_keys, default=0))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def bounds(each: list[int]) -> Tensor:
        return torch.tensor([0, *each]).cumsum(0).to(torch.int32)

    tensors = {"q": normal(sum(of_queries), heads, d)}
    tensors |= {name: normal(sum(of_keys), kv_heads, d) for name in ("k", "v") if name == "k" or values}
    tensors |= {"cu_q": bounds(of_queries), "cu_k": bounds(of_keys)}
    tensors["vector"] = normal(1, heads, sum(of_queries)) if rows else normal(1, 1, sum(of_keys))
    if bias:
        tensors["bias"] = normal(heads, *longest)
    if grid:
        tensors |= {"table": normal(heads, table_rows(grid, "query-key")), "rate": -normal(heads).abs()}
        tensors |= {"sigma": normal(2, heads).abs() + 1, "alpha": normal(2, heads)}
    if ids:
        tensors["q_ids"], tensors["k_ids"] = (
            torch.randint(-1, 2, (1, sum(n)), generator=g) for n in (of_queries, of_keys)
        )

    names = beside.split("+")
    if "expanded" in names and bias:
        tensors["bias"] = normal(1, 1, longest[1])
    if "turned" in names:
        angle = normal(1, math.gcd(sum(of_queries), sum(of_keys)), 1, max(1, d // 2 - seed % 2))
        tensors |= {"cos": angle.cos(), "sin": angle.sin()}
    if "relative" in names:
        tensors |= {
            "rel_y": normal(1, sum(of_queries), heads, sides[0]),
            "rel_x": normal(1, sum(of_queries), 1, sides[1]),
        }
    if "axes" in names:
        tensors |= {f"axis_{name}": normal(2 * n - 1, d) / 2 for name, n in zip("yx", sides, strict=True)}
    if "context" in names:
        tensors["rows"] = torch.randint(0, 7, longest, generator=g, dtype=torch.int32)
        tensors |= {"t_q": normal(7, 1, d) / 2, "t_k": normal(7, heads, d) / 2, "t_v": normal(7, heads, d)}
    if "path" in names:
        tensors |= {name: -normal(len(lengths), *sides, heads).abs() / 4 for name in ("row", "col")}
    if "policy" in names:
        tensors["keep"] = torch.rand(1, sum(of_keys), generator=g, dtype=torch.float64).round(decimals=1)
    if named:
        own = torch.tensor([n[1] for n in lengths for _ in range(n[0])])[:, None]
        tensors["index"] = (torch.rand(sum(of_queries), named, generator=g) * (own + 1)).long() - 1
    if maps:
        tensors |= {"filter": normal(d, 1, 3, 5), "offset": normal(d)}

    def build(t: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden: list[Any] = [Causal(1)] if causal else []
        hidden += [Segments(t["q_ids"], t["k_ids"])] if ids else []
        hidden += [NoSelf()] if "no self" in names else []
        biases: list[Any] = [RowBias(t["vector"]) if rows else KeyBias(t["vector"])]
        biases += [t["bias"].expand(heads, *longest) if "expanded" in names else t["bias"]] if bias else []
        if "axes" in names:
            biases.append(DecomposedRelativePosition(t["axis_y"], t["axis_x"], sides, sides))
        if "context" in names:
            biases.append(ContextualPosition(t["t_q"], t["t_k"], t["t_v"], t["rows"]))
        if "path" in names:
            biases.append(PolylinePath(t["row"], t["col"], seed % 2 == 0))
        if "relative" in names:
            of_heads = (t["rel_y"], t["rel_y"][:, :, :1])
            biases += [DecomposedRelativePosition(y, t["rel_x"], None, sides) for y in of_heads]
        rope = Rope(t["cos"], t["sin"], ("interleaved", "half")[seed % 2]) if "turned" in names else None
        factors: list[Any] = [Policy(t["keep"], 1e-3, seed % 2 == 0)] if "policy" in names else []
        if grid:
            factors.append(GaussianMixture(t["sigma"], t["alpha"], grid))
            biases += [RelativePosition(t["table"].t(), None, grid), ManhattanDecay(t["rate"], grid)]
            biases += [ManhattanDecay(t["rate"], grid, "prob")]
        most = t["bias"].shape[1:] if bias and "expanded" not in names else longest
        given = {"bias": biases, "mask": hidden, "modulation": factors, "rope": rope, **options}
        given |= {"key_index": t["index"]} if named else {}
        given |= {"lepe": DepthwiseValue(t["filter"], t["offset"], maps, 1)} if maps else {}
        return (t["q"], t["k"], t.get("v"), t["cu_q"], t["cu_k"], *most), given

    facts = {"lengths": lengths, "H": heads, "Hk": kv_heads, "D": d, "bias": bias, "rows": rows, "beside": beside}
    facts |= {"named": named, "maps": maps, "sides": sides}
    text = label(seed, facts | options)
    return Call(
        text,
        vitkern.attention_varlen,
        build,
        tensors,
        frozenset(tensors) - {"q", "k", "v", "cu_q", "cu_k", "q_ids", "k_ids", "index", "rows"},
        False,
        seed,
    )


def draw_packed(rng: random.Random) -> Call:
    lengths = tuple((rng.choice((0, 1, 5, 40, 64)), rng.choice((0, 1, 5, 63, 90))) for _ in range(rng.randint(1, 6)))
    options: dict[str, Any] = {"normalizer": rng.choice(NORMALIZERS)}
    if options["normalizer"] == "softmax":
        options["return_stats"] = rng.choice(((), ("lse",), ("key_mean",)))
    if rng.random() < 0.2:
        options |= {"dropout_p": 0.3, "dropout_seed": rng.randrange(2**62)}
    heads = rng.choice((1, 2, 4))
    made: dict[str, Any] = {
        "seed": rng.randrange(2**31), "heads": heads, "kv_heads": rng.choice((1, heads)), "d": rng.choice(HEAD_SIZES[:9]),
        "bias": rng.random() < 0.5, "rows": rng.random() < 0.3, "causal": rng.random() < 0.3, "ids": rng.random() < 0.3,
        "named": rng.choice((0, 0, 0, 1, 20)),
    }  # fmt: skip
    beside = [name for name in ("expanded", "no self", "turned") if rng.random() < 0.2]
    if (
        options["normalizer"] == "softmax"
        and "lse" not in options["return_stats"]
        and not made["named"]
        and rng.random() < 0.3
    ):
        beside.append("policy")
    if made["d"] == 1 or not all(map(sum, zip(*lengths, strict=True))):
        beside = [name for name in beside if name != "turned"]
    return packed(**made, lengths=lengths, beside="+".join(beside), **options)


def small_packed() -> list[Call]:
    return [
        packed(1, ((3, 5), (0, 2), (1, 1), (4, 0), (2, 7)), return_stats=("key_mean",)),
        packed(
            2, ((4, 4), (6, 3)), kv_heads=2, rows=True, causal=True, normalizer="sigmoid", dropout_p=0.3, dropout_seed=4
        ),
        packed(3, ((2, 9), (5, 5)), bias=False, scale=0.3, return_stats=("lse",)),
        packed(5, ((2, 9), (5, 5)), ids=True),
        packed(6, ((2, 9), (15, 15), (0, 3), (7, 7)), kv_heads=2, bias=False, grid=(3, 5)),
        packed(12, ((5, 5), (0, 3), (7, 4)), kv_heads=2, beside="expanded+no self+turned", return_stats=("lse",)),
        packed(7, ((3, 5), (0, 2), (1, 1), (4, 0), (2, 7)), named=4, return_stats=("key_mean",)),
        packed(8, ((4, 6), (5, 3)), kv_heads=2, rows=True, causal=True, named=3, normalizer="sigmoid", dropout_p=0.3,
               dropout_seed=4),
        packed(9, ((2, 9), (5, 5)), ids=True, values=False, return_stats=("lse", "key_mean", "row"), stat_rows=(1,)),
        packed(10, ((7, 7), (7, 7), (13, 13), (1, 1), (3, 3)), maps=((2, 3), (2, 3), (3, 4), (0, 2), (1, 2))),
        packed(13, ((4, 6), (0, 3), (7, 5)), rows=True, normalizer="sigmoid", beside="relative", sides=(2, 3)),
        packed(14, ((3, 5), (0, 2), (4, 0), (7, 7), (2, 1)), kv_heads=2, causal=True, beside="policy", return_stats=("key_mean",)),
        packed(15, ((4, 6), (5, 2)), beside="policy+turned", return_stats=("row",), stat_rows=(0, 4)),
        *placed(),
        packed(4, ((0, 0),), bias=False),
    ]  # fmt: skip


def placed() -> list[Call]:
    """Calls with positions on the grid of the longest sequence, and of pairs of tokens."""
    return [
        packed(18, ((3, 5), (6, 6), (0, 2), (4, 0), (1, 1)), beside="axes", sides=(2, 3)),
        packed(19, ((3, 3), (6, 6)), kv_heads=2, rows=True, beside="axes+turned", sides=(3, 2), normalizer="sigmoid"),
        packed(20, ((3, 5), (0, 2), (4, 0), (2, 7)), kv_heads=2, beside="context", return_stats=("lse",)),
        packed(21, ((4, 3), (7, 5)), causal=True, beside="context+expanded", normalizer="sigmoid", dropout_p=0.2, dropout_seed=3),
        packed(22, ((5, 4), (2, 6)), beside="context+policy", return_stats=("key_mean",)),
        packed(23, ((6, 6), (6, 6), (6, 6)), kv_heads=2, beside="path+axes", sides=(2, 3), return_stats=("lse", "key_mean")),
        packed(24, ((6, 6), (6, 6)), causal=True, beside="path+context", sides=(3, 2), return_stats=("row",), stat_rows=(0, 5)),
        packed(25, ((4, 4), (4, 4)), beside="path+turned", sides=(2, 2), named=3, dropout_p=0.3, dropout_seed=5),
    ]  # fmt: skip


def sizes_packed() -> list[Call]:
    return [packed(1, lengths) for lengths in (((3, 5), (4, 6)), ((7, 9), (2, 8)), ((11, 6), (5, 10)))]


ENTRIES = (Entry("attention_varlen", draw_packed, small_packed, sizes_packed, cast=("q", "k", "v"), last="attention"),)
