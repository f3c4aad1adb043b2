"""bipartite_match: the published rules, edges, memory and refusals. What every op must do is in tests/test_ops.py."""

import math

import pytest
import torch
from memory import grown

import vitkern
from vitkern import testing
from vitkern.ops.bipartite_match import random_places

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def published(metric, class_token, distillation):
    """Scores and partners of the published token merging (Bolya et al. 2023), written from the paper."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].mT
    if class_token:
        scores[:, 0] = -math.inf
    if distillation:
        scores[:, :, 0] = -math.inf
    return scores.max(-1)


@ON
@pytest.mark.parametrize("tokens", [2, 3, 16, 196, 197, 198])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_alternating_partition_is_the_published_one(backend, tokens, prefix):
    metric = torch.randn(2, tokens, 16)
    best, place = published(metric, prefix >= 1, prefix == 2)
    found = vitkern.bipartite_match(metric, protect=prefix, backend=backend)
    torch.testing.assert_close(found.score[:, ::2], best)
    matched = best > -math.inf
    assert torch.equal(found.dst[:, ::2][matched].long(), (2 * place + 1)[matched])
    assert torch.equal(found.dst[:, 1::2], torch.arange(1, tokens, 2, dtype=torch.int32).expand(2, -1))
    assert (found.score[:, 1::2] == -math.inf).all()
    assert found.role[:, :prefix].eq(3).all() and not found.role[:, prefix:].eq(3).any()


def loop(metric, allowed):
    """The definition, one pair at a time, in integers."""
    tokens = metric.shape[0]
    score, dst = [-math.inf] * tokens, list(range(tokens))
    for i in range(tokens):
        for j in range(tokens):
            if allowed(i, j) and float(metric[i] @ metric[j]) > score[i]:
                score[i], dst[i] = float(metric[i] @ metric[j]), j
    return torch.tensor(score), torch.tensor(dst, dtype=torch.int32)


@ON
def test_windows_segments_masks_and_partitions_against_a_loop(backend):
    generator = torch.Generator().manual_seed(3)
    metric = torch.randint(-4, 5, (1, 31, 6), generator=generator).float()
    mask = torch.rand(1, 31, generator=generator) < 0.8
    segments = torch.randint(0, 3, (31,), generator=generator)
    index = torch.tensor([3, 4, 9, 17, 18, 25, 30])

    def near(i, j):
        a, b = i - 1, j - 1
        return a >= 0 and b >= 0 and abs(a // 6 - b // 6) <= 2 and abs(a % 6 - b % 6) <= 1

    def allowed(i, j):
        ends = i not in index and j in index and i > 0 and j > 0 and bool(mask[0, i] & mask[0, j])
        return ends and bool(segments[i] == segments[j]) and near(i, j)

    found = vitkern.bipartite_match(
        metric, partition=index, mask=mask, segments=segments, window=(2, 1), grid=(5, 6), similarity="dot", backend=backend
    )  # fmt: skip
    score, dst = loop(metric[0], allowed)
    assert torch.equal(found.score[0], score) and torch.equal(found.dst[0], dst)
    assert (score > -math.inf).sum() > 3, "the case matches nothing"
    assert found.limit == 31 - 1 - 7 and found.ragged


@ON
def test_ties_go_to_the_smallest_position(backend):
    found = vitkern.bipartite_match(torch.ones(1, 300, 70), protect=0, backend=backend)
    assert (found.dst[0, ::2] == 1).all()
    metric = torch.zeros(1, 64, 3)
    metric[:, 1::2] = torch.tensor([0.0, -0.0, 0.0])  # -0 and 0 are equal
    assert (vitkern.bipartite_match(metric, similarity="dot", backend=backend).dst[0, 2::2] == 1).all()


@ON
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_a_broken_token_matches_nothing_and_a_zero_token_is_similar_to_nothing(backend, bad, similarity):
    metric = torch.randn(1, 40, 9)
    metric[0, 5, 2] = metric[0, 8, 0] = bad  # a destination and a source
    metric[0, 10] = 0.0
    found = vitkern.bipartite_match(metric, protect=0, similarity=similarity, backend=backend)
    assert found.score[0, 8] == -math.inf and found.dst[0, 8] == 8
    assert not (found.dst[0, ::2] == 5).any() and found.score[0, 10] == 0.0
    rest = [i for i in range(0, 40, 2) if i != 8]
    assert found.score[0, rest].isfinite().all()


@ON
def test_a_sample_does_not_depend_on_its_batch(backend):
    metric = torch.randn(8, 197, 64)
    whole = vitkern.bipartite_match(metric, backend=backend)
    if backend != "reference":  # a library product may round differently for another batch
        for b in range(8):
            one = vitkern.bipartite_match(metric[b : b + 1], backend=backend)
            assert torch.equal(one.score[0], whole.score[b]) and torch.equal(one.dst[0], whole.dst[b])
    assert not vitkern.bipartite_match(metric.requires_grad_(), backend=backend).score.requires_grad


def test_random_2d_places_one_destination_in_every_whole_cell():
    for grid, stride in (((8, 8), (2, 2)), ((7, 9), (3, 2)), ((4, 4), (5, 1)), ((64, 64), (2, 2))):
        place = random_places(grid, stride, 5, torch.device("cpu"))
        cells = (grid[0] // stride[0]) * (grid[1] // stride[1])
        assert place.shape == (cells,) and place.unique().numel() == cells
        y, x = place // grid[1] // stride[0], place % grid[1] // stride[1]
        assert torch.equal(y * (grid[1] // stride[1]) + x, torch.arange(cells))
    assert not torch.equal(place, random_places(grid, stride, 6, torch.device("cpu")))


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
@pytest.mark.parametrize("tokens", [16384, 65536])
def test_memory_grows_with_the_tokens_and_not_with_their_square(tokens):
    width = 8 if tokens > 20000 else 64
    setup = f"metric = torch.randn(1, {tokens}, {width})\nvitkern.bipartite_match(metric[:, :100])"
    more = grown(setup, "assert vitkern.bipartite_match(metric).score[0, 2::2].isfinite().all()")
    assert more < 2 * width * tokens * 4 + 64 * tokens, f"{more} bytes for {tokens} tokens"


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(protect=-1), "protect must be at least 0, got -1"),
        (dict(protect=1.5), "protect must be an int or a bool tensor"),
        (dict(protect=torch.ones(2, 8)), "protect must be bool, got torch.float32"),
        (
            dict(partition="odd"),
            "partition must be 'alternate', 'random2d', an index tensor or a pair of them, got 'odd'",
        ),
        (dict(partition="random2d"), r"grid must be \(Hs, Ws\) for partition='random2d', got None"),
        (dict(partition=torch.tensor([1, 9])), r"partition must hold positions in \[0, 8\), got 1 to 9"),
        (dict(partition=torch.tensor([1.0])), "partition must hold integers, got torch.float32"),
        (dict(mask=torch.ones(2, 7, dtype=torch.bool)), r"mask must have shape \[B, N\] = \[2, 8\], got \[2, 7\]"),
        (dict(segments=torch.zeros(3, 8, dtype=torch.int32)), r"segments must have shape \[B, N\] = \[2, 8\] or \[N\]"),
        (dict(window=(1, 1)), "grid must be given with a window of two sides, got None"),
        (dict(window=-1), "window must be at least 0, got -1"),
        (dict(grid=(3, 3)), r"grid must hold at most the tokens of metric \(8\), got 3 x 3"),
        (dict(similarity="l2"), "similarity must be 'cosine' or 'dot', got 'l2'"),
        (dict(eps=0.0), "eps must be above 0, got 0.0"),
        (dict(backend="cuda"), "cuda: the tensors are on cpu"),
    ],
)
def test_refusals_are_sentences(options, sentence):
    with pytest.raises((ValueError, TypeError), match=f"bipartite_match: .*{sentence}|{sentence}"):
        vitkern.bipartite_match(torch.randn(2, 8, 4), **options)


@pytest.mark.parametrize("shape", [(8, 4), (1, 2, 0, 4), (1, 2, 3, 4, 5)])
def test_the_metric_must_have_three_or_four_axes(shape):
    with pytest.raises(ValueError, match=r"metric must have shape \[B, N, C\] or \[B, N, H, C\]"):
        vitkern.bipartite_match(torch.zeros(shape))


def test_explain_names_the_back_end():
    text = vitkern.explain(vitkern.bipartite_match, torch.randn(1, 8, 4), window=2)
    assert "bipartite_match runs on" in text and "triton: the tensors are on cpu" in text
