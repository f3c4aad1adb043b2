"""attention: what does not fit is a sentence that names the argument, what it got and what it wanted."""

import pytest
import torch

import vitkern
from vitkern import Rope, bias, mask, modulation

Q, K, V = (torch.randn(2, 6, heads, 8) for heads in (4, 2, 2))
TABLE = torch.zeros(25, 4)
IDS = torch.zeros(1, 6, dtype=torch.int64)
ANGLES = torch.ones(1, 6, 1, 4)
REFUSED = [
    ({"mask": torch.zeros(6, 6)}, TypeError, "mask must be bool .* got torch.float32"),
    (
        {"mask": torch.zeros(6, 5, dtype=torch.bool)},
        ValueError,
        r"mask must broadcast to \[B, H, Nq, Nk\] = \[2, 4, 6, 6\]",
    ),
    ({"bias": torch.ones(6, 6, dtype=torch.bool)}, TypeError, "bias must be float32, float64, .* got torch.bool"),
    ({"bias": torch.zeros(3, 6, 6)}, ValueError, r"bias must broadcast to .* got \[3, 6, 6\]"),
    ({"bias": [torch.zeros(6, 6), mask.Causal()]}, TypeError, "bias must be a tensor, one of .* got Causal"),
    ({"bias": bias.RelativePosition(TABLE)}, ValueError, "must have an index or a grid, got neither"),
    ({"bias": bias.RelativePosition(TABLE, grid=(2, 2))}, ValueError, "grid must hold the 6 tokens of k"),
    ({"bias": bias.RelativePosition(TABLE, grid=(2.0, 3.0))}, TypeError, "RelativePosition.grid must be ints, got 2.0"),
    (
        {"bias": bias.RelativePosition(TABLE, grid=(-2, -3))},
        ValueError,
        "RelativePosition.grid must be at least 1, got -2",
    ),
    ({"bias": bias.RelativePosition(TABLE, grid=(2, 3), q_stride=0)}, ValueError, "q_stride must be at least 1, got 0"),
    (
        {"bias": bias.RelativePosition(TABLE, grid=(2, 3), prefix_tokens=-1)},
        ValueError,
        "prefix_tokens must be at least 0",
    ),
    ({"bias": bias.RelativePosition(TABLE, grid=(2, 3))}, ValueError, "bias.table must have 15 rows for the grid"),
    (
        {"bias": bias.RelativePosition(TABLE, IDS.expand(6, 6) - 1)},
        ValueError,
        r"index must lie in \[0, 25\).* from -1 to -1",
    ),
    ({"bias": bias.KeyBias(torch.zeros(1, 1, 5))}, ValueError, r"KeyBias.vector must have shape .* got \[1, 1, 5\]"),
    (
        {"bias": bias.ManhattanDecay(torch.zeros(4), (2, 4))},
        ValueError,
        r"grid must hold the 6 tokens of q, got \(2, 4\)",
    ),
    (
        {"mask": mask.Segments(IDS, IDS[:, :5])},
        ValueError,
        r"Segments.k_ids must have shape \[B or 1, 6\], got \[1, 5\]",
    ),
    ({"mask": mask.Segments(IDS.float(), IDS)}, TypeError, "Segments.q_ids must hold integers"),
    ({"mask": mask.Segments(IDS + 3, IDS, torch.ones(3, 3, dtype=torch.bool))}, ValueError, "q_ids must be below 3"),
    ({"mask": mask.FromLogits(torch.zeros(2, 6, 2, 2), (2, 4))}, ValueError, "size must hold the keys of cols"),
    ({"mask": mask.FromLogits(torch.zeros(2, 5, 2, 2), (2, 3))}, ValueError, "logits must have shape"),
    ({"modulation": torch.ones(6, 6)}, TypeError, "modulation must be typed"),
    (
        {"modulation": modulation.TalkingHeads(torch.eye(3))},
        ValueError,
        r"pre_weight must have shape \[H, H\] = \[4, 4\]",
    ),
    ({"normalizer": "max"}, ValueError, "normalizer must be one of softmax, sigmoid"),
    ({"topk": 7}, ValueError, r"topk must lie in \[1, Nk\] = \[1, 6\], got 7"),
    ({"topk": 0}, ValueError, "topk must lie in"),
    ({"sink": torch.zeros(4), "normalizer": "relu"}, ValueError, "sink must go with normalizer='softmax'"),
    ({"sink": torch.zeros(3)}, ValueError, r"sink must have shape \[H\] = \[4\]"),
    ({"return_stats": ("lse",), "normalizer": "sigmoid"}, ValueError, "'lse' must go with normalizer='softmax'"),
    ({"return_stats": ("mean",)}, ValueError, "return_stats must hold names of lse"),
    ({"return_stats": ("row",)}, ValueError, "stat_rows must be given with return_stats 'row'"),
    ({"return_stats": ("row",), "stat_rows": (6,)}, ValueError, r"stat_rows must be queries of \[0, 6\), got 6"),
    ({"scale": "1"}, TypeError, "scale must be a number or a tensor"),
    ({"scale": torch.ones(3)}, ValueError, "scale must be a number or have shape"),
    ({"scale": 1.0, "cosine": vitkern.CosineScore(torch.zeros(4))}, ValueError, "scale must be None with cosine"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    ({"rope": Rope(torch.ones(1, 6, 1, 5), torch.ones(1, 6, 1, 5))}, ValueError, "with R at most 8"),
    ({"rope": Rope(torch.ones(1, 4, 1, 4), torch.ones(1, 4, 1, 4))}, ValueError, "a multiple of the 4 angles"),
    ({"query_weight": torch.ones(2, 5)}, ValueError, "query_weight must have shape"),
    ({"extra_kv": (K[:, :, :1], V)}, ValueError, "extra_kv k must have shape"),
    ({"return_stats": "row", "stat_rows": 0}, TypeError, "stat_rows must be a tuple of ints, got int"),
    (
        {"return_stats": "row", "stat_rows": torch.tensor([1, 2])},
        TypeError,
        "stat_rows must be a tuple of ints, got Tensor",
    ),
    ({"rope": Rope(ANGLES, ANGLES, q_range=(0.0, 6.0))}, TypeError, "rope.q_range must be two ints, got 0.0"),
    ({"rope": Rope(ANGLES, ANGLES, k_range=(0,))}, ValueError, r"rope.k_range must be two ints, got \(0,\)"),
    ({"rope": Rope(ANGLES[:, :0], ANGLES[:, :0])}, ValueError, r"must have one shape .* got \[1, 0, 1, 4\]"),
    ({"cosine": vitkern.CosineScore(torch.zeros(4), max="x")}, TypeError, "cosine.max must be a float, got 'x'"),
    ({"cosine": vitkern.CosineScore(torch.zeros(4), eps=None)}, TypeError, "cosine.eps must be a float, got None"),
    (
        {"modulation": modulation.GaussianMixture(torch.ones(1, 4), torch.ones(1, 4), (1, 7), -1)},
        ValueError,
        "GaussianMixture.prefix_tokens must be at least 0, got -1",
    ),
    (
        {"lepe": vitkern.DepthwiseValue(torch.ones(8, 1, 3, 3), None, (1, 7), -1)},
        ValueError,
        "DepthwiseValue.prefix_tokens must be at least 0, got -1",
    ),
    (
        {"modulation": modulation.Policy(torch.ones(1, 6), -1.0)},
        ValueError,
        "Policy.eps must be at least 0.0, got -1.0",
    ),
    ({"modulation": modulation.Policy(torch.ones(1, 6), 1e-6, "x")}, TypeError, "keep_diagonal must be True or False"),
    ({"mask": mask.FromLogits(torch.zeros(2, 6, 0, 3), (2, 3))}, ValueError, "logits must have at least one cell"),
    ({"mask": mask.FromLogits(torch.zeros(2, 6, 2, 3), (-2, -3))}, ValueError, "size must be at least 0, got -2"),
    (
        {"mask": mask.FromLogits(torch.zeros(2, 6, 2, 3), (2, 3), inclusive="no")},
        TypeError,
        "FromLogits.inclusive must be True or False, got 'no'",
    ),
    ({"mask": mask.Causal(torch.tensor(1))}, TypeError, "Causal.offset must be an int, got a tensor"),
    (
        {"mask": torch.ones(6, 6).bool().to_sparse()},
        TypeError,
        "mask must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"bias": torch.ones(6, 6).to_sparse()}, TypeError, "bias must be a dense tensor"),
    ({"backend": "triton"}, ValueError, "triton: the tensors are on cpu"),
]


@pytest.mark.parametrize("options, kind, sentence", REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_refusals_are_sentences(options, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.attention(Q, K, V, **options)


@pytest.mark.parametrize(
    "args, kind, sentence",
    [
        ((Q[0], K, V), ValueError, r"q must have shape \[B, tokens, heads, head_dim\]"),
        ((Q, K[:1], V), ValueError, r"k must have the batch of q \(2\), got 1"),
        ((Q, K[..., :5], V), ValueError, r"k must have the head size of q \(8\), got 5"),
        ((Q, K, V[:, :5]), ValueError, r"v must have the tokens and heads of k \[6, 2\], got \[5, 2\]"),
        ((Q, K.bfloat16(), V), TypeError, r"k must have the dtype of q \(torch.float32\), got torch.bfloat16"),
        ((Q[:, :, :3], K, V), ValueError, r"the heads of k must divide the heads of q \(3\), got 2"),
        ((Q, K, None), ValueError, "v must be a tensor unless statistics are asked for"),
        ((Q.to_sparse(), K, V), TypeError, "q must be a dense tensor, got layout torch.sparse_coo"),
        ((Q.int(), K, V), TypeError, "q must be float32, float64, bfloat16 or float16"),
    ],
)
def test_refused_tensors(args, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.attention(*args)
