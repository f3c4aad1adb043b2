"""attention needs no map of scores: the growth of the peak over forward and backward, measured in processes of their own.
What belongs to positions is measured in test_attention_modifiers.py."""

import pytest
from memory import grown

SETUP = """
from vitkern import bias, mask, modulation
torch.set_num_threads(1)
def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)
def learn(out):
    out, stats = out if isinstance(out, tuple) and len(out) == 2 else (out, ())
    sum(t.sum() for t in (*(out if isinstance(out, tuple) else (out,)), *stats) if t is not None).backward()
def call(n, samples=1):
    heads = 4 // samples
    q, k, v = (leaf(samples, n, heads, 16) for _ in range(3))
    ids = (torch.arange(n, dtype=torch.int32) * 5 // n).repeat(samples, 1)
    {call}
call(20)
"""
ATTENDED = "learn(vitkern.attention(q, k, v, {options}))"
CASES = {
    "plain and masked": (
        "",
        "mask=mask.Causal()",
        "mask=mask.Segments(ids, ids)",
        "mask=mask.Segments(ids, ids, torch.ones(5, 5, dtype=torch.bool).tril())",
        "mask=mask.BlockCausal(ids, ids), bias=bias.KeyBias(leaf(1, heads, n)), sink=leaf(heads)",
        "normalizer='sigmoid', bias=bias.KeyBias(leaf(1, heads, n)), scale=leaf(heads)",
        "dropout_p=0.2, dropout_seed=1",
        "rope=vitkern.Rope(leaf(1, n, 1, 8), leaf(1, n, 1, 8))",
        "cosine=vitkern.CosineScore(leaf(heads))",
        "extra_kv=(leaf(1, 5, heads, 16), leaf(1, 5, heads, 16)), bias=bias.KeyBias(leaf(1, heads, n))",
    ),
    "modulations": (
        "modulation=modulation.TalkingHeads(leaf(4, 4), leaf(4), leaf(4, 4), leaf(4))",
        "modulation=modulation.Policy(torch.rand(1, n, requires_grad=True))",
        "extra_kv=(leaf(1, 5, 4, 16), leaf(1, 5, 4, 16))",
    ),
    "choices": ("topk=8", "normalizer='argmax_k'", "normalizer='argmax_q'"),
    "rows": tuple(
        f"return_stats=('row', 'key_mean'), stat_rows=(0, n - 1), {options}"
        for options in ("normalizer='argmax_q'", "modulation=modulation.Policy(torch.rand(1, n, requires_grad=True))")
    ),
}
PACKED = """
    more = tuple(leaf(7 * 64 + n, 4, 16) for _ in range(3))
    cu = torch.tensor([0, n, *(n + 64 * i for i in range(1, 8))], dtype=torch.int32)
    learn(vitkern.attention_varlen(*more, cu, cu, max(n, 64), max(n, 64)))
    out, stats = vitkern.attention(q, k, v, return_stats=("lse", "key_mean", "row"), stat_rows=(0, n - 1))
    learn((out, stats.lse, stats.key_mean, stats.row))
"""


@pytest.mark.parametrize("name", CASES)
def test_no_map_of_scores(name):
    """4 heads of 3136 tokens, or 4 samples: one map of scores in float32 would be 157 MB, one of bits that are bytes 39."""
    calls = "; ".join(ATTENDED.format(options=o) for o in CASES[name])
    samples = 4 if name == "plain and masked" else 1
    assert grown(SETUP.replace("{call}", calls), f"call(3136, {samples})") < 35e6


def test_packed_sequences_are_not_padded_and_rows_are_not_a_map():
    """One sequence of 3136 tokens and seven of 64: padded scores would be 1.3 GB."""
    assert grown(SETUP.replace("{call}", PACKED), "call(3136)") < 60e6


def test_the_gradient_of_a_shared_bias_is_not_a_map_for_every_sample_and_head():
    """192 maps of 4.2 MB; the bias, its gradient and the 16 parts of which that is the sum are 18."""
    bias = "b = leaf(1, 1, n, n); q, k, v = (leaf(24, n, 8, 8) for _ in range(3)); "
    more = grown(SETUP.replace("{call}", bias + ATTENDED.format(options="bias=b")), "call(1024)")
    assert more < 20 * 1024**2 * 4 + 12 * 24 * 1024 * 8 * 8 * 4


BESIDE = {
    "a bias of keys": "bias=[b, torch.zeros(24, 1, 1, n)]",
    "a mask of keys": "bias=b, mask=[torch.ones(n, n, dtype=torch.bool), torch.ones(24, 1, 1, n, dtype=torch.bool)]",
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_a_shared_bias_or_mask_has_beside_it_for_the_keys_of_a_sample_makes_no_map(name):
    """As above: together they would be 24 maps, of 4.2 MB or in bytes."""
    bias = "b = leaf(1, 1, n, n); q, k, v = (leaf(24, n, 8, 8) for _ in range(3)); "
    more = grown(SETUP.replace("{call}", bias + ATTENDED.format(options=BESIDE[name])), "call(1024)")
    assert more < 22 * 1024**2 * 4 + 12 * 24 * 1024 * 8 * 8 * 4


PREDICTED = (
    "q = leaf(1, n // 8, 1, 8); k, v = leaf(1, n, 1, 8), leaf(1, n, 1, 8); logits = torch.randn(1, n // 8, 4, 4); "
)


def test_a_predicted_mask_takes_a_bit_for_every_pair():
    """2048 queries of 16384 keys: 4.2 MB of bits, where bytes would be 34; scores of a block, gradients and rows of keys are 4."""
    call = PREDICTED + ATTENDED.format(options="mask=[mask.FromLogits(logits, (1, n)), mask.Causal(n)]")
    assert grown(SETUP.replace("{call}", call), "call(16384)") < 2048 * 16384 // 8 + 12e6


def test_a_predicted_mask_beside_one_of_all_pairs_is_that_of_its_cells():
    """What the intersection costs, so that the test above sees bytes where there are."""
    call = PREDICTED + ATTENDED.format(options="mask=[mask.FromLogits(logits, (1, n)), torch.ones(n // 8, n) > 0]")
    assert grown(SETUP.replace("{call}", call), "call(16384)") > 2048 * 16384
