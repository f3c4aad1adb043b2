"""attention at the sizes and extremes that models bring: twelve heads, long sequences among short ones, biases of ten thousands,
statistics that learn."""

import math

import pytest
import torch
from agreement import agree
from masked_systems import normal, qkv, scores, softmax

import vitkern
from vitkern import testing
from vitkern.mask import FromLogits
from vitkern.testing import attention as calls

ENTRY = testing.entries()["attention"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twelve_heads_of_sixty_four_channels(dtype):
    call = calls.make(1, 1, 197, 197, heads=12, d=64, bias=(0, 1, 1, 1), masks="dense")
    testing.assert_matches(ENTRY, call, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_of_ten_thousands_among_others_in_one_row(dtype):
    tensors = qkv(18, 37, heads=4, kv=2)
    far = torch.randint(-1, 2, (1, 4, 18, 37), generator=torch.Generator().manual_seed(1)) * 1e4
    far[..., 5, :], far[..., 6, :] = -1e4, 1e4  # rows that are all far away
    tensors["bias"] = normal(1, 4, 18, 37, seed=7) + far.double()
    call = testing.Call(
        "far",
        vitkern.attention,
        lambda t: ((t["q"], t["k"], t["v"]), {"bias": t["bias"]}),
        tensors,
        frozenset({"bias"}),
    )
    testing.assert_matches(ENTRY, call, dtype, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_sequences_are_a_padded_batch(backend):
    """Of 200 tokens, one, 64 and none, against one dense call in which a mask hides the pads."""
    lengths = (200, 1, 64, 0)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (normal(265, 2, 8, seed=i).requires_grad_() for i in range(3))
    got = vitkern.attention_varlen(q, k, v, bounds, bounds, 200, 200, backend=backend)
    real = torch.arange(200) < torch.tensor(lengths)[:, None]

    def padded(t):
        whole = t.new_zeros((4, 200, 2, 8))
        return whole.masked_scatter(real[..., None, None].expand_as(whole), t)

    rows = [padded(t) for t in (q, k, v)]
    agree(got, vitkern.attention(*rows, mask=real[:, None, None], backend=backend)[real], (q, k, v))


@pytest.mark.parametrize("empty", ["full", "none"])
def test_masks_of_sixty_four_squared_on_another_grid(empty):
    logits = normal(1, 18, 64, 64, seed=3)
    logits[:, 4] = -1.0  # sees nothing
    opened = torch.zeros(1, 18, dtype=torch.bool)
    tensors = qkv(18, 16 * 24, batch=1)
    options = {"mask": FromLogits(logits.float(), (16, 24), empty=empty, open_rows=opened)}
    call = testing.Call("logits", vitkern.attention, lambda t: ((t["q"], t["k"], t["v"]), options), tensors)
    testing.assert_matches(ENTRY, call, torch.float32, "cpu")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_mean_of_the_scores_learns_beside_dropout(backend):
    q, k, v = (t.requires_grad_() for t in qkv(6, 9, heads=3).values())
    out, stats = vitkern.attention(
        q, k, v, dropout_p=0.3, dropout_seed=5, return_stats=("logits_mean",), backend=backend
    )
    agree(stats.logits_mean, scores(q, k).mean(1), (q, k))
    alone = vitkern.attention(q, k, v, dropout_p=0.3, dropout_seed=5, backend=backend)
    agree(out, alone, (q, k, v))


def test_stored_scores_learn():
    q, k, v = (t.requires_grad_() for t in qkv(6, 9, heads=3).values())
    seen = torch.ones(6, 9, dtype=torch.bool).tril(3)
    out, stats = vitkern.attention(q, k, v, mask=seen, return_stats=("logits",))
    agree(stats.logits, scores(q, k), (q, k))
    s = scores(q, k).masked_fill(~seen, -math.inf)
    agree(out.sum() + stats.logits.sin().sum(), softmax(s, v).sum() + scores(q, k).sin().sum(), (q, k, v))
