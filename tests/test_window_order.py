"""window_order: against transformers' Qwen2.5-VL, LION's two orders, and windows of padded maps."""

import math

import libraries  # noqa: F401
import pytest
import torch
from agreement import agree

import vitkern


@pytest.mark.parametrize("grids", [[(1, 8, 8)], [(2, 6, 10), (1, 14, 4)], [(1, 2, 2), (3, 18, 22)]])
def test_the_windows_of_qwen(grids):
    """Units of 2 x 2 patches in windows of 4 x 4 units, images and frames one behind the other."""
    index = pytest.importorskip("transformers.vision_utils").get_vision_window_index
    want, bounds = index(torch.tensor(grids), spatial_merge_size=2, window_size=112, patch_size=14)
    frames = [(h // 2, w // 2) for t, h, w in grids for _ in range(t)]
    order, cu_seqlens = vitkern.window_order(frames, 4, major="y")
    assert order.dtype == cu_seqlens.dtype == torch.int32
    assert torch.equal(order.long(), want)
    assert torch.equal(cu_seqlens * 4, bounds)


@pytest.mark.parametrize("major", ["x", "y"])
@pytest.mark.parametrize("lengths", [(4, 6), (5, 7), (2, 3)])
def test_packed_windows_are_those_of_a_map_whose_pads_are_hidden(lengths, major):
    maps = [torch.randn(2, *lengths, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    want = vitkern.window_attention(*maps, (2, 3))
    order, cu_seqlens = vitkern.window_order([lengths] * 2, (2, 3), major=major)
    q, k, v = (t.flatten(0, 2)[order] for t in maps)
    out = vitkern.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, 6, 6)
    agree(out[order.argsort()].view(want.shape), want, maps)


@pytest.mark.parametrize("major", ["x", "y", "z"])
def test_sparse_voxels_by_a_search(major):
    """Windows, and tokens inside them, in the order of their coordinates with the major one first; some voxels share a place."""
    generator = torch.Generator().manual_seed(1)
    coords = torch.stack(
        [torch.randint(low, high, (200,), generator=generator) for low, high in ((0, 3), (-4, 5), (0, 9), (2, 8))], 1
    )
    window, shift = (3, 4, 2), (0, 2, 1)
    order, cu_seqlens = vitkern.window_order(coords, window, shift, major)
    first = {"x": (2, 1, 0), "y": (1, 2, 0), "z": (0, 2, 1)}[major]

    def key(token):
        sample, *at = coords[token].tolist()
        moved = [c + s for c, s in zip(at, shift, strict=True)]
        return sample, [moved[a] // window[a] for a in first], [moved[a] % window[a] for a in first]

    want = sorted(range(200), key=key)
    assert order.tolist() == want
    windows = [key(token)[:2] for token in want]
    starts = [i for i in range(200) if i == 0 or windows[i] != windows[i - 1]]
    assert cu_seqlens.tolist() == [*starts, 200]


def test_no_token_has_no_window():
    order, cu_seqlens = vitkern.window_order(torch.zeros(0, 3, dtype=torch.int32), 4)
    assert order.tolist() == [] and cu_seqlens.tolist() == [0]


REFUSALS = [
    ("sides", ValueError, r"grid must hold 1 to 4 sides", ([], 2), {}),
    ("mixed", ValueError, r"grid must hold 1 to 4 sides", ([(2, 2), (2, 2, 2)], 2), {}),
    ("empty side", ValueError, r"grid must be at least 1, got 0", ((2, 0), 2), {}),
    ("floats", TypeError, r"grid must hold integers", (torch.zeros(3, 2), 2), {}),
    ("rank", ValueError, r"grid must be coordinates \[T, axes\]", (torch.zeros(3, dtype=torch.int64), 2), {}),
    (
        "columns",
        ValueError,
        r"a column for each axis of window_size, or one more",
        (torch.zeros(3, 4, dtype=torch.int64), (2, 2)),
        {},
    ),
    ("shift", ValueError, r"needs 0 <= shift_size < window_size, got 2 and 2", ((4, 4), 2, 2), {}),
    ("major", ValueError, r"major must be one of x, y on 2 axes, got 'z'", ((4, 4), 2), {"major": "z"}),
    ("window", ValueError, r"window_size must be an int or have one entry per map axis \(2\)", ((4, 4), (2, 2, 2)), {}),
]


@pytest.mark.parametrize("name, error, sentence, args, options", REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals_name_the_argument_what_it_got_and_what_it_wanted(name, error, sentence, args, options):
    with pytest.raises(error, match=sentence):
        vitkern.window_order(*args, **options)


def test_windows_hold_at_most_their_cells():
    for lengths, window in (((7, 9), (3, 4)), ((5, 6, 7), (2, 3, 4))):
        order, cu_seqlens = vitkern.window_order(lengths, window)
        assert sorted(order.tolist()) == list(range(math.prod(lengths)))
        assert int(cu_seqlens.diff().max()) <= math.prod(window) and int(cu_seqlens.diff().min()) > 0
