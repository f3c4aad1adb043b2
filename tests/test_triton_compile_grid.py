"""Ahead-of-time compilation of the Triton kernels of grid sums, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import grid_links, grid_sum  # noqa: E402

RUNS = [
    ("manhattan", 90, dict(depth=32, width=33, constant=True)),
    ("polyline", 80, dict(depth=257, width=256)),
    ("turned", 100, dict(depth=33, width=40, turned=True)),
]


@pytest.mark.parametrize("name, capability, options", RUNS, ids=[r[0].replace(" ", "-") for r in RUNS])
def test_grid_sum_compiles_without_spills(name, capability, options):
    def launch(depth, width, turned=False, constant=False):
        a, b, c = (torch.zeros(1, 20, 24, 2, n, dtype=torch.float32) for n in (depth, depth, width))
        rates = (torch.zeros(2).expand(1, 20, 24, 2) if constant else torch.zeros(1, 20, 24, 2) for _ in "rc")
        row, col = rates
        grid_sum.fwd(a, b, c, row, col, turned)
        grid_links.fwd(c, a, b, c, row, col, turned)

    with caught(f"sm{capability}", grid_sum, grid_links) as launches:
        launch(**options)
    of_each = {kernel.__name__: (kernel, arguments) for kernel, arguments in launches}
    assert len(of_each) == 3
    compile_all(of_each.values(), f"{name}, sm_{capability}", capability)
