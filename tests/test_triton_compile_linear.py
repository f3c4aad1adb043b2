"""Ahead-of-time compilation of linear attention's Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import (  # noqa: E402
    linear_attention,
    linear_attention_bwd,
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
}
RUNS = [(name, 80 if i % 2 else 90, torch.bfloat16) for i, name in enumerate(CASES)] + [
    ("plain", 100, torch.float16), ("MLLA", 80, torch.bfloat16), ("64", 90, torch.float32), ("wide", 80, torch.float32),
]  # fmt: skip


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
    args = linear_attention.Call(**given)
    form = linear_pairs if pairs else linear_attention
    assert not [why for why in form.supported(*args) if "CUDA tensors" not in why]
    with caught(f"sm{capability}", linear_attention, linear_attention_bwd, linear_pairs, linear_pairs_bwd) as launches:
        out, *saved = form.fwd(*args)
        form.bwd(out, None, None, *saved, *args, -1)
    return launches


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_compiles_without_spills(name, capability, dtype):
    seen = compile_all(launches_of(capability, dtype, **CASES[name]), f"{name}, sm_{capability}, {dtype}", capability)
    wanted = {"_key_states", "_queries", "_query_grads", "_state_grads", "_key_grads"}
    assert wanted <= seen and ("_key_lse" in seen) == (name == "softmax")


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
