"""Ahead-of-time compilation of the Triton kernels of neighbourhood attention, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import (  # noqa: E402
    _neighborhood_slots,
    neighborhood_attention,
    neighborhood_attention_bwd,
    neighborhood_av,
    neighborhood_qk,
)

WINDOWS = {
    "NAT": dict(lengths=(1, 28, 28), kernel=[1, 7, 7]),
    "DiNAT, wide": dict(lengths=(1, 56, 56), kernel=[1, 7, 7], dilation=[1, 8, 8], d=128, rpb=False),
    "everything": dict(
        lengths=(4, 9, 12), kernel=[3, 4, 5], stride=[2, 1, 3], causal=[1, 0, 0], d=48, mask=True, extras=9
    ),
    "zeros, d=256": dict(lengths=(1, 1, 200), kernel=[1, 1, 24], zero=True, d=256),
}
RUNS = [(name, 80 if i % 2 else 90, torch.bfloat16) for i, name in enumerate(WINDOWS)] + [
    ("NAT", 80, torch.float32), ("everything", 100, torch.float16), ("DiNAT, wide", 90, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_neighborhood_attention_compiles_without_spills(name, capability, dtype):
    def launch(
        lengths,
        kernel,
        dilation=(1, 1, 1),
        stride=(1, 1, 1),
        causal=(0, 0, 0),
        zero=False,
        d=32,
        rpb=True,
        mask=False,
        extras=0,
    ):
        q, dout = (torch.zeros(1, *lengths, 4, d, dtype=dtype) for _ in range(2))
        k, v = (torch.zeros(1, *lengths, 2, d, dtype=dtype) for _ in range(2))
        bias = torch.zeros(4, *(2 * n - 1 for n in kernel)) if rpb else None
        hidden = torch.zeros(1, *lengths, dtype=torch.bool) if mask else None
        more = [torch.zeros(1, extras, 2, d, dtype=dtype) if extras else None for _ in range(2)]
        window = (kernel, list(dilation), list(stride), list(causal), zero)
        args = (q, k, v, bias, hidden, *more, *window, 1.0)
        out, lse = neighborhood_attention.fwd(*args)
        neighborhood_attention.bwd(dout, lse, lse, *args, 63)
        scores = neighborhood_qk.fwd(q, k, bias, *window, 1.0)
        neighborhood_qk.bwd(scores, q, k, bias, *window, 1.0, 7)
        neighborhood_av.bwd(neighborhood_av.fwd(scores, v, *window), scores, v, *window, 3)

    with caught(f"sm{capability}", neighborhood_attention, neighborhood_attention_bwd, _neighborhood_slots) as launches:
        launch(**WINDOWS[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_forward", "_backward_queries", "_backward_keys", "_scores", "_apply", "_spread"} <= seen
