"""Ahead-of-time compilation of linear attention's Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import (  # noqa: E402
    linear_attention,
    linear_attention_bwd,
    linear_maps,
    linear_maps_bwd,
    linear_pairs,
    linear_pairs_bwd,
)

CASES = {
    "plain": dict(width=32),
    "64": dict(width=64, feature_map="elu1", mask=True, weight=True),
    "MLLA": dict(width=32, feature_map="elu1", normalizer="mean", rope=True),
    "softmax": dict(width=64, feature_map="softmax", normalizer="none"),
    "norms": dict(width=72, feature_map="silu_norm", normalizer="abs_max"),
    "InLine": dict(width=32, feature_map="identity", normalizer="subtract", packed=True),
    "wide": dict(width=128, width_v=200, feature_map="exp", normalizer="max"),
    "widest": dict(width=256, feature_map="elu1"),
    "turned": dict(width=256, feature_map="elu1", mask=True, rope=True),
    "FLatten": dict(width=32, feature_map="focused_width", normalizer="mean", mask=True),
    "focused": dict(width=128, feature_map="focused_head", weight=True, packed=True),
    "PolaFormer": dict(width=32, feature_map="polar", normalizer="mean"),
    "polar": dict(width=128, feature_map="polar", mask=True),
    "Hedgehog": dict(width=64, feature_map="hedgehog_joint", rank=64, mask=True),
    "LoLCATs": dict(width=128, feature_map="hedgehog_split", rank=128, weight=True),
    "exp": dict(width=64, feature_map="hedgehog_exp", rank=64, rope=True),
    "Performer": dict(width=64, feature_map="favor", rank=128, mask=True, weight=True),
    "positive": dict(width=64, feature_map="favor_relu", rank=128, mask=True, weight=True),
    "ShiftAddViT": dict(width=64, feature_map="sign", normalizer="abs_max"),
    "EcoFormer": dict(width=32, feature_map="hash", rank=25, bits=16, mask=True),
    "hash": dict(width=64, feature_map="hash", rank=64, bits=64, mask=True, weight=True),
}
RUNS = [(name, 80 if i % 2 else 90, torch.bfloat16) for i, name in enumerate(CASES)] + [
    ("plain", 100, torch.float16), ("MLLA", 80, torch.bfloat16), ("64", 90, torch.float32), ("wide", 80, torch.float32),
    ("widest", 90, torch.float32), ("turned", 80, torch.float32), ("focused", 80, torch.float32), ("polar", 90, torch.float32),
    ("LoLCATs", 80, torch.float32), ("positive", 80, torch.float32), ("hash", 80, torch.float32), ("exp", 90, torch.float32),
    ("PolaFormer", 100, torch.float16), ("FLatten", 100, torch.float16), ("Performer", 100, torch.bfloat16),
    ("EcoFormer", 100, torch.bfloat16), ("LoLCATs", 100, torch.float32), ("turned", 100, torch.float32),
]  # fmt: skip
MORE = {
    "softmax": {"_key_lse"},
    "focused_width": {"_lengths", "_channel_grads"},
    "focused_head": {"_channel_grads"},
    "polar": {"_channel_grads"},
    "hedgehog_joint": {"_projection_grads"},
    "hedgehog_split": {"_projection_grads"},
    "hedgehog_exp": {"_projection_grads"},
    "favor": {"_tops", "_projection_grads"},
    "favor_relu": {"_projection_grads"},
    "hash": {"_spreads", "_hash_grads"},
}


def parameters_of(name, heads, width, rank, bits):
    """The tensors of a feature map; `rank`: the rows of its matrix, `bits` of "hash"."""
    shapes = {
        "focused_width": [(heads, width)],
        "focused_head": [(heads, width)],
        "polar": [(heads, width)] * 2,
        "favor": [(rank, width)],
        "favor_relu": [(rank, width)],
        "hash": [(heads, rank, width), (heads, rank, bits), (heads, rank)],
    }
    if name.startswith("hedgehog"):
        shapes[name] = [(heads, rank, width), (heads, rank)]
    return {f"map{i}": torch.zeros(shape) for i, shape in enumerate(shapes.get(name, ()))}


def launches_of(
    capability,
    dtype,
    width,
    width_v=None,
    feature_map="relu",
    normalizer="sum",
    mask=False,
    weight=False,
    rope=False,
    packed=False,
    tokens=4096,
    pairs=False,
    rank=0,
    bits=0,
):
    heads = 2
    q, k, v = (torch.zeros(1, 1, 1, 1, tokens, heads, w, dtype=dtype) for w in (width, width, width_v or width))
    given = dict.fromkeys(linear_attention.Call._fields) | {"q": q, "k": k, "v": v}
    given |= {
        "feature_map": feature_map,
        "rate": 0.5,
        "normalizer": normalizer,
        "eps": 1e-6,
        "scale": 1.0,
        "offset": 0.5,
    }
    given |= {"half": False, "detach": False, "pairs": pairs}
    if mask:
        given["key_mask"] = torch.zeros(k.shape[:5], dtype=torch.bool)
    if weight:
        given["key_weight"] = torch.zeros(k.shape[:6])
    if rope:
        given |= {f"{t}_{x}": torch.zeros(1, tokens, heads, width // 2) for t in ("cos", "sin") for x in "qk"}
    if packed:
        given |= {name: torch.zeros(9, dtype=torch.int32) for name in ("cu_q", "cu_k")}
    given |= parameters_of(feature_map, heads, width, rank, bits)
    args = linear_attention.Call(**given)
    form = linear_pairs if pairs else linear_attention
    assert not [why for why in form.supported(*args) if "CUDA tensors" not in why]
    modules = (linear_attention, linear_attention_bwd, linear_maps, linear_maps_bwd, linear_pairs, linear_pairs_bwd)
    with caught(f"sm{capability}", *modules) as launches:
        out, *saved = form.fwd(*args)
        form.bwd(out, None, None, *saved, *args, -1)
    return launches


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_compiles_without_spills(name, capability, dtype):
    seen = compile_all(launches_of(capability, dtype, **CASES[name]), f"{name}, sm_{capability}, {dtype}", capability)
    wanted = {"_key_states", "_queries", "_query_grads", "_state_grads", "_key_grads"}
    more = MORE.get(CASES[name].get("feature_map", "relu"), set())
    assert seen - {"_add_parts"} == wanted | more


FEW = {
    "window": dict(width=32, tokens=16, feature_map="elu1", normalizer="mean"),
    "32": dict(width=32, tokens=30, feature_map="silu_norm", normalizer="subtract", weight=True),
    "64": dict(width=64, tokens=49, mask=True, weight=True),
    "norms": dict(width=72, tokens=64, feature_map="silu_norm", normalizer="abs_max"),
    "wide": dict(width=128, width_v=100, tokens=120, feature_map="identity", normalizer="subtract", mask=True),
    "long": dict(width=128, tokens=256, feature_map="exp", normalizer="max", weight=True),
}
FEW_RUNS = [(name, 90 if i % 2 else 80, torch.bfloat16) for i, name in enumerate(FEW)] + [
    ("window", 100, torch.float16), ("64", 80, torch.float32), ("32", 90, torch.float32), ("64", 100, torch.float32),
    ("long", 100, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("name, capability, dtype", FEW_RUNS, ids=lambda x: str(x).replace("torch.", ""))
def test_sums_over_all_pairs_compile_without_spills(name, capability, dtype):
    launches = launches_of(capability, dtype, pairs=True, **FEW[name])
    assert compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability) == {"_pairs", "_pair_grads"}
