"""attention_varlen: packed sequences against one call each, and the refusals. What every op must do is in tests/test_ops.py."""

import pytest
import torch

import vitkern
from vitkern import DepthwiseValue, bias, mask, modulation

D = torch.float64
FURTHER = torch.ones(1, 3, 2, 8, dtype=D)
LENGTHS = ((0, 3), (1, 1), (5, 5), (64, 64), (63, 0), (20, 33))


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths=LENGTHS, heads=4, kv_heads=2, d=8, grad=False, dtype=D):
    """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    generator = torch.Generator().manual_seed(1)
    queries, keys = zip(*lengths, strict=True)
    shapes = ((sum(queries), heads, d), (sum(keys), kv_heads, d), (sum(keys), kv_heads, d))
    tensors = [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=grad) for shape in shapes]
    return (*tensors, bounds(queries), bounds(keys), max(queries), max(keys))


def one_by_one(arguments, options=lambda s, rows, columns: {}, **shared):
    """What attention gives for every sequence alone, one behind the other."""
    q, k, v, cu_q, cu_k, *_ = arguments
    parts = []
    for s in range(len(cu_q) - 1):
        rows, columns = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        own = (q[None, rows], k[None, columns], v[None, columns])
        parts.append(vitkern.attention(*own, **shared, **options(s, rows, columns))[0])
    return torch.cat(parts)


SECOND = torch.full((153, 2), -1).index_fill(0, torch.tensor(0), 1)  # of a sequence with one key
FILTER = torch.ones(8, 1, 3, 3, dtype=D)
NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
SELF = dict(zip(NAMES, packed(((6, 6), (5, 5))), strict=True))


def test_every_sequence_is_as_if_alone():
    arguments = packed(grad=True)
    got, want = vitkern.attention_varlen(*arguments), one_by_one(arguments)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(t.sin().sum(), arguments[:3]) for t in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_thousands_of_windows_and_empty_ones_between():
    """Qwen2.5-VL: windows of 64 and fewer tokens, offsets that repeat."""
    lengths = [(n, n) for n in (64, 64, 0, 32, 16, 0, 0, 64)] * 40
    arguments = packed(lengths, heads=2, kv_heads=2, dtype=torch.float32)
    torch.testing.assert_close(vitkern.attention_varlen(*arguments), one_by_one(arguments))


def test_what_belongs_to_tokens_is_packed_and_what_belongs_to_scores_is_shared():
    arguments = packed()
    q, k, _, cu_q, cu_k, most_q, most_k = arguments
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(4, most_q, most_k, generator=generator, dtype=D)
    seen = torch.rand(most_q, most_k, generator=generator) < 0.8
    of_keys, of_rows = (torch.randn(1, 4, n, generator=generator, dtype=D) for n in (len(k), len(q)))
    ids = [torch.randint(-1, 2, (1, n), generator=generator) for n in (len(q), len(k))]
    slope = torch.rand(4, generator=generator, dtype=D)
    xy = [torch.randn(1, n, 2, generator=generator, dtype=D) for n in (len(q), len(k))]

    def alone(s, rows, columns):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        biases = [
            shared[:, :n, :m], bias.KeyBias(of_keys[..., columns]), bias.RowBias(of_rows[..., rows]),
            bias.EuclideanDistance(slope, xy[0][:, rows], xy[1][:, columns]),
        ]  # fmt: skip
        return {"bias": biases, "mask": [seen[:n, :m], mask.Segments(ids[0][:, rows], ids[1][:, columns])]}

    got = vitkern.attention_varlen(
        *arguments,
        bias=[shared, bias.KeyBias(of_keys), bias.RowBias(of_rows), bias.EuclideanDistance(slope, *xy)],
        mask=[seen, mask.Segments(*ids), mask.Causal(3)],
        modulation=modulation.SoftCausal(0.4),
        normalizer="sigmoid",
    )
    hidden = lambda s, rows, columns: alone(s, rows, columns) | {  # noqa: E731
        "mask": [*alone(s, rows, columns)["mask"], mask.Causal(3)], "modulation": modulation.SoftCausal(0.4)
    }  # fmt: skip
    torch.testing.assert_close(got, one_by_one(arguments, hidden, normalizer="sigmoid"))


def test_statistics_are_of_the_own_sequence():
    arguments = packed()
    q, _, _, cu_q, cu_k, *_ = arguments
    weight = torch.rand(len(q), generator=torch.Generator().manual_seed(3), dtype=D)
    _, stats = vitkern.attention_varlen(*arguments, return_stats=("lse", "key_mean"), query_weight=weight)
    for s in range(len(LENGTHS)):
        rows, columns = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        _, own = vitkern.attention(
            *(t[None, part] for t, part in zip(arguments[:3], (rows, columns, columns), strict=True)),
            return_stats=("lse", "key_mean"),
            query_weight=weight[None, rows],
        )
        torch.testing.assert_close(stats.lse[rows], own.lse[0])
        torch.testing.assert_close(stats.key_mean[columns], own.key_mean[0])


def test_chosen_rows_of_every_sequence():
    arguments = packed(grad=True)
    (q, k, v, cu_q, cu_k, _, most), rows = arguments, (0, 4)
    seen = torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(4)) < 0.8
    options = {"mask": [seen, mask.Causal(2)], "return_stats": ("row",), "stat_rows": rows}
    _, stats = vitkern.attention_varlen(*arguments, **options)
    assert stats.row.shape == (len(LENGTHS), len(rows), 4, most)
    want = torch.zeros_like(stats.row)
    for s, (n, m) in enumerate(LENGTHS):
        for place, row in enumerate(rows):
            if row < n and m:
                one = (
                    t[None, part]
                    for t, part in (
                        (q, slice(cu_q[s], cu_q[s + 1])),
                        *((t, slice(cu_k[s], cu_k[s + 1])) for t in (k, v)),
                    )
                )
                own = {"mask": [seen[:, :n, :m], mask.Causal(2)], "return_stats": ("row",), "stat_rows": (row,)}
                want[s, place, :, :m] = vitkern.attention(*one, **own)[1].row[0, :, 0]
    torch.testing.assert_close(stats.row, want)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), (q, k)) for t in (stats.row, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_chosen_rows_of_the_queries_that_keys_go_to():
    q, k, v, cu_q, cu_k, *most = packed()
    options = {"normalizer": "argmax_q", "return_stats": ("row", "key_mean"), "stat_rows": (0, 4)}
    out, stats = vitkern.attention_varlen(q, k, v, cu_q, cu_k, *most, **options)
    alone = vitkern.attention_varlen(q, k, v, cu_q, cu_k, *most, **options | {"return_stats": "row"})
    assert torch.equal(alone[0], out) and torch.equal(alone[1].row, stats.row)
    want = torch.zeros_like(stats.row)
    for s, (n, m) in enumerate(LENGTHS):
        one = (t[None, a : a + b] for t, a, b in ((q, cu_q[s], n), (k, cu_k[s], m), (v, cu_k[s], m)))
        if n and m:
            whole = vitkern.attention(*one, normalizer="argmax_q", return_stats="probs")[1].probs
            for place, row in enumerate(options["stat_rows"]):
                if row < n:
                    want[s, place, :, :m] = whole[0, :, row]
    assert torch.equal(stats.row, want) and want.any()


@pytest.mark.parametrize("wide", [False, True])
def test_every_sequence_sees_the_further_keys(wide):
    arguments = packed(grad=True)
    q, k, _, cu_q, cu_k, most_q, most_k = arguments
    generator = torch.Generator().manual_seed(5)
    more = [torch.randn(1, 2, 2, 8, generator=generator, dtype=D, requires_grad=True) for _ in range(2)]
    shared = torch.randn(4, most_q, most_k + 2 * wide, generator=generator, dtype=D)
    seen = torch.rand(most_q, most_k, generator=generator) < 0.8
    vector = torch.randn(1, 4, len(k), generator=generator, dtype=D)
    columns = [*range(most_k, most_k + 2 * wide)]

    def alone(s, rows, own):
        n, m = rows.stop - rows.start, own.stop - own.start
        biases = [shared[:, :n, [*range(m), *columns]], bias.KeyBias(vector[..., own])]
        return {"bias": biases, "mask": [seen[:n, :m], mask.Causal(1)]}

    options = {"extra_kv": tuple(more), "modulation": modulation.SoftCausal(0.4)}
    got, stats = vitkern.attention_varlen(
        *arguments,
        bias=[shared, bias.KeyBias(vector)],
        mask=[seen, mask.Causal(1)],
        return_stats=("key_mean",),
        **options,
    )
    want = one_by_one(arguments, alone, **options)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), (*arguments[:3], *more)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    assert stats.key_mean.shape == (len(k) + 2 * len(LENGTHS), 4)
    for s in range(len(LENGTHS)):
        rows, own = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        one = (t[None, part] for t, part in zip(arguments[:3], (rows, own, own), strict=True))
        part = vitkern.attention(*one, **alone(s, rows, own), **options, return_stats=("key_mean",))[1].key_mean[0]
        places = [*range(own.start, own.stop), len(k) + 2 * s, len(k) + 2 * s + 1]
        torch.testing.assert_close(stats.key_mean[places], part)


def of_own_keys(lengths, count, seed=6):
    """Keys of the query's own sequence or -1, [Tq, count]."""
    own = torch.tensor([m for n, m in lengths for _ in range(n)])[:, None]
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(len(own), count, generator=generator) * (own + 1)).long() - 1


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "none", "argmax_k"])
def test_every_query_names_keys_of_its_own_sequence(normalizer):
    arguments = packed(grad=True)
    q, k, _, _, _, most_q, most_k = arguments
    index = of_own_keys(LENGTHS, 5)
    generator = torch.Generator().manual_seed(7)
    shared = torch.randn(4, most_q, most_k, generator=generator, dtype=D)
    vector = torch.randn(1, 4, len(k), generator=generator, dtype=D)

    def alone(s, rows, own):
        n, m = rows.stop - rows.start, own.stop - own.start
        return {"key_index": index[None, rows], "bias": [shared[:, :n, :m], bias.KeyBias(vector[..., own])]}

    options = {"normalizer": normalizer, "mask": mask.Causal(20), "modulation": modulation.SoftCausal(0.4)}
    options |= {"sink": torch.ones(4, dtype=D)} if normalizer == "softmax" else {}
    got = vitkern.attention_varlen(*arguments, bias=[shared, bias.KeyBias(vector)], key_index=index, **options)
    want = one_by_one(arguments, alone, **options)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), arguments[:3]) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_and_further_keys_beside_named_ones():
    arguments = packed()
    q, k, v, cu_q, cu_k, *_ = arguments
    index = of_own_keys(LENGTHS, 3)
    generator = torch.Generator().manual_seed(8)
    more = [torch.randn(1, 2, 2, 8, generator=generator, dtype=D) for _ in range(2)]
    weight = torch.rand(len(q), generator=generator, dtype=D)
    options = {"extra_kv": tuple(more), "return_stats": ("lse", "key_mean", "row"), "stat_rows": (0,)}
    out, stats = vitkern.attention_varlen(*arguments, key_index=index, query_weight=weight, **options)
    for s, (n, m) in enumerate(LENGTHS):
        if not n:
            continue
        rows, own = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        one = (t[None, part] for t, part in zip((q, k, v), (rows, own, own), strict=True))
        alone, found = vitkern.attention(*one, key_index=index[None, rows], query_weight=weight[None, rows], **options)
        torch.testing.assert_close(out[rows], alone[0])
        torch.testing.assert_close(stats.lse[rows], found.lse[0])
        places = [*range(own.start, own.stop), len(k) + 2 * s, len(k) + 2 * s + 1]
        torch.testing.assert_close(stats.key_mean[places], found.key_mean[0])
        torch.testing.assert_close(stats.row[s, 0, :, 2 : 2 + m], found.row[0, :, 0, :m])
        torch.testing.assert_close(stats.row[s, 0, :, :2], found.row[0, :, 0, m:])
        assert not stats.row[s, 0, :, 2 + m :].any()


