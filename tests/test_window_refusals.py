"""window_attention: what its further options refuse, in sentences. The others are in tests/test_window_attention.py."""

import pytest
import torch

import vitkern
from vitkern import DepthwiseValue, bias

Q = torch.zeros(2, 6, 6, 2, 8)
LINE = torch.zeros(2, 6, 2, 8)
STENCIL = torch.zeros(16, 1, 3, 3)
SHIFTS = torch.zeros(2, 2, dtype=torch.int32)
TWO = [(3, 3)] * 2
REFUSALS = [
    ("partition", ValueError, r"partition must be one of block, grid, unit, got 'rows'", Q, 3, {"partition": "rows"}),
    ("unit on a map", ValueError, r"partition='unit' needs a map of one axis of tokens, got 2", Q, 3,
     {"partition": "unit"}),
    ("unit that does not divide", ValueError, r"a unit of 4 queries and 4 keys must divide", LINE, 4,
     {"partition": "unit"}),
    ("shifted grid", ValueError, r"shift_size must be 0 with partition='grid', got 1", Q, (3, 3),
     {"shift_size": 1, "partition": "grid"}),
    ("shifted unit", ValueError, r"shift_size must be 0 with partition='unit', got 1", LINE, 3,
     {"shift_size": 1, "partition": "unit"}),
    ("shifted key grid", ValueError, r"shift_size must be 0 with a key grid of its own, got 1", Q, 3,
     {"shift_size": 1, "key_window_size": 3}),
    ("shifted halo", ValueError, r"shift_size must be 0 with context_size, got 1", Q, 3,
     {"shift_size": 1, "context_size": 5}),
    ("halo of a grid", ValueError, r"context_size must go with partition='block'", Q, 3,
     {"partition": "grid", "context_size": 5}),
    ("halo of 0", ValueError, r"context_size must be at least 1 on every axis, got 0", Q, 3, {"context_size": 0}),
    ("border", ValueError, r"context_border must be 'pad' or 'shift', got 'wrap'", Q, 3, {"context_border": "wrap"}),
    ("halo beyond the map", ValueError, r"must fit the map with context_border='shift', got 7 on 6", Q, 3,
     {"context_size": 7, "context_border": "shift"}),
    ("mean of a halo", ValueError, r"'key_mean' needs keys of one window each", Q, 3,
     {"context_size": 5, "return_stats": ("key_mean",)}),
    ("statistic", ValueError, r"return_stats must hold names of lse, key_mean, probs, logits", Q, 3,
     {"return_stats": ("row",)}),
    ("windows of keys", ValueError, r"got 2 of 3 queries on 6 and 3 of 2 keys on 6", Q, 3, {"key_window_size": 2}),
    ("further keys", ValueError, r"extra_kv must be a pair", Q, 3, {"extra_kv": torch.zeros(1)}),
    ("shape of further keys", ValueError, r"extra_kv v must have shape \['B or 1', 'E', 2, 8\], got \[1, 4, 2, 7\]", Q, 3,
     {"extra_kv": (torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 7))}),
    ("key mask", TypeError, r"key_mask must be bool, got torch.float32", Q, 3, {"key_mask": torch.ones(2, 6, 6)}),
    ("shape of the key mask", ValueError, r"key_mask must have shape", Q, 3,
     {"key_mask": torch.ones(2, 6, dtype=torch.bool)}),
    ("order of a map", ValueError, r"order needs one map of one axis", Q, 3, {"order": torch.arange(6)}),
    (
        "order with a halo", ValueError, r"got lengths \[6\], with further keys around the windows",
        Q[:, 0], 3, {"order": torch.arange(6), "context_size": 5},
    ),
    ("order twice", ValueError, r"order must be a permutation of the 6 tokens", LINE, 3,
     {"order": torch.tensor([0, 1, 2, 3, 4, 4])}),
    ("short order", ValueError, r"order must have shape \[L\] or \[B, L\] with L = 6, got \[5\]", LINE, 3,
     {"order": torch.arange(5)}),
    ("shifts", ValueError, r"shift_size must have shape \[B, axes\] = \[2, 2\], got \[2, 1\]", Q, 3,
     {"shift_size": torch.zeros(2, 1, dtype=torch.int32)}),
    ("shift too large", ValueError, r"shift_size must lie in \[0, window_size\)", Q, 3,
     {"shift_size": torch.full((2, 2), 3)}),
    ("shifts and pads", ValueError, r"needs block windows that divide one map", Q, 4, {"shift_size": SHIFTS}),
    ("floating shifts", TypeError, r"shift_size must hold integers, got torch.float32", Q, 3,
     {"shift_size": torch.zeros(2, 2)}),
    ("groups and heads", ValueError, r"3 head groups must cover the 2 heads of q evenly", Q, [(3, 3)] * 3, {}),
    ("groups of one count", ValueError, r"as many head groups each, got {'window_size': 2, 'shift_size': 1}", Q, TWO,
     {"shift_size": [(1, 1)]}),
    ("bias of groups", TypeError, r"bias of head groups must be PerHeadGroup", Q, TWO,
     {"bias": bias.KeyBias(torch.zeros(1, 1, 9))}),
    ("table of a halo", ValueError, r"bias.table must have 49 rows for windows \[3, 3\] in \[5, 5\], got 25", Q, 3,
     {"context_size": 5, "bias": bias.RelativePosition(torch.zeros(25, 2))}),
    ("convolution of a line", ValueError, r"lepe needs a map of two axes", LINE, 3, {"lepe": DepthwiseValue(STENCIL)}),
    ("convolution of a halo", ValueError, r"lepe needs windows of the queries' own tokens, got context_size=5", Q, 3,
     {"context_size": 5, "lepe": DepthwiseValue(STENCIL)}),
    ("scope", ValueError, r"lepe.scope must be 'map' or 'window', got 'image'", Q, 3,
     {"lepe": DepthwiseValue(STENCIL, scope="image")}),
    ("whole windows of too few axes", ValueError, r"one entry per map axis \(2\), got \(None,\)", Q, (None,), {}),
    ("bias", TypeError, r"bias must be a tensor, a modifier of vitkern.bias or a list of these, got str", Q, 3,
     {"bias": "table"}),
    ("unknown", TypeError, r"unexpected keyword argument 'windows'", Q, 3, {"windows": 3}),
]  # fmt: skip


@pytest.mark.parametrize("name, error, sentence, x, window, options", REFUSALS, ids=[r[0] for r in REFUSALS])
def test_refusals_name_the_argument_what_it_got_and_what_it_wanted(name, error, sentence, x, window, options):
    with pytest.raises(error, match=sentence):
        vitkern.window_attention(x, x, x, window, **options)


def test_shared_queries_have_the_sides_of_the_window():
    with pytest.raises(ValueError, match=r"q must have the sides of the window \[3, 3\] with shared_q, got \[2, 3\]"):
        vitkern.window_attention(Q[:, :2, :3], Q, Q, 3, shared_q=True)
    with pytest.raises(ValueError, match=r"k must have the batch of q, \[2\], got \[1\]"):
        vitkern.window_attention(Q, Q[:1], Q[:1], 3, partition="grid")
