"""Ahead-of-time compilation of the scans' Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import selective_scan, selective_scan_bwd  # noqa: E402

SCANS = {
    "VMamba": dict(channels=192, states=16, count=4),
    "VMamba, one state": dict(channels=96, states=1, count=4),
    "Vim": dict(channels=384, states=16, count=2, own=True, gate=True, packed=True, first=True),
    "wide": dict(channels=64, states=256, count=1, groups=4, gate=True, reduce="stack"),
}
SCAN_RUNS = [
    ("VMamba", 80, torch.bfloat16), ("VMamba, one state", 90, torch.bfloat16), ("Vim", 90, torch.float32),
    ("Vim", 100, torch.float16), ("wide", 80, torch.float32), ("wide", 90, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, capability, dtype", SCAN_RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-")
)
def test_selective_scan_compiles_without_spills(name, capability, dtype):
    def launch(channels, states, count, groups=1, own=False, gate=False, packed=False, first=False, reduce="sum"):
        batch, length = 1 if packed else 2, 200
        u = torch.zeros(batch, length, count if own else 1, channels, dtype=dtype)
        rows = torch.zeros(batch, length, count, channels, dtype=dtype)
        b = torch.zeros(batch, length, count, groups, states, dtype=dtype)
        small = [torch.zeros(count, channels) for _ in range(2)]
        state = torch.zeros(batch, count, 3 if packed else 1, channels, states) if first else None
        bounds = torch.zeros(4, dtype=torch.int32) if packed else None
        z, routes = u if gate else None, torch.zeros(count, length, dtype=torch.int32)
        a = torch.zeros(count, channels, states)
        args = (u, rows, a, b, b, small[0], z, small[1], state, None, routes, bounds, True, reduce)
        last, out = selective_scan.fwd(*args)
        selective_scan.bwd(last, out, out, *args, 511)

    with caught(f"sm{capability}", selective_scan, selective_scan_bwd) as launches:
        launch(**SCANS[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_scan", "_join", "_scan_grads", "_add_parts"} <= seen and ("_gate_grads" in seen) == (
        "gate" in SCANS[name]
    )
