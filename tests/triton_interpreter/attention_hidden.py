"""attention in Triton, interpreted on the CPU: masks in pairs, and NaN behind every kind of mask. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import FULL, HALF, arguments, check_op, small_tiles
from gpu_path import tokens_on_gpu
from hidden_cases import (
    HEADS_HIDE,
    HIDING,
    KEYS,
    LEARNED,
    PAIRS,
    QUERIES,
    check,
    hidden,
    learned,
    masks_of,
    mixed_in_front,
    seen_in_front,
)
from masked_systems import qkv

from vitkern import testing
from vitkern.mask import packed
from vitkern.testing import attention as registry
from vitkern.triton_kernels import _host


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    use = small_tiles(monkeypatch)
    use(16, 16)
    yield use
    _host.config.cache_clear()


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_two_masks_in_a_list_are_their_intersection(pair):
    tensors = qkv(QUERIES, KEYS, heads=2, kv=1)
    with tokens_on_gpu("triton"):
        check(
            "pair", tensors, lambda t: {"mask": masks_of(pair)}, (FULL, HALF)[PAIRS.index(pair) % 2], backend="triton"
        )


@pytest.mark.parametrize("kind", HIDING)
def test_nothing_around_the_inputs_nor_behind_a_mask_is_seen(kind):
    with tokens_on_gpu("triton"):
        hidden(kind, (FULL, HALF)[len(kind) % 2], "triton")


@pytest.mark.parametrize("kind", LEARNED)
def test_nothing_hidden_reaches_the_gradient_of_what_learns(kind):
    with tokens_on_gpu("triton"):
        learned(kind, "triton", FULL)


@pytest.mark.parametrize("place", ["logit", "prob"])
@pytest.mark.parametrize("kind", HEADS_HIDE)
def test_no_factor_that_a_head_hides_reaches_the_others(kind, place):
    with tokens_on_gpu("triton"):
        mixed_in_front(kind, place, "triton", FULL)


@pytest.mark.parametrize("place", ["logit", "prob"])
def test_a_factor_that_a_head_sees_reaches_the_others(place):
    with tokens_on_gpu("triton"):
        seen_in_front(place, "triton", FULL)


@pytest.mark.parametrize("shape", [(1, 2, 20, 70), (2, 1, 1, 70), (2, 2, 20, 70)], ids=str)
def test_words_of_images_heads_and_rows(shape):
    check_op(arguments(2, 20, 70, mask=packed(torch.rand(shape) < 0.4)))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_bits_of_tiles_of_any_width(block, tuned):
    """One word for several tiles, one for each, several for one; the last is not full."""
    tuned(16, block)
    with tokens_on_gpu("triton"):
        for modulation in ("", "heads"):
            call = registry.make(block, 2, 20, 150, d=4, masks="block", modulation=modulation)
            testing.assert_matches(testing.entries()["attention"], call, FULL, "triton")
