"""Ahead-of-time compilation of attention's kernels with tables of offsets on a grid and contextual positions: none may spill.
VITKERN_FULL=1 compiles every case for every device, which takes ten minutes."""

import os

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import EVERY_TERM, attention_launches, compile_all, pytestmark  # noqa: E402, F401

FULL = os.environ.get("VITKERN_FULL") == "1"
TABLES = ("bias_table", "gain_table", "weight_table")


def of_grid(height, width, prefix=0, step=1, heads=2, names=TABLES, ratio=False):
    """The slots of tables on a grid, and the numbers of queries and keys that fit it."""
    entries = (2 * height - 1) * (2 * width - 1) + (3 if prefix else 0)
    slots = {name: torch.zeros(1, heads, 1, entries) for name in names}
    slots |= {"later_ratio": torch.zeros(())} if ratio else {}
    slots |= {"grid_height": height, "grid_width": width, "grid_prefix": prefix, "grid_step": step}
    queries = -(-height // step) * -(-width // step)
    return slots | {"queries": queries + prefix, "keys": height * width + prefix, "bias": None}


CASES = {
    "BEiT": dict(width=64, heads=12, **of_grid(14, 14, 1, heads=12, names=TABLES[:1])),
    "LeViT": dict(width=16, width_v=64, heads=8, **of_grid(14, 14, 0, 2, heads=8, names=TABLES[:1])),
    "a large map": dict(width=32, **of_grid(64, 64, names=TABLES[:1])),
    "factors": dict(width=64, **of_grid(14, 14, names=TABLES[1:], ratio=True)),
    "everything": dict(
        width=64, rule="table", means=True, **of_grid(14, 14, 1, ratio=True) | EVERY_TERM | {"bias": (0, 1, 1, 1)}
    ),
    "packed": dict(width=64, packed=True, dropout=0.1, **of_grid(14, 14, 1, ratio=True)),
    "policy": dict(width=64, policy=True, **of_grid(14, 14)),
    "wide": dict(width=256, **of_grid(14, 14, 1, ratio=True)),
    "best keys": dict(width=64, normalizer="argmax_k", **of_grid(14, 14, 1, ratio=True)),
}
RUNS = [
    ("BEiT", 90, torch.bfloat16), ("LeViT", 80, torch.bfloat16), ("everything", 90, torch.bfloat16),
    ("packed", 80, torch.bfloat16), ("best keys", 90, torch.bfloat16), ("BEiT", 80, torch.float32),
]  # fmt: skip
if FULL:
    RUNS = [(name, capability, torch.bfloat16) for name in CASES for capability in (80, 90)] + [
        ("BEiT", 100, torch.bfloat16), ("everything", 100, torch.float16), ("BEiT", 80, torch.float32),
        ("everything", 90, torch.float32), ("wide", 80, torch.float32),
    ]  # fmt: skip


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_tables_compile_without_spills(name, capability, dtype):
    case = CASES[name]
    seen = compile_all(attention_launches(capability, dtype, **case), f"{name}, sm_{capability}, {dtype}", capability)
    if name.startswith("best"):
        assert {"_choose", "_pair_weights", "_pair_products", "_entry_sums"} <= seen
        return
    assert {"_forward", "_backward_queries", "_backward_keys", "_backward_table", "_diagonals"} <= seen
    assert ("_backward_prefix" in seen) == (case["grid_prefix"] > 0)


def contextual(queries, keys, heads, rows, width, values=True, batch=2):
    slots = {"position_index": torch.zeros(1, queries, keys, dtype=torch.int32)}
    slots |= {
        "position_q": torch.zeros(batch, queries, heads, rows),
        "position_k": torch.zeros(batch, keys, heads, rows),
    }
    slots |= {"position_v": torch.zeros(1, 1, rows, width)} if values else {}
    return slots | {"queries": queries, "keys": keys, "heads": heads, "width": width, "bias": None}


POSITIONS = {
    "iRPE": contextual(197, 197, 6, 50, 64),
    "scores alone": contextual(197, 197, 6, 50, 64, values=False),
    "few queries": contextual(3, 4096, 2, 200, 32),
    "everything": contextual(197, 197, 2, 50, 64)
    | dict(rule="table", factors=True, **EVERY_TERM)
    | of_grid(14, 14, 1, names=TABLES[:1], ratio=True),
    "wide": contextual(197, 197, 2, 50, 256),
    "policy": contextual(197, 197, 2, 50, 64) | dict(policy=True, topk=9),
    "best queries": contextual(197, 197, 2, 50, 64) | dict(normalizer="argmax_q", factors=True),
}
POSITION_RUNS = [
    ("iRPE", 90, torch.bfloat16), ("few queries", 80, torch.bfloat16), ("best queries", 90, torch.bfloat16),
    ("everything", 100, torch.float16),
]  # fmt: skip
if FULL:
    POSITION_RUNS = [(name, capability, torch.bfloat16) for name in POSITIONS for capability in (80, 90)] + [
        ("iRPE", 100, torch.bfloat16), ("everything", 100, torch.float16), ("iRPE", 80, torch.float32),
        ("everything", 90, torch.float32), ("wide", 80, torch.float32),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, capability, dtype", POSITION_RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-")
)
def test_positions_compile_without_spills(name, capability, dtype):
    case = POSITIONS[name]
    seen = compile_all(attention_launches(capability, dtype, **case), f"{name}, sm_{capability}, {dtype}", capability)
    assert ("_row_products" in seen) == ("_table_sums" in seen) == ("position_v" in case)
    assert ("_pair_sums" if name.startswith("best") else "_position_sums") in seen


