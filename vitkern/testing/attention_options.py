"""What sampled calls of attention may have beside the first biases, masks and modulations, by name."""

import math
import random
from typing import Any

import torch
from torch import Tensor

from vitkern import DepthwiseValue, Rope
from vitkern.bias import RowBias
from vitkern.mask import NoSelf

NAMES = ("expanded", "no self", "rows", "named", "turned", "lepe")


def tensors(names: list[str], seed: int, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The tensors of these options; q, k, v as the call passes them."""
    batch, queries, heads, d = q.shape
    keys, kv_heads, dv = v.shape[1:]
    made: dict[str, Tensor] = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    if "rows" in names:
        made["row_bias"] = normal(batch, 1 + (heads - 1) * (seed % 2), queries)
    if "named" in names:
        made["named"] = torch.randint(-1, keys, (batch, queries, min(keys, 5)), generator=g)
    if "turned" in names:
        first, last = turned(queries, keys)
        angles = math.gcd(queries - first, last)
        own = heads if kv_heads == heads and seed % 2 else 1
        angle = normal(1 + (batch - 1) * (seed // 2 % 2), angles, own, max(1, d // 2 - seed % 3))
        made |= {"cos": angle.cos(), "sin": angle.sin()}
    if "lepe" in names:
        channels = dv if seed % 2 else kv_heads * dv
        made |= {"lepe": normal(channels, 1, 3, 5), "lepe_bias": normal(channels)}  # of 3 x 3, torch sums by threads
    return made


def turned(queries: int, keys: int) -> tuple[int, int]:
    """The first query and the end of the keys that a rotation turns."""
    return int(queries > 1), max(1, keys - 1)


def place(
    names: list[str], seed: int, t: dict[str, Tensor], grid: tuple[int, int], q: Tensor, k: Tensor
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Biases, masks and further options of a call."""
    queries, keys = q.shape[1], k.shape[1]
    biases = [RowBias(t["row_bias"])] if "rows" in names else []
    masks = [NoSelf()] if "no self" in names else []
    found: dict[str, Any] = {"key_index": t.get("named")}
    if "turned" in names:
        first, last = turned(queries, keys)
        found["rope"] = Rope(t["cos"], t["sin"], ("interleaved", "half")[seed % 2], (first, queries), (0, last))
    if "lepe" in names:
        found["lepe"] = DepthwiseValue(t["lepe"], t["lepe_bias"], grid, keys - math.prod(grid))
    return biases, masks, found


def draw(rng: random.Random, made: dict[str, Any]) -> list[str]:
    """Options that may stand beside the others `made` of a call."""
    names = [name for name in NAMES if rng.random() < 0.15]
    queries, keys, normalizer = made["queries"], made["keys"], made["normalizer"]
    hard = normalizer.startswith("argmax")
    fits = {
        "expanded": made["bias"] is not None,
        "rows": normalizer in ("sigmoid", "relu", "none"),  # softmax has no gradient to compare
        "named": keys > 0 and not made.get("topk") and not (made.get("return_stats") and normalizer != "softmax"),
        "turned": made["d"] > 1 and keys > 1 and not hard,
        "lepe": queries == keys,
    }
    return [name for name in names if fits.get(name, True)]