def test_statistics_without_values():
    arguments = packed(grad=True)
    q, k, _, *rest = arguments
    options = {"return_stats": ("lse", "key_mean", "row"), "stat_rows": (0, 4), "mask": mask.Causal(3)}
    out, stats = vitkern.attention_varlen(q, k, None, *rest, **options)
    whole = vitkern.attention_varlen(*arguments, **options)[1]
    assert out is None
    for name in options["return_stats"]:
        pair = [getattr(s, name).masked_fill(getattr(s, name).isinf(), 0.0) for s in (stats, whole)]
        torch.testing.assert_close(*pair)
        for a, b in zip(*(torch.autograd.grad(t.sin().sum(), (q, k), retain_graph=True) for t in pair), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("shared", [True, False])
def test_every_sequence_is_a_map_of_its_own_for_the_convolution_of_the_values(shared, prefix):
    """Maps of one size behind each other, others between, and one without a cell."""
    sides = ((3, 4), (3, 4), (4, 3), (0, 3), (5, 2), (3, 4))
    arguments = packed([(h * w + prefix,) * 2 for h, w in sides], grad=True)
    generator = torch.Generator().manual_seed(9)
    channels = 8 if shared else 16
    weight, offset = (
        torch.randn(s, generator=generator, dtype=D, requires_grad=True) for s in ((channels, 1, 3, 5), (channels,))
    )
    got = vitkern.attention_varlen(*arguments, lepe=DepthwiseValue(weight, offset, sides, prefix))
    q, k, v, cu, *_ = arguments
    want = []
    for s, grid in enumerate(sides):
        own = (t[None, cu[s] : cu[s + 1]] for t in (q, k, v))
        lepe = DepthwiseValue(weight, offset, grid, prefix) if grid[0] else None
        want.append(vitkern.attention(*own, lepe=lepe)[0])
    want = torch.cat(want)
    torch.testing.assert_close(got, want)
    leaves = (*arguments[:3], weight, offset)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_named_keys_and_convolutions_compile_and_are_explained():
    lengths = ((6, 6), (8, 8))
    q, k, v, *rest = packed(lengths, dtype=torch.float32)
    index = of_own_keys(lengths, 3)
    weight = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(1))

    def call(q, k, v, index, weight):
        lepe = DepthwiseValue(weight, None, ((2, 3), (4, 2)))
        return vitkern.attention_varlen(q, k, v, *rest, key_index=index, lepe=lepe)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, index, weight), call(q, k, v, index, weight))
    text = vitkern.explain(vitkern.attention_varlen, q, k, None, *rest, key_index=index, return_stats=("lse",))
    assert "attention_varlen runs on" in text


