"""mask_from_logits in Triton, interpreted on the CPU: the cells of the definition, from the public function down. Run by
tests/test_triton.py."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.mask import FromLogits, unpacked
from vitkern.testing.mask_from_logits import make
from vitkern.triton_kernels import mask_from_logits as kernels

ENTRY = testing.entries()["mask_from_logits"]


@pytest.fixture(autouse=True)
def interpreted():
    with tokens_on_gpu("triton"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ENTRY.small(), ids=str)
def test_small_calls(call, dtype):
    testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("seed", range(6))
def test_sampled_calls(seed):
    testing.assert_matches(ENTRY, ENTRY.draw(random.Random(f"triton {seed}")), torch.float32, "triton")


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(
    "options", [{"shift": -20}, {"shift": -40}, {"shift": -40, "empty": "none", "open_rows": True}], ids=str
)
def test_rows_of_several_blocks(block, options, monkeypatch):
    """The last of which is not full; what one block sees counts for all."""
    monkeypatch.setattr(kernels, "MAX_BLOCK", block)
    for sides, around in (((8, 12), (0, 0, 0, 0)), ((7, 9), (1, 2, 67, 70))):
        call = make(3, 2, 6, sides, (16, 6), around=around, **options)
        testing.assert_matches(ENTRY, call, torch.float32, "triton")


def test_every_rounding_is_that_of_float32_without_fused_products():
    """A threshold at the very number of a cell: columns after rows, each product rounded."""
    logits = torch.randn(1, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    size = (11, 13)

    def places(to, among):
        at = (torch.tensor(among / to) * (torch.arange(to) + 0.5) - 0.5).clamp(min=0)
        first = at.long().clamp(max=among - 1)
        return first, (first + 1).clamp(max=among - 1), at - first

    top, below, down = places(size[0], 5)
    left, right, across = places(size[1], 7)
    line = logits[0, 0, top] * (1 - down[:, None]) + logits[0, 0, below] * down[:, None]
    cells = (line[:, left] * (1 - across) + line[:, right] * across).flatten()
    for threshold in cells[::4].tolist():
        for inclusive in (True, False):
            got = kernels.fwd(logits, None, *size, threshold, False, inclusive, 1, len(cells), 0, 0)
            assert torch.equal(unpacked(got[0, 0], len(cells)), cells >= threshold if inclusive else cells > threshold)


def test_attention_with_predicted_masks_is_that_with_their_cells():
    g = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(2, n, 2, 16, generator=g) for n in (5, 48, 48))
    logits, opened = torch.randn(2, 3, 4, 5, generator=g) - 1, torch.rand(2, 3, generator=g) < 0.5
    m = FromLogits(logits, (6, 7), inclusive=False, rows=(1, 4), cols=(2, 44), open_rows=opened)
    assert torch.equal(vitkern.attention(q, k, v, mask=m), vitkern.attention(q, k, v, mask=m.dense(q, k)))


def test_refusals_are_sentences():
    def why(shape, height=2, width=2, dtype=torch.float32):
        logits = torch.zeros(()).to(dtype).expand(shape)
        return kernels.supported(logits, None, height, width, 0.0, True, True, shape[1], height * width, 0, 0)

    assert why((1, 1, 2, 2)) == []
    assert why((1, 1, 0, 2), dtype=torch.float64) == [
        "logits must hold a cell",
        "logits must be float32, bfloat16 or float16, got torch.float64",
    ]
    assert why((1, 1, 2, 2), 2**15, 2**15) == ["there may be fewer than 2^30 keys, got 1073741824"]
    assert why((1, 1, 1, 2**24)) == ["a side may have fewer than 2^24 cells, got [1, 16777216] and 2 x 2"]
