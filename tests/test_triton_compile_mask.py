"""Ahead-of-time compilation of the Triton kernel of predicted masks, as tests/test_triton_compile.py has it."""

import pytest
import torch

pytest.importorskip("triton")
from test_triton_compile import caught, compile_all, pytestmark  # noqa: E402, F401

from vitkern.triton_kernels import mask_from_logits  # noqa: E402


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_from_logits_compiles_without_spills(capability, dtype):
    """The three levels of Mask2Former, a map that keeps its size, and rows of EoMT."""
    logits, opened = torch.zeros(2, 100, 64, 64, dtype=dtype), torch.zeros(2, 100, dtype=torch.bool)
    with caught(f"sm{capability}", mask_from_logits) as launches:
        for side in (8, 16, 32, 64, 128):
            mask_from_logits.fwd(logits, None, side, side, 0.0, True, True, 100, side * side, 0, 0)
        mask_from_logits.fwd(logits, opened, 40, 40, 0.0, False, False, 1701, 1701, 0, 101)
    seen = compile_all(launches, f"predicted masks, sm_{capability}, {dtype}", capability)
    assert len(launches) == 6 and seen == {"_seen"}