def test_no_sequence_names_no_keys():
    arguments = packed(((0, 0),))
    none = torch.zeros(0, 3, dtype=torch.int64)
    out, stats = vitkern.attention_varlen(
        *arguments[:3], bounds(()), bounds(()), 0, 0, key_index=none, return_stats=("key_mean",)
    )
    assert out.shape == (0, 4, 8) and stats.key_mean.shape == (0, 4)


def test_a_longer_maximum_changes_nothing():
    *arguments, most_q, most_k = packed(dtype=torch.float32)
    exact = vitkern.attention_varlen(*arguments, most_q, most_k)
    assert torch.equal(vitkern.attention_varlen(*arguments, most_q + 100, most_k + 3), exact)


def test_no_sequence_at_all():
    arguments = packed(((0, 0),), grad=True)
    vitkern.attention_varlen(*arguments[:3], bounds(()), bounds(()), 0, 0).sum().backward()
    out, stats = vitkern.attention_varlen(*arguments, return_stats=("lse", "key_mean"))
    assert out.shape == (0, 4, 8) and stats.lse.shape == (0, 4) and stats.key_mean.shape == (0, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: {"q": a["q"][None]}, r"q must have shape \[T, heads, head_dim\], got \[1, 153, 4, 8\]"),
        (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].long()}, r"cu_seqlens_q must be int32 \[S \+ 1\], got torch.int64"),
        (lambda a: {"cu_seqlens_k": bounds((106,))}, r"cu_seqlens_k must have the length of cu_seqlens_q \(7\), got 2"),
        (lambda a: {"cu_seqlens_q": a["cu_seqlens_q"].flip(0)}, "cu_seqlens_q must ascend from 0 to the 153 tokens"),
        (lambda a: {"cu_seqlens_k": a["cu_seqlens_k"] - 1}, "cu_seqlens_k must ascend from 0 to the 106 tokens"),
        (lambda a: {"max_seqlen_q": 63}, r"max_seqlen_q must be at least the longest sequence \(64\), got 63"),
        (lambda a: {"max_seqlen_k": 2.5}, "max_seqlen_k must be an int, got 2.5"),
        (lambda a: {"bias": torch.zeros(4, 153, 106)}, r"bias must broadcast to \[B, H, Nq, Nk\] = \[1, 4, 64, 64\]"),
        (lambda a: {"mask": torch.zeros(64, 64)}, "mask must be bool"),
        (
            lambda a: {"modulation": modulation.Policy(torch.ones(1, 64))},
            r"Policy.keep must have shape \[B or 1, Nk = 106\], got \[1, 64\]",
        ),
        (
            lambda a: {"key_index": torch.full((153, 2), -1), "modulation": modulation.Policy(torch.ones(1, 106))},
            "key_index goes neither with topk nor with statistics without softmax nor with Policy",
        ),
        (lambda a: {"return_stats": "row", "stat_rows": (64,)}, r"stat_rows must be queries of \[0, 64\), got 64"),
        (lambda a: {"topk": 65}, "topk must be at most max_seqlen_k = 64, got 65"),
        (lambda a: {"return_stats": "row", "stat_rows": 0}, "stat_rows must be a tuple of ints, got int"),
        (lambda a: {"return_stats": "row", "stat_rows": (-1,)}, r"stat_rows must be queries of \[0, 64\), got -1"),
        (lambda a: {"extra_kv": (FURTHER, FURTHER), "topk": 2}, "extra_kv goes neither with topk nor with argmax"),
        (
            lambda a: {"extra_kv": (FURTHER, FURTHER), "bias": bias.RowBias(torch.ones(1, 1, 153))},
            "RowBias has no form for packed sequences beside another modifier of its kind, or beside extra_kv",
        ),
        (lambda a: {"key_index": torch.zeros(1, 153, 2, dtype=torch.int64)}, r"key_index must have shape \[Tq = 153, K\]"),
        (lambda a: {"key_index": torch.zeros(153, 2)}, "key_index must hold integers"),
        (lambda a: {"key_index": SECOND}, "key_index must be -1 or a key of the query's own sequence"),
        (lambda a: {"key_index": torch.full((153, 2), -2)}, "key_index must be -1 or a key of the query's own sequence"),
        (
            lambda a: {"key_index": torch.full((153, 2), -1), "topk": 2},
            "key_index goes neither with topk nor with statistics without softmax",
        ),
        (lambda a: {"v": None}, "v must be a tensor unless statistics are asked for"),
        (lambda a: {"lepe": DepthwiseValue(FILTER, None, (3, 51))}, "lepe must go with values of the queries' own tokens"),
        (
            lambda a: {**SELF, "lepe": DepthwiseValue(FILTER, None, (2, 3))},
            r"lepe.grid must be the sides \(h, w\) of the 2 sequences, which hold the 11 tokens of v",
        ),
        (
            lambda a: {**SELF, "lepe": DepthwiseValue(FILTER, None, ((2, 3), (2, 2)))},
            "lepe.grid must be the sides",
        ),
        (
            lambda a: {**SELF, "lepe": DepthwiseValue(FILTER, None, ((1, 5), (2, 3)))},
            r"cu_seqlens_q must be the bounds \[0, 5, 11\] of the maps of lepe, got \[0, 6, 11\]",
        ),
        (lambda a: {"return_stats": ("probs",)}, "return_stats of packed sequences may be lse, key_mean"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(change, message):
    arguments = dict(zip(NAMES, packed(), strict=True))
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        vitkern.attention_varlen(**arguments | change(arguments))
