"""Ahead-of-time compilation of sampled window attention's Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import deformable_attention, sampled_window_attention, sampled_window_attention_bwd  # noqa: E402

CASES = {
    "VSA": dict(index=True, heads=3, kv_heads=3, groups=3, d=32),
    "RVSA": dict(groups=8, of_window=True),
    "RVSA-128": dict(groups=8, of_window=True, d=128),
    "everything": dict(
        window=(3, 5), samples=40, groups=4, apart=True, mask=True, heads=4, kv_heads=2, d=24, bias=True
    ),
    "wide": dict(d=256, groups=1),
}
RUNS = [
    ("VSA", 80, torch.bfloat16), ("VSA", 90, torch.float32), ("RVSA", 90, torch.bfloat16), ("RVSA", 80, torch.float32),
    ("everything", 100, torch.float16), ("everything", 80, torch.float32), ("RVSA-128", 80, torch.float16),
    ("wide", 90, torch.bfloat16), ("wide", 80, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", ""))
def test_sampled_window_attention_compiles_without_spills(name, capability, dtype):
    def launch(window=(7, 7), samples=49, heads=4, kv_heads=4, groups=4, d=64, apart=False, mask=False, **given):
        q = torch.zeros(1, 14, 21, heads, d, dtype=dtype)
        k, v = (torch.zeros(1, 14, 21, kv_heads, d, dtype=dtype) for _ in range(2))
        counts, n = [-(-length // w) for length, w in zip((14, 21), window, strict=True)], window[0] * window[1]
        coords, coords_v = (torch.zeros(1, *counts, samples, groups, 2) for _ in range(2))
        of_window = torch.zeros(1, counts[0] * counts[1], heads, n, samples) if "of_window" in given else None
        bias = torch.zeros(heads, n, samples) if "bias" in given else None
        index = torch.zeros(n, samples, dtype=torch.int32) if "index" in given else None
        if index is not None:
            bias = torch.zeros(169, heads)
        args = (q, k, v, coords, coords_v if apart else None, of_window, bias, index, list(window), 1.0, mask)
        sampled_window_attention.bwd(sampled_window_attention.fwd(*args), *args, 127)

    with caught(
        f"sm{capability}", deformable_attention, sampled_window_attention, sampled_window_attention_bwd
    ) as launches:
        launch(**CASES[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_forward", "_queries", "_samples", "_places", "_cells"} <= seen
    assert ("_bias" in seen) == (name != "wide")
