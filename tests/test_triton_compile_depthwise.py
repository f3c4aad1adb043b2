"""Ahead-of-time compilation of the Triton kernels of depthwise_value (see test_triton_compile.py)."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import _reduce, depthwise_value  # noqa: E402


@pytest.mark.parametrize("capability, dtype, sides, bias", [
    (80, torch.bfloat16, (3, 3), True), (90, torch.float32, (5, 5), True), (90, torch.bfloat16, (7, 7), False),
    (100, torch.float16, (3, 5), True),
])  # fmt: skip
def test_depthwise_value_compiles_without_spills(capability, dtype, sides, bias):
    v, weight = torch.zeros(8, 56 * 56, 3, 32, dtype=dtype), torch.zeros(96, 1, *sides)
    args = v, weight, torch.zeros(96) if bias else None, (56, 56)
    with caught(f"sm{capability}", depthwise_value, _reduce) as launches:
        depthwise_value.bwd(depthwise_value.fwd(*args), *args, 7)
    assert compile_all(launches, f"{sides}, sm_{capability}, {dtype}", capability) == {
        "_slide",
        "_weights",
        "_add_parts",
    }
