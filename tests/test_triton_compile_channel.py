"""Ahead-of-time compilation of channel attention's Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import channel_attention  # noqa: E402

CHANNELS = {
    "XCiT": dict(d=48),
    "Restormer": dict(d=48, first=True, tokens=4096),
    "packed, top-k": dict(d=32, bounds=True, topk=[8, 16]),
    "windows, wide": dict(d=256, e=200, grid=True),
}


CHANNEL_RUNS = [(name, 80 if i % 2 else 90, torch.bfloat16) for i, name in enumerate(CHANNELS)] + [
    ("XCiT", 80, torch.float32), ("windows, wide", 90, torch.float32), ("packed, top-k", 100, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, capability, dtype", CHANNEL_RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-")
)
def test_channel_attention_compiles_without_spills(name, capability, dtype):
    def launch(d, e=None, tokens=400, first=False, bounds=False, topk=(), grid=False):
        side = 20 if grid else 1
        q, k, v = (torch.zeros(1, side, tokens // side, 2, n, dtype=dtype) for n in (d, e or d, e or d))
        if first:
            q, k, v = (t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in (q, k, v))
        mask = torch.zeros(1, side, tokens // side, dtype=torch.bool) if grid else None
        cu, order = (torch.zeros(n, dtype=torch.int32) if bounds else None for n in (4, tokens))
        mix = torch.ones(len(topk)) if topk else None
        args = (
            q,
            k,
            v,
            torch.ones(2),
            mix,
            mask,
            cu,
            order,
            True,
            "softmax",
            list(topk),
            [8, 8] if grid else [],
            1.0,
            1e-12,
        )
        out, gram, squares = channel_attention.fwd(*args)
        channel_attention.bwd(out, None, None, gram, squares, *args, 31)

    with caught(f"sm{capability}", channel_attention) as launches:
        launch(**CHANNELS[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_products", "_weights", "_apply", "_slopes"} <= seen