def mixed_factors(heads, queries, keys):
    names = ("gain", "weight", "early_gain", "early_weight")
    return {name: torch.zeros(1, heads, queries, keys) for name in names}


MIXED = {
    "mixed": dict(width=48, heads=16, mixed=True, **of_grid(14, 14, 1, heads=16, names=TABLES[:1])),
    "mixed, factors": dict(width=64, heads=8, mixed=True, bias=None, **mixed_factors(8, 257, 197)),
    "mixed, factors of keys": dict(width=64, heads=16, mixed=True, mask=True, dropout=0.1, **mixed_factors(16, 1, 197)),
    "mixed, factors of queries": dict(
        width=64, heads=16, mixed=True, packed=True, **mixed_factors(16, 257, 1), **EVERY_TERM
    ),
    "mixed, packed positions": dict(
        width=64, heads=16, mixed=True, packed=True, distances=True, grid=(14, 14), keys=196, mask=True, bias=None
    ),
    "mixed, positions": dict(width=32, heads=4, mixed=True, distances=True, path=(14, 14), grid=(14, 14))
    | contextual(196, 196, 4, 50, 32, values=False),
    "mixed, everything": dict(width=64, key_heads=8, mixed=True, rule="table", means=True)
    | of_grid(14, 14, 1, heads=16)
    | EVERY_TERM
    | {"heads": 16, "bias": (0, 1, 1, 1)}
    | mixed_factors(16, 197, 197),
}
CHOICES = {"topk": dict(topk=8), "argmax_k": dict(normalizer="argmax_k"), "argmax_q": dict(normalizer="argmax_q")}
MIXED_RUNS = [("mixed", 90, torch.bfloat16), ("mixed, positions", 80, torch.bfloat16)]
MIXED_RUNS += [("mixed, factors of keys", 90, torch.float32)]
CHOICE_RUNS = [("topk", 90), ("argmax_k", 80), ("argmax_q", 90)]
if FULL:
    MIXED_RUNS = [(name, capability, torch.bfloat16) for name in MIXED for capability in (80, 90)] + [
        ("mixed", 100, torch.bfloat16), ("mixed, everything", 90, torch.float32), ("mixed, factors", 90, torch.float32),
    ]  # fmt: skip
    MIXED_RUNS += [(name, 100, torch.float32) for name in MIXED if "factors of" in name or "packed" in name]
    CHOICE_RUNS = [(name, capability) for name in CHOICES for capability in (80, 90)]


@pytest.mark.parametrize(
    "name, capability, dtype", MIXED_RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-")
)
def test_mixed_heads_compile_without_spills(name, capability, dtype):
    case = MIXED[name]
    seen = compile_all(attention_launches(capability, dtype, **case), f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_heads_forward", "_heads_queries", "_heads_keys", "_heads_values", "_heads_bias"} <= seen
    assert ("_heads_sums" in seen) == ("factors of" in name)
    assert ("_map_offsets" in seen) == ("grid_step" in case) and ("_map_rows" in seen) == ("position_q" in case)


@pytest.mark.parametrize("name, capability", CHOICE_RUNS)
def test_choices_of_mixed_heads_compile_without_spills(name, capability):
    """What chooses, and the forward that reads it."""
    case = dict(width=64, heads=16, mixed=True, mask=True) | CHOICES[name]
    launches = attention_launches(capability, torch.bfloat16, **case)
    some = [
        x for x in launches if x[0].__name__ in ("_head_survivors", "_head_choices", "_heads_forward", "_heads_values")
    ]
    seen = compile_all(some, f"{name} of mixed heads, sm_{capability}", capability)
    assert ("_head_survivors" if name == "topk" else "_head_choices") in seen
