"""attention over the lengths, head sizes and dtypes of the models it serves, and against FlexAttention."""

import math

import pytest
import torch
from test_attention import qkv
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import vitkern
from vitkern import bias, mask, testing
from vitkern.reference.attention import attention as reference
from vitkern.testing import attention as registry

ENTRY = testing.entries()["attention"]
LENGTHS = (0, 1, 7, 49, 64, 65, 127, 128, 129, 192, 196, 197, 257, 320, 577, 704, 1370)
WIDTHS = (1, 8, 16, 24, 32, 48, 64, 72, 80, 88, 96, 128, 256)
PATTERNS = [(b, h, q, k) for b in (0, 1) for h in (0, 1) for q in (0, 1) for k in (0, 1)]


@pytest.mark.parametrize("place", range(len(LENGTHS)))
def test_every_length_of_queries_meets_others_of_keys(place):
    for step in (0, 5):
        queries, keys = LENGTHS[place], LENGTHS[(place + step) % len(LENGTHS)]
        call = registry.make(place, 1, queries, keys, heads=3, kv_heads=1, d=8, dv=5, bias=(0, 0, 1, 1), masks="dense")
        testing.assert_matches(ENTRY, call, (torch.float32, torch.bfloat16)[step % 2], "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", range(len(WIDTHS)), ids=lambda n: str(WIDTHS[n]))
def test_every_width(place, dtype):
    call = registry.make(
        place, 2, 33, 17, heads=2, d=WIDTHS[place], dv=WIDTHS[-1 - place], bias=(1, 0, 1, 1), masks="causal"
    )
    testing.assert_matches(ENTRY, call, dtype, "cpu")


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_any_pattern_is_read_in_its_own_dtype(dtype, q_dtype):
    """A bias of one number for all scores has a gradient of 0 under softmax: sigmoid there."""
    for seed, pattern in enumerate(PATTERNS):
        normalizer = "softmax" if any(pattern[2:]) else "sigmoid"
        q, k, v = qkv(9, 11, heads=4, kv_heads=2, dtype=q_dtype, grad=True)
        shape = [n if has else 1 for n, has in zip((2, 4, 9, 11), pattern, strict=True)]
        b = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
        go = torch.randn(2, 9, 4, 6, generator=torch.Generator().manual_seed(seed))

        def both(function, wide, q=q, k=k, v=v, b=b, go=go):
            given = [t.detach().double().requires_grad_() if wide else t for t in (q, k, v, b)]
            out = function(*given)
            return out, *torch.autograd.grad(out, given, go.to(out.dtype))

        definition = lambda q, k, v, b: reference(q, k, v, (b,), normalizer=normalizer, scale=0.3)[0]  # noqa: E731, B023
        op = lambda q, k, v, b: vitkern.attention(q, k, v, bias=b, normalizer=normalizer, scale=0.3)  # noqa: E731, B023
        found = zip(
            ("out", "q", "k", "v", "bias"),
            both(op, False),
            both(definition, True),
            both(definition, False),
            strict=True,
        )
        for name, got, oracle, eager in found:
            assert got.dtype == (dtype if name == "bias" else q_dtype), (name, pattern)
            testing.assert_close_to_oracle(f"{name} of {pattern}", got, oracle, eager, gradient=name != "out")


GRID = (4, 6)
IDS = torch.arange(24) // 7
TABLE = torch.randn(7 * 11, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
RATE = -torch.rand(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
INDEX = bias.offset_index(GRID, "query-key", torch.device("cpu")).long()
LATER = torch.ones(24, 24, dtype=torch.bool).triu(1) & (torch.arange(24) > 3)[:, None]


def steps(i, j):
    return (i // GRID[1] - j // GRID[1]).abs() + (i % GRID[1] - j % GRID[1]).abs()


FLEX = {
    "plain": (None, None, {}),
    "table": (lambda s, b, h, i, j: s + TABLE[INDEX[i, j], h], None, {"bias": bias.RelativePosition(TABLE, grid=GRID)}),
    "decay": (lambda s, b, h, i, j: s + RATE[h] * steps(i, j), None, {"bias": bias.ManhattanDecay(RATE, GRID)}),
    "causal": (None, lambda b, h, i, j: i >= j, {"mask": mask.Causal()}),
    "segments": (None, lambda b, h, i, j: IDS[i] == IDS[j], {"mask": mask.Segments(IDS[None], IDS[None])}),
    "levels": (None, lambda b, h, i, j: IDS[j] <= IDS[i], {"mask": mask.BlockCausal(IDS[None], IDS[None])}),
    "nobody": (None, lambda b, h, i, j: (i > 3) & (j > i), {"mask": LATER}),
    "table and segments": (
        lambda s, b, h, i, j: s + TABLE[INDEX[i, j], h],
        lambda b, h, i, j: IDS[i] == IDS[j],
        {"bias": bias.RelativePosition(TABLE, grid=GRID), "mask": mask.Segments(IDS[None], IDS[None])},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_is_the_same(name):
    """Rows that see nothing included: its output is 0 there and its logsumexp -inf."""
    score_mod, mask_mod, options = FLEX[name]
    q, k, v = qkv(24, 24, d=16, dv=16)
    blocks = mask_mod and create_block_mask(mask_mod, None, None, 24, 24, device="cpu")
    turned = (t.transpose(1, 2) for t in (q, k, v))
    options_of_flex = {"scale": 0.3, "enable_gqa": True, "return_aux": AuxRequest(lse=True)}
    want, aux = flex_attention(*turned, score_mod=score_mod, block_mask=blocks, **options_of_flex)
    out, stats = vitkern.attention(q, k, v, scale=0.3, return_stats="lse", **options)
    torch.testing.assert_close(out, want.transpose(1, 2))
    torch.testing.assert_close(stats.lse, aux.lse.transpose(1, 2), check_dtype=False)
    assert math.isinf(stats.lse.min()) == (name == "nobody")
