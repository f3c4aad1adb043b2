"""attention in Triton, interpreted on the CPU, from the public function down. Run by tests/test_triton.py."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import EVERYTHING, FULL, HALF, NAMES, arguments, check_op, mixtures, scores, small_tiles, wide
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import testing
from vitkern.ops import _attention_definition as definition
from vitkern.ops.attention import OP
from vitkern.testing import attention as registry
from vitkern.testing import attention_varlen as packed
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import DIFFERENTIABLE, Call, widths

ENTRY = testing.entries()["attention"]
OFFSET = len(definition.TENSORS) + definition.OPTIONS.index("offset")
SMALL = [
    c for c in registry.small() if c.seed in (*range(1, 44), *range(50, 72), *range(74, 84), *range(90, 100))
]  # the others have what reasons() names


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """One tile for a small call, unless a test asks for other tiles."""
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def check(call, dtype=FULL):
    with tokens_on_gpu("triton"):
        testing.assert_matches(ENTRY, call, dtype, "triton")


@pytest.mark.parametrize("call", SMALL, ids=str)
def test_small_calls_of_the_registry(call):
    check(call, (FULL, HALF)[call.seed % 2])


def test_the_arguments_are_those_of_the_op():
    assert Call._fields == (*definition.TENSORS, *definition.OPTIONS)
    assert list(DIFFERENTIABLE) == NAMES


@pytest.mark.parametrize(
    "pattern", [(b, h, q, k) for b in (0, 1) for h in (0, 1) for q in (0, 1) for k in (0, 1)], ids=str
)
def test_a_bias_broadcasts_over_any_axes_and_so_does_its_gradient(pattern):
    """One number for all scores has a gradient of 0 under softmax, in which only rounding could be compared."""
    normalizer = "softmax" if any(pattern[2:]) else "sigmoid"
    check(registry.make(20, 2, 5, 7, bias=pattern, normalizer=normalizer, masks="causal", scale=0.3))


CASES = {
    "causal, rows that see nothing": dict(masks="causal", bias=(0, 1, 1, 1), sink=True, return_stats=("lse",)),
    "causal, more keys": dict(queries=18, keys=50, masks="causal", bias=(0, 0, 1, 1), kv_heads=1),
    "dropout": dict(queries=18, keys=70, dropout_p=0.4, dropout_seed=2**40 + 3, bias=(1, 0, 1, 1), heads=1),
    "groups": dict(queries=18, heads=4, kv_heads=2, bias=(0, 1, 0, 1), key_bias=True, scale="heads"),
    "rows": dict(bias=(0, 1, 1, 0), masks="dense", sink=True),
    "sigmoid": dict(normalizer="sigmoid", bias=(0, 1, 1, 1), masks="causal", scale="heads"),
    "relu": dict(normalizer="relu", bias=(1, 1, 1, 0), masks="dense", key_bias=True),
    "gain": dict(modulation="gain", masks="table", bias=(0, 1, 0, 1), scale="heads"),
    "weight": dict(modulation="weight", masks="empty", dropout_p=0.3, dropout_seed=7, sink=True),
    "gain, sigmoid": dict(modulation="mixture", queries=18, keys=18, grid=(3, 6), normalizer="sigmoid", masks="levels"),
    "rows and columns": dict(typed="decomposed", queries=19, keys=35, grid=(5, 7), masks="segments", kv_heads=1),
    "long rows": dict(
        typed="decomposed", queries=3, keys=74, grid=(2, 37), dropout_p=0.3, dropout_seed=3, masks="causal"
    ),
    "rates": dict(typed="manhattan", queries=21, keys=21, grid=(7, 3), modulation="gain", normalizer="relu"),
    "distances": dict(
        typed="euclidean", masks="levels", bias=(0, 0, 1, 1), sink=True, return_stats=("key_mean",), weighed=True
    ),
    "means": dict(
        masks="causal", kv_heads=1, dropout_p=0.3, dropout_seed=5, modulation="weight", return_stats=("lse", "key_mean")
    ),
    "means, sigmoid": dict(
        masks="empty", normalizer="sigmoid", typed="euclidean", return_stats=("key_mean",), weighed=True, scale="heads"
    ),
    "path": dict(typed="path", queries=35, keys=35, grid=(5, 7), masks="causal", key_bias=True, kv_heads=1),
    "path, transposed": dict(
        typed="transposed", queries=36, keys=36, grid=(2, 18), normalizer="sigmoid", modulation="weight"
    ),
    "policy": dict(
        modulation="policy", masks="empty", bias=(0, 1, 1, 1), kv_heads=1, key_bias=True, dropout_p=0.3, dropout_seed=5
    ),
    "policy, causal": dict(
        modulation="policy",
        masks="causal",
        queries=37,
        keys=50,
        typed="euclidean",
        heads=1,
        return_stats=("key_mean",),
        weighed=True,
    ),
    "largest": dict(topk=5, masks="empty", bias=(0, 1, 1, 1), kv_heads=1, sink=True, return_stats=("lse", "key_mean")),
    "largest, causal": dict(
        topk=9, queries=20, keys=40, masks="causal", key_bias=True, dropout_p=0.3, dropout_seed=4, modulation="weight"
    ),
    "largest, sigmoid": dict(
        topk=30, queries=18, normalizer="sigmoid", masks="segments", typed="euclidean", modulation="gain"
    ),
    "largest, policy": dict(topk=3, queries=7, modulation="policy", masks="dense"),
    "best keys": dict(
        normalizer="argmax_k", masks="empty", bias=(0, 1, 1, 1), kv_heads=1, dv=20, return_stats=("index",)
    ),
    "best queries": dict(normalizer="argmax_q", masks="causal", modulation="gain", heads=4, kv_heads=2, dv=20),
    "best keys, factors": dict(
        normalizer="argmax_k",
        masks="empty",
        modulation="weight",
        kv_heads=1,
        dv=72,
        dropout_p=0.3,
        dropout_seed=5,
        return_stats=("index", "key_mean"),
        weighed=True,
    ),
    "best queries, factors": dict(
        normalizer="argmax_q",
        masks="dense",
        modulation="weight",
        dropout_p=0.4,
        dropout_seed=2,
        return_stats=("key_mean",),
    ),
    "none": dict(normalizer="none", bias=(1, 1, 1, 1), masks="empty", dropout_p=0.2, dropout_seed=1),
}


IN_FLOAT32 = ("largest", "dropout", "sigmoid", "distances", "means, sigmoid", "best keys", "best queries", "path")


@pytest.mark.parametrize("name", CASES)
def test_several_tiles(name, tuned):
    tuned(16, 32)
    case = {"batch": 2 if name == "groups" else 1, "queries": 37, "keys": 33} | CASES[name]
    check(
        registry.make(30, **case),
        FULL if name in IN_FLOAT32 else HALF,
    )


PACKED = [
    *(c for c in packed.small_packed() if c.seed != 22),  # a policy beside contextual positions runs the definition
    packed.packed(
        7, ((3, 40), (0, 2), (35, 1), (4, 0), (0, 0), (20, 37)), causal=True, ids=True, return_stats=("lse",)
    ),
    packed.packed(11, ((3, 5), (4, 0), (0, 2))),
    packed.packed(13, ((3, 1), (5, 1)), normalizer="sigmoid"),
    packed.packed(14, ((1, 18), (1, 3)), heads=1),
    packed.packed(12, ((3, 5), (0, 4), (2, 0)), bias=False, normalizer="none"),
    packed.packed(10, ((18, 3), (0, 1), (20, 40), (3, 0)), topk=4, causal=True),
    packed.packed(6, ((18, 3), (0, 1), (2, 40)), bias=False, normalizer="argmax_k", return_stats=("index", "key_mean")),
    packed.packed(9, ((18, 3), (3, 0), (2, 40)), causal=True, normalizer="argmax_q"),
    packed.packed(8, ((18, 3), (2, 40)), bias=False, rows=True, normalizer="sigmoid", return_stats=("key_mean",)),
    packed.packed(
        16, ((18, 40), (0, 2), (33, 17), (3, 0), (5, 5)), causal=True, beside="policy", return_stats=("key_mean",)
    ),
    packed.packed(17, ((5, 140), (7, 3)), kv_heads=2, beside="policy"),
    packed.packed(
        26, ((18, 40), (0, 2), (33, 17), (3, 0)), beside="context", normalizer="sigmoid", return_stats=("key_mean",)
    ),
    packed.packed(27, ((35, 35), (35, 35)), heads=1, causal=True, beside="path", sides=(5, 7)),
]


@pytest.mark.parametrize("call", PACKED, ids=str)
def test_packed_sequences(call, tuned):
    tuned(16, 32)
    with tokens_on_gpu("triton"):
        testing.assert_matches(testing.entries()["attention_varlen"], call, (HALF, FULL)[call.seed % 2], "triton")


@pytest.mark.parametrize("normalizer", ["argmax_k", "argmax_q"])
def test_hard_choices_of_ties_and_of_what_is_not_finite(normalizer, tuned):
    """The first of equal scores, a NaN before all; a value that is not finite reaches those that have it alone."""
    tuned(16, 16)
    args = arguments(1, 37, 40, 1, normalizer=normalizer, mask=torch.rand(1, 1, 37, 40) < 0.5, scale=0.5)
    args[0], args[1] = (torch.randint(-1, 2, t.shape).float() for t in args[:2])  # whole numbers: equal to the bit
    check_op(args)
    args[1] = args[1].clone()
    args[1][0, 21, 0, 3], args[2][0, 4, 0, 1], args[2][0, 30, 0, 2] = math.nan, math.inf, math.nan
    factors = Call(*args)._replace(weight=torch.randn(1, 1, 37, 40) * (torch.rand(37, 40) < 0.7))
    factors.weight[..., 4] = 0.0
    for case in (args, [*factors], [*factors._replace(seed=torch.tensor([6]), dropout_p=0.4)]):
        for got, want in zip(kernels.fwd(*case), OP.definition(*case), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("normalizer", ["argmax_k", "argmax_q"])
def test_samples_and_heads_that_share_a_factor_of_hard_choices(normalizer, tuned):
    tuned(16, 16)
    given = {"normalizer": normalizer, "mask": torch.rand(2, 1, 20, 35) < 0.8, "kv_heads": 2, "d": 5, "dv": 20}
    call = Call(*arguments(2, 20, 35, 4, seed=torch.tensor([8]), dropout_p=0.3, **given))
    for shape in ((1, 1), (1, 4), (2, 1)):
        check_op([*call._replace(weight=scores((*shape, 20, 35)), query_weight=torch.rand(2, 20, 4))])
    bounds = [torch.tensor(x).int() for x in ((0, 9, 20, 20), (0, 18, 30, 35))]
    packed = Call(*arguments(1, 20, 35, 2, normalizer=normalizer))._replace(
        cu_q=bounds[0], cu_k=bounds[1], max_q=11, max_k=18
    )
    check_op([*packed._replace(weight=scores((1, 2, 11, 18)), query_weight=torch.rand(1, 20, 2))])


def test_packed_rows_columns_factors_and_distances(tuned):
    """Slots that belong to tokens, or to the longest sequence, beside bounds that repeat."""
    tuned(16, 16)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ((0, 5, 5, 24), (0, 18, 20, 26))]
    args = Call(*arguments(1, 24, 26, 2))._replace(
        cu_q=bounds[0], cu_k=bounds[1], max_q=21, max_k=18, rel_y=torch.randn(1, 24, 2, 3), rel_x=torch.randn(1, 24, 1, 6),
        gain=torch.randn(1, 2, 21, 18), weight=torch.randn(1, 1, 21, 18), slope=torch.rand(2), q_xy=torch.randn(1, 24, 2),
        k_xy=torch.randn(1, 26, 2), query_weight=torch.rand(1, 24, 2), bias=torch.randn(1, 1, 21, 18),
    )  # fmt: skip
    check_op([*args])


@pytest.mark.parametrize(
    "d, dv", [(1, 8), (15, 24), (40, 17), (72, 80), (80, 72), (96, 200), (256, 130), (64, 256)], ids=str
)
def test_widths(d, dv):
    check(registry.make(40, 1, 5, 7, heads=1, d=d, dv=dv, bias=(0, 1, 1, 1)), HALF)


def test_no_width_is_padded_beyond_two_blocks():
    assert [widths(d) for d in (1, 16, 17, 40, 64, 72, 80, 88, 96, 112, 130, 192, 256)] == [
        (1, 16, 0), (16, 16, 0), (17, 32, 0), (40, 32, 16), (64, 64, 0), (72, 64, 16), (80, 64, 16), (88, 64, 32),
        (96, 64, 32), (112, 128, 0), (130, 128, 16), (192, 128, 64), (256, 128, 128),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_shipped_configuration(dtype, monkeypatch):
    monkeypatch.undo()
    _host.config.cache_clear()
    check(registry.make(50, 1, 20, 40, d=24, bias=(0, 1, 1, 1), masks="dense"), dtype)


def test_strides():
    """Expanded and transposed biases and masks, an expanded bias gradient, heads of stride 0, a last stride of 2."""
    args = arguments(heads=4, kv_heads=2, bias=scores((1, 1, 7, 5)).mT.expand(2, 4, 5, 7))
    args[0] = torch.randn(2, 5, 4, 16)[..., ::2]
    args[1] = args[1].permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    args[2] = args[2][:1].expand(2, 7, 2, 8)
    args[4] = scores((2, 1, 1, 14))[..., ::2]
    args[5] = (torch.rand(4, 5, 1) < 0.8).expand(2, 4, 5, 7)
    args[6] = torch.rand(8)[::2]
    args[7] = torch.tensor(0.5).expand(4)
    got = check_op(args)
    assert got[3].shape == (2, 4, 5, 7) and not torch.equal(got[3][0], got[3][1])
    check_op(arguments(bias=scores((2, 2, 5, 7)).half(), dtype=FULL))
    check_op(arguments(bias=scores((1, 2, 5, 7)), key_bias=scores((1, 2, 1, 7)), dtype=HALF))


def test_offsets_beyond_32_bits():
    """Views whose samples, and whose rows of scores, lie more than 2^31 elements apart; untouched pages hold no memory."""
    args = arguments(d=16, dtype=HALF, bias=scores((2, 1, 5, 7)).half(), mask=torch.rand(2, 1, 5, 7) < 0.8)
    far = torch.UntypedStorage(2 * (2 * 2**31 + 8192))
    flat = torch.tensor([], dtype=HALF).set_(far)
    for n in range(3):
        view = flat.as_strided(args[n].shape, (2**31, *args[n].stride()[1:]), n * 1024)
        args[n] = view.copy_(args[n])
    args[3] = flat.as_strided((2, 1, 5, 7), (7, 0, 2**29, 1), 4096).copy_(args[3])
    spots = torch.tensor([], dtype=torch.bool).set_(torch.UntypedStorage(2**31 + 4096))
    args[5] = spots.as_strided((2, 1, 5, 7), (2**31, 0, 7, 1)).copy_(args[5])
    check_op(args)


def test_biases_that_hide_and_large_logits():
    check_op(arguments(bias=scores((2, 1, 5, 7), hide=0.6), key_bias=scores((1, 1, 1, 7), hide=0.3)))
    for shift in (-90.0, 1e4):
        args = Call(*arguments(bias=scores((1, 2, 5, 7)) + shift))
        check_op([*args._replace(query_weight=torch.rand(2, 5, 2))])  # of an lse that float32 rounds
    check_op(arguments(bias=scores((1, 2, 5, 7)), sink=torch.tensor([-math.inf, 90.0])))


def test_additive_masks_of_the_least_finite_number():
    """What libraries put where nothing is to be seen: the first tiles of a row, and a whole row, which is then even."""
    q, k, v = (torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3))
    least = torch.finfo(torch.float32).min
    added = torch.zeros(1, 1, 40, 40)
    added[..., :33] = least
    added[:, :, 7] = least
    with tokens_on_gpu("triton"):
        got = vitkern.attention(q, k, v, bias=added, backend="triton")
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    want = ((a @ b.mT * 8**-0.5 + added).softmax(-1) @ c).transpose(1, 2)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "none", "policy", "largest", "heads", "heads, none"])
@pytest.mark.parametrize("hides", ["mask", "bias", "causal", "ids"])
def test_nothing_hidden_leaks(hides, normalizer, tuned):
    """NaN and infinity in keys and values: rows that do not see them, and all gradients but their own, are as without."""
    tuned(16, 16)
    more = {
        "policy": {"policy": torch.rand(1, 20), "policy_eps": 1e-3, "policy_diagonal": True},
        "largest": {"topk": 4},
    }
    more |= dict.fromkeys(("heads", "heads, none"), mixtures(1))
    more = more.get(normalizer, {})
    normalizer = {"heads, none": "none"}.get(normalizer, "softmax" if more else normalizer)
    args = [
        *Call(*arguments(1, 20, 20, 1, bias=scores((1, 1, 20, 20)), normalizer=normalizer, scale=0.3))._replace(**more)
    ]
    seen = torch.rand(1, 1, 20, 20) < 0.7
    seen[..., 3] = False  # seen by nobody
    seen[..., 17] = False
    seen[..., 5, :] = False  # sees nothing
    if hides == "mask":
        args[5] = seen
    elif hides == "bias":
        args[3] = args[3].masked_fill(~seen, -math.inf)
    elif hides == "ids":
        q_ids, k_ids = (torch.arange(20)[None] % 2 for _ in range(2))
        q_ids[:, 5], k_ids[:, [3, 17]] = -1, -1
        seen = ((q_ids[:, :, None] == k_ids[:, None]) & (q_ids >= 0)[..., None])[:, None]
        call = Call(*args)._replace(q_ids=q_ids.int(), k_ids=k_ids.int(), rule="equal")
        if "pre_weight" not in more:
            gain, weight = (scores((1, 1, 20, 20)).masked_fill(~seen, math.nan) for _ in range(2))
            call = call._replace(gain=gain, weight=weight)
        args = [*call]
    else:
        args[OFFSET - 1 : OFFSET + 1] = True, -2
        seen = torch.ones(20, 20, dtype=torch.bool).tril(-2)[None, None]
    never = ~seen.any(2)[0, 0]
    dirty = list(args)
    dirty[1], dirty[2] = args[1].clone(), args[2].clone()
    dirty[1][:, never] = math.nan
    dirty[2][:, never] = math.inf
    want, got = kernels.fwd(*args), kernels.fwd(*dirty)
    dout = torch.randn(want[0].shape)
    assert torch.equal(want[1], got[1])
    testing.assert_close_to_oracle("out", got[0], OP.definition(*wide(args))[0], OP.definition(*args)[0])
    for name, x, y in zip(
        NAMES, *(kernels.bwd(dout, None, None, *want[1:], *a, EVERYTHING) for a in (args, dirty)), strict=True
    ):
        assert x is None or torch.equal(x, y) or (name in ("k", "v") and torch.equal(x[:, ~never], y[:, ~never])), name
    dirty[1], dirty[2] = args[1].clone(), args[2].clone()
    dirty[2][0, 9, 0, 4], dirty[2][0, 10, 0, 6], dirty[1][0, 11, 0, 2] = math.nan, -math.inf, -math.inf
    (out, *rest), (same, *_) = kernels.fwd(*dirty), OP.definition(*dirty)
    oracle, at = OP.definition(*wide(dirty)), same.isfinite()
    assert torch.equal(out.isfinite(), at) and not out.isinf().any() and at.any() and not at.all()
    testing.assert_close_to_oracle("out", out, oracle[0], same)
    if normalizer == "softmax":  # a row that is NaN has no gradient
        assert all(x is None or x.isfinite().all() for x in kernels.bwd(dout, None, None, *rest, *dirty, EVERYTHING))


def test_only_the_gradients_that_are_needed_are_made():
    given = {
        "bias": scores((1, 2, 5, 7)),
        "key_bias": scores((1, 1, 1, 7)),
        "factor": torch.rand(2),
        "sink": torch.randn(2),
    }
    args = Call(*arguments(1, **given))._replace(
        gain=scores((1, 1, 5, 7)),
        weight=scores((1, 2, 5, 7)),
        rel_y=torch.randn(1, 5, 2, 2),
        rel_x=torch.randn(1, 5, 1, 4),
    )
    out, *saved = kernels.fwd(*args)
    dout, dlse = torch.randn(out.shape), torch.randn(saved[0].shape)
    some = (1, 4, 0b0001001, 0)
    every = (*some, *(1 << bit for bit in range(len(NAMES))))
    for given, needs in (((dout, dlse), every), ((dout, None), some), ((None, dlse), some), ((None, None), every)):
        with testing.poisoned():
            everything = kernels.bwd(*given, None, *saved, *args, EVERYTHING)
            assert all(x is None or x.isfinite().all() for x in everything)
            assert given != (None, None) or not any(x is not None and x.any() for x in everything)
            for need in needs:
                found = kernels.bwd(*given, None, *saved, *args, need)
                for bit, (name, x, y) in enumerate(zip(NAMES, found, everything, strict=True)):
                    wanted = need >> bit & 1 and y is not None
                    assert (x is not None and torch.equal(x, y)) if wanted else x is None, (name, need)


def test_the_order_of_sums_is_fixed_and_parts_are_added(tuned):
    """Three samples share a bias: one program for all of them, one each, and the same bits again."""
    args = arguments(3, 5, 7, 2, bias=scores((1, 1, 5, 7)))
    for programs in (1, 4, 99):
        tuned(16, 16, programs)
        torch.manual_seed(1)
        first = check_op(args)
        torch.manual_seed(1)
        assert all(x is None or torch.equal(x, y) for x, y in zip(check_op(args), first, strict=True))


def test_reasons():
    assert kernels.supported(*arguments()) == []
    why = " ".join(kernels.supported(*arguments(d=300, dtype=torch.float64, normalizer="argmax_k", dropout_p=1.5)))
    assert "300" in why and "float64" in why and "dropout_p" in why
