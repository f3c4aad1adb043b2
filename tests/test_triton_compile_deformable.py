"""Ahead-of-time compilation of deformable attention's Triton kernels, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import deformable_attention as kernels  # noqa: E402

FOUR = [100, 134, 50, 67, 25, 34, 13, 17]
CASES = {
    "DETR": dict(shapes=FOUR, points=[4] * 4),
    "mixed points, nearest": dict(shapes=FOUR[:6], points=[3, 6, 3], apart=False, nearest=True, normalize=True),
    "one level, one head": dict(shapes=[1, 1], points=[4], heads=1, dim=10),
    "wide": dict(shapes=FOUR, points=[4] * 4, dim=256),
}
RUNS = [
    ("DETR", 80, torch.bfloat16), ("DETR", 90, torch.float32), ("DETR", 100, torch.float16),
    ("mixed points, nearest", 90, torch.bfloat16), ("one level, one head", 80, torch.float32), ("wide", 90, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_deformable_attention_compiles_without_spills(name, capability, dtype):
    def launch(shapes, points, heads=8, dim=32, apart=True, nearest=False, normalize=False):
        cells = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        value = torch.zeros(1, cells, heads, dim, dtype=dtype)
        places = (len(points), points[0]) if apart else (1, sum(points))
        locations, weights = torch.zeros(1, 20, heads, *places, 2), torch.zeros(1, 20, heads, *places)
        args = (value, locations, weights, shapes, points, nearest, normalize)
        kernels.bwd(kernels.fwd(*args), *args, 7)

    with caught(f"sm{capability}", kernels) as launches:
        launch(**CASES[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert {"_forward", "_places", "_cells"} <= seen
