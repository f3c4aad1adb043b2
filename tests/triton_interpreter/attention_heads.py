"""attention in Triton with policies and with heads that mix, interpreted on the CPU. Run by tests/test_triton.py."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import HALF, arguments, check_op, mixtures, scores, small_tiles
from gpu_path import tokens_on_gpu

import vitkern
from vitkern import mask, modulation
from vitkern.ops.attention import OP
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    """One tile for a small call, unless a test asks for other tiles."""
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


MIXED = {
    "CaiT": lambda: (arguments(1, 21, 21, 4, d=48, dtype=HALF), mixtures(4)),
    "three heads, one shared bias": lambda: (
        arguments(3, 18, 35, 3, d=5, dv=70, bias=scores((1, 1, 18, 35)), mask=torch.rand(1, 1, 18, 35) < 0.7,
                  sink=torch.randn(3), key_bias=scores((3, 1, 1, 35))), mixtures(3)),
    "six heads, two of keys": lambda: (
        arguments(2, 20, 17, 6, kv_heads=2, d=40, dv=20, bias=scores((2, 6, 20, 17)), causal=True, offset=-2, factor=torch.rand(6),
                  mask=torch.rand(2, 6, 20, 17) < 0.8, seed=torch.tensor([7]), dropout_p=0.3, dtype=HALF), mixtures(6)),
    "sigmoid": lambda: (
        arguments(1, 20, 19, 2, normalizer="sigmoid", bias=scores((1, 2, 20, 1)), factor=torch.rand(2)),
        mixtures(2) | {"query_weight": torch.rand(1, 20, 2)}),
    "relu, before alone": lambda: (
        arguments(2, 17, 19, 2, normalizer="relu", bias=scores((1, 2, 1, 19)), seed=torch.tensor([3]), dropout_p=0.2),
        mixtures(2, "pre_weight")),
    "none, behind alone": lambda: (
        arguments(1, 7, 18, 16, normalizer="none", d=72, bias=scores((1, 1, 1, 18))), mixtures(16, "post_weight", "post_bias")),
    "offsets alone": lambda: (
        arguments(1, 7, 18, 5, scale=0.7), mixtures(5, "pre_bias", "post_bias") | {"query_weight": torch.rand(1, 7, 5)}),
    "ids": lambda: (
        arguments(2, 17, 20, 3, dtype=HALF),
        mixtures(3) | {"q_ids": torch.randint(-1, 2, (2, 17)).int(), "k_ids": torch.randint(-1, 2, (1, 20)).int(),
                       "rule": "equal"}),
    "packed": lambda: (
        arguments(1, 24, 26, 3, key_bias=scores((1, 1, 1, 26)), bias=scores((1, 3, 21, 18)), causal=True, offset=1),
        mixtures(3) | {"cu_q": torch.tensor((0, 5, 5, 24)).int(), "cu_k": torch.tensor((0, 18, 20, 26)).int(),
                       "max_q": 21, "max_k": 18}),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_mixed_heads(case):
    """Heads that are no power of two, groups, several tiles and columns, samples that share a bias."""
    args, more = MIXED[case]()
    check_op([*Call(*args)._replace(**more)])


def test_large_logits_of_mixed_heads():
    """An lse that float32 rounds."""
    for shift in (-90.0, 1e4):
        check_op(
            [
                *Call(*arguments(bias=scores((1, 2, 5, 7)) + shift))._replace(
                    **mixtures(2), query_weight=torch.rand(2, 5, 2)
                )
            ]
        )


def test_a_head_that_hides_a_nan_mixes_nothing_into_others():
    mask = torch.ones(1, 2, 5, 7, dtype=torch.bool)
    mask[:, 0, :, 3] = mask[:, 1, 2:, 4] = False
    args = [*Call(*arguments(1, mask=mask))._replace(**mixtures(2))]
    args[1] = args[1].clone()
    args[1][0, 3, 0, 0] = math.nan  # seen by head 1 alone, whose products are whole
    out = check_op(args)[0]
    assert out.isfinite().all()
    args[1][0, 4, 1, 0] = math.inf
    (out, *_), (want, *_) = kernels.fwd(*args), OP.definition(*args)
    assert (
        torch.equal(out.isfinite(), want.isfinite()) and out[:, 2:].isfinite().all() and not out[:, :2].isfinite().any()
    )


def test_policies(tuned):
    """One for all samples, without its diagonal, with rows that keep nothing; keys of few queries are shared out."""
    tuned(16, 32)
    given = {"mask": torch.rand(2, 1, 18, 70) < 0.7, "bias": scores((1, 2, 18, 70)), "factor": torch.rand(2)}
    call = Call(*arguments(2, 18, 70, 2, **given))._replace(policy=(torch.rand(1, 70) < 0.5).float(), policy_eps=1e-6)
    check_op([*call])
    call.mask[:, :, 3] &= call.policy[:, None] == 0
    call = call._replace(weight=scores((1, 1, 18, 70)), rel_y=torch.randn(2, 18, 2, 7), rel_x=torch.randn(1, 18, 1, 10),
                         gain=scores((1, 2, 18, 70)), policy_eps=1e-3, policy=(call.policy * 0.7).half(),
                         query_weight=torch.rand(2, 18, 2))  # fmt: skip
    check_op([*call])
    tuned(16, 16, 99)
    few = Call(*arguments(1, 5, 130, 1, mask=torch.rand(1, 1, 5, 130) < 0.7))
    check_op([*few._replace(policy=torch.rand(1, 130), policy_eps=1e-2)])
    one = Call(*arguments(2, 5, 1, 3, d=64, dv=256))
    check_op([*one._replace(policy=torch.rand(2, 1), policy_eps=1e-3, policy_diagonal=True)])


def test_rows_of_policies_and_of_best_queries():
    """By heads alone and by heads that mix; packed too."""
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (20, 33, 33))
    heads = modulation.TalkingHeads(torch.randn(3, 3), torch.randn(3), torch.randn(3, 3), torch.randn(3))
    keep = torch.rand(2, 33, requires_grad=True)
    for options in (
        {"normalizer": "argmax_q", "return_stats": ("row", "key_mean"), "mask": mask.Causal(13)},
        {"normalizer": "argmax_q", "return_stats": "row", "modulation": heads},
        {"modulation": modulation.Policy(keep), "return_stats": "row"},
    ):
        with tokens_on_gpu("triton"):
            _, got = vitkern.attention(q, k, v, stat_rows=(0, -1, 5), backend="triton", **options)
        _, want = vitkern.attention(q, k, v, stat_rows=(0, -1, 5), backend="reference", **options)
        torch.testing.assert_close(got, want)
        if "normalizer" not in options:
            grads = [torch.autograd.grad(s.row.sin().sum(), (q, k, keep)) for s in (got, want)]
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)
    bounds = [torch.tensor(n).int() for n in ((0, 5, 5, 20), (0, 18, 20, 33))]
    given, options = (q[0], k[0], v[0], *bounds, 15, 18), {"normalizer": "argmax_q", "stat_rows": (1, 6)}
    with tokens_on_gpu("triton"):
        got = vitkern.attention_varlen(*given, return_stats="row", backend="triton", **options)[1].row
    assert torch.equal(got, vitkern.attention_varlen(*given, return_stats="row", backend="cpu", **options)[1].row)


def survivors(args, keys):
    """Where the kernels give a weight that is not 0, [B, H, Nq, Nk]: the values are unit vectors."""
    args[2] = torch.eye(keys)[None, :, None].expand(1, keys, args[1].shape[2], keys)
    out, same = kernels.fwd(*args)[0], OP.definition(*args)[0]
    assert torch.equal(out != 0, same != 0)
    return (out != 0).transpose(1, 2)


def test_the_largest_of_ties_are_the_first(tuned):
    """Whole numbers, equal to the bit; -0 ties with 0, a NaN is above all, rows with fewer visible keys keep them all."""
    tuned(16, 64)
    keys = 71
    call = Call(*arguments(1, 9, keys, 2, kv_heads=1, mask=torch.rand(1, 2, 9, keys) < 0.8))._replace(
        topk=6, scale=1.0, gain=torch.randint(0, 2, (1, 1, 9, keys)) * 2.0 - 1.0
    )
    call.mask[:, :, 3, 4:] = call.mask[:, :, 5] = False
    args = [*call]
    args[0], args[1] = (torch.randint(-1, 2, t.shape).float() for t in args[:2])
    args[0][:, 0] = 0.0
    kept = survivors(args, keys).sum(-1)
    assert torch.equal(kept, call.mask.sum(-1).clamp(max=6))
    args[1][0, 33, 0, 1] = math.nan
    for x, y in zip(kernels.fwd(*args), OP.definition(*args), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)
    check_op([*call._replace(normalizer="argmax_q", topk=1)])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("axes", [(2, 5, 1), (1, 1, 18), (2, 1, 1)])
def test_a_bias_of_packed_sequences_may_lack_an_axis(axes, mixed):
    bounds = {"cu_q": torch.tensor([0, 5, 8]).int(), "cu_k": torch.tensor([0, 18, 21]).int(), "max_q": 5, "max_k": 18}
    args = arguments(1, 8, 21, 2, bias=scores((1, *axes)).half(), normalizer="sigmoid", dtype=HALF)
    check_op([*Call(*args)._replace(**bounds, **(mixtures(2) if mixed else {}))])


@pytest.mark.parametrize("queries, keys", [(5, 0), (0, 5)])
def test_no_keys_and_no_queries(queries, keys):
    for given, more in (
        ({"sink": torch.randn(2)}, mixtures(2)),
        ({"normalizer": "none"}, mixtures(2)),
        ({}, {"policy": torch.rand(1, keys), "policy_eps": 1e-3}),
        ({}, {"topk": 3}),
        (
            {"normalizer": "argmax_q"},
            {"query_weight": torch.rand(2, queries, 2), "weight": torch.rand(1, 1, queries, keys)},
        ),
    ):
        check_op([*Call(*arguments(2, queries, keys, **given))._replace(**more)])


def test_reasons():
    call = Call(*arguments(1, heads=17))._replace(**mixtures(17), later_ratio=torch.rand(()), policy=torch.ones(1, 7))
    why = kernels.supported(*call)
    assert len(why) == 3 and "at most 16 heads, got 17" in why[0] and "policy" in why[1] and "later_ratio" in why[2]
