"""Ahead-of-time compilation of the Triton kernels of chain sums and of the features they take (see test_triton_compile.py)."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import chain_links, chain_sum, feature_rows  # noqa: E402

RUNS = [
    ("retention", 90, dict(link="shared", depth=32, width=33)),
    ("mamba 2", 80, dict(link="shared", depth=128, width=65, reverse=True, packed=True)),
    ("gla", 90, dict(link="rows", depth=64, width=65)),
    ("the gradient of gla", 100, dict(link="columns", depth=65, width=64, reverse=True)),
    ("causal, wide", 80, dict(link="none", depth=256, width=257)),
    ("blocks", 100, dict(link="shared", depth=64, width=65, block=49, order=True, reverse=True, strict=True)),
]


@pytest.mark.parametrize("name, capability, options", RUNS, ids=[r[0].replace(" ", "-") for r in RUNS])
def test_chain_sum_compiles_without_spills(name, capability, options):
    def launch(link, depth, width, packed=False, reverse=False, strict=False, block=0, order=False):
        a, b, c = (torch.zeros(1, 400, 2, n, dtype=torch.float32) for n in (depth, depth, width))
        own = {"shared": 1, "rows": depth, "columns": width}.get(link)
        links = None if own is None else torch.zeros(1, 400, 2, own)
        cu = torch.zeros(4, dtype=torch.int32) if packed else None
        state = torch.zeros(3 if packed else 1, 2, depth, width)
        visits = torch.zeros(400, dtype=torch.int32) if order else None
        chain_sum.fwd(a, b, c, links, state, visits, cu, link == "columns", reverse, strict, block)
        if links is not None:
            chain_links.fwd(c, a, b, c, links, state, state, visits, cu, link == "columns", reverse, block)

    with caught(f"sm{capability}", chain_sum, chain_links) as launches:
        launch(**options)
    compile_all(launches, f"{name}, sm_{capability}", capability)


@pytest.mark.parametrize("name, capability, dtype", [
    ("relu", 80, torch.bfloat16), ("elu1", 90, torch.bfloat16), ("silu_norm", 100, torch.float16), ("softmax", 90, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("width", [32, 256])
def test_feature_rows_compile_without_spills(name, capability, dtype, width):
    x, mask = torch.zeros(2, 400, 3, width, dtype=dtype), torch.zeros(2, 400, dtype=torch.bool)
    args = (x, mask, torch.zeros(2, 400, 3), name, 0.5, 1.0)
    with caught(f"sm{capability}", feature_rows) as launches:
        out = feature_rows.fwd(*args)
        feature_rows.bwd(out, *args, 3)
    assert compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability) == {"_forward", "_backward"}
