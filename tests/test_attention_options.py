"""attention: gathered keys and the convolution of the values, against loops."""

import math

import pytest
import torch
from test_attention import logits, output, qkv

import vitkern
from vitkern import DepthwiseValue

D = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "none"])
def test_every_query_has_keys_of_its_own(normalizer):
    """Repeats count twice, -1 names nothing, a row of -1 is empty."""
    q, k, v = qkv(6, 9, heads=4, kv_heads=4, grad=True)
    index = torch.randint(-1, 9, (2, 6, 5), generator=torch.Generator().manual_seed(1))
    index[0, 0, :2], index[1, 2] = 3, -1
    sample = torch.arange(2)[:, None, None]
    keys, values = (t[sample, index.clamp(min=0)] for t in (k, v))  # [B, Nq, K, H, D]
    s = torch.einsum("bihd,bijhd->bhij", q, keys) * q.shape[-1] ** -0.5
    none = (index < 0)[:, None]
    p = {
        "softmax": lambda: s.masked_fill(none, -math.inf).softmax(-1).nan_to_num(0.0),
        "sigmoid": lambda: s.sigmoid().masked_fill(none, 0.0),
        "relu": lambda: s.relu().masked_fill(none, 0.0),
        "none": lambda: s.masked_fill(none, 0.0),
    }[normalizer]()
    want = torch.einsum("bhij,bijhd->bihd", p, values)
    got = vitkern.attention(q, k, v, key_index=index, normalizer=normalizer)
    torch.testing.assert_close(got, want)
    full = index.clamp(min=0)  # the gradient of the loop's softmax over an empty row is NaN
    keys, values = (t[sample, full] for t in (k, v))
    p = (torch.einsum("bihd,bijhd->bhij", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    found = [
        torch.autograd.grad(t.sin().sum(), (q, k, v))
        for t in (vitkern.attention(q, k, v, key_index=full), torch.einsum("bhij,bijhd->bihd", p, values))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_values_of_the_neighbours_are_added(shared, prefix):
    grid, heads, width = (3, 4), 4, 6
    q, k, v = qkv(12 + prefix, 12 + prefix, heads=heads, kv_heads=2, grad=True)
    channels = width if shared else 2 * width
    weight, offset = drawn(channels, 1, 3, 5), drawn(channels, seed=1)
    got = vitkern.attention(q, k, v, lepe=DepthwiseValue(weight, offset, grid, prefix))
    want = torch.zeros(2, 12 + prefix, 2, width, dtype=D)
    for y in range(3):
        for x in range(4):
            for h in range(2):
                for c in range(width):
                    channel = c if shared else h * width + c
                    total = offset[channel]
                    for dy in range(-1, 2):
                        for dx in range(-2, 3):
                            if 0 <= y + dy < 3 and 0 <= x + dx < 4:
                                token = prefix + (y + dy) * 4 + x + dx
                                total = total + weight[channel, 0, dy + 1, dx + 2] * v[:, token, h, c]
                    want[:, prefix + y * 4 + x, h, c] = total
    torch.testing.assert_close(got, output(logits(q, k).softmax(-1), v) + want.repeat_interleave(2, 2))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(got.sin().sum(), (q, k, v, weight, offset)))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"key_index": torch.zeros(2, 5, 3)}, TypeError, "key_index must hold integers, got torch.float32"),
        (
            {"key_index": torch.zeros(2, 4, 3, dtype=torch.int32)},
            ValueError,
            r"key_index must have shape \[B or 1, Nq = 5, K\], got \[2, 4, 3\]",
        ),
        (
            {"key_index": torch.full((2, 5, 3), 5)},
            ValueError,
            r"key_index must lie in \[-1, 5\), the keys, got 5 to 5",
        ),
        ({"key_index": torch.zeros(2, 5, 3).int(), "topk": 2}, NotImplementedError, "key_index goes neither with topk"),
        ({"lepe": torch.zeros(8, 1, 3, 3)}, TypeError, "lepe must be a vitkern.DepthwiseValue or None, got Tensor"),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 3, 3), None, (2, 2))},
            ValueError,
            r"lepe DepthwiseValue.grid must hold the 5 tokens of v without the prefix, got \(2, 2\)",
        ),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 2, 2), None, (1, 5))},
            ValueError,
            r"lepe.weight must have shape \[12 or 6, 1, kh, kw\] with odd kh and kw, got \[6, 1, 2, 2\]",
        ),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 3, 3), torch.zeros(5), (1, 5))},
            ValueError,
            r"lepe.bias must have shape \[channels of lepe.weight\] = \[6\], got \[5\]",
        ),
    ],
)
def test_bad_input_gets_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        vitkern.attention(*qkv(5, 5), **options)
