"""attention in Triton, interpreted on the CPU: offsets that meet the content (ContextualPosition). Run by tests/test_triton.py."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attention_op import FULL, HALF, arguments, check_op, scores, small_tiles, wide

from vitkern import testing
from vitkern.bias import ContextualPosition
from vitkern.ops import _attention_slots as slots
from vitkern.ops.attention import OP, lower
from vitkern.ops.attention_varlen import _lower as lower_packed
from vitkern.testing.attention_varlen import packed
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call

PARTS = ("position_q", "position_k", "position_v")


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


def call(batch=2, queries=19, keys=37, heads=2, rows=7, names=PARTS, of_batch=True, alike=False, **given):
    """Arguments of the op with tables of `rows` rows; `of_batch`: every sample has its index; `alike`: heads share the values."""
    c = Call(*arguments(batch, queries, keys, heads, **given))
    width = c.v.shape[3]
    drawn = {
        "position_q": torch.randn(batch, queries, heads, rows), "position_k": torch.randn(batch, keys, heads, rows),
        "position_v": torch.randn(1, 1 if alike else heads, rows, width),
    }  # fmt: skip
    index = torch.randint(0, rows, (batch if of_batch else 1, queries, keys), dtype=torch.int32)
    return c._replace(position_index=index, **{name: drawn[name] for name in names})


def checked(c, **more):
    return check_op([*c._replace(**more)])


@pytest.mark.parametrize("names", [(name,) for name in PARTS] + [PARTS], ids=str)
def test_each_part_alone_and_all(names, tuned):
    tuned(16, 16)
    checked(call(names=names, kv_heads=1, dv=20, of_batch=False, alike=True))


@pytest.mark.parametrize("rows", [1, 16, 33, 70])
def test_counts_of_rows(rows, tuned):
    tuned(32, 16)
    checked(call(batch=1, rows=rows, d=20, dv=40))


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "none", "argmax_k", "argmax_q", "policy"])
def test_beside_other_terms(normalizer, tuned):
    tuned(16, 32)
    policy = normalizer == "policy"
    c = call(normalizer="softmax" if policy else normalizer, kv_heads=1)
    both = c.q.shape[1], c.k.shape[1]
    more = {"bias": scores((1, 2, *both)), "gain": scores((1, 1, *both)), "weight": scores((2, 1, *both))}
    more |= {"mask": torch.rand(2, 1, *both) < 0.8, "seed": torch.tensor([3]), "dropout_p": 0.3}
    more |= {"query_weight": torch.rand(2, both[0], 2), "later_ratio": torch.rand(())}
    if policy:
        more |= {"policy": torch.rand(2, both[1]), "policy_eps": 1e-3, "policy_diagonal": True}
    checked(c, **more)


@pytest.mark.parametrize(
    "given",
    [
        {"topk": 5},
        {"causal": True, "offset": 9},
        {"topk": 4, "normalizer": "argmax_k"},
        {"sink": torch.tensor([0.3, -1.0])},
    ],
    ids=str,
)
def test_largest_causal_and_sinks(given, tuned):
    tuned(16, 16)
    checked(call(batch=1, dtype=HALF), **given)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_few_queries_share_out_their_keys(dtype, tuned):
    tuned(16, 16, 99)
    checked(call(batch=1, queries=3, keys=140, heads=1, dtype=dtype))


def test_strides_and_one_table_beside_tables_of_offsets(tuned):
    tuned(16, 16)
    c = call(batch=2, queries=20, keys=20, rows=9)
    c = c._replace(
        position_index=c.position_index.mT, position_q=c.position_q.transpose(1, 3).contiguous().transpose(1, 3),
        position_k=c.position_k[:1].expand(2, 20, 2, 9), position_v=c.position_v.mT.contiguous().mT,
        bias_table=torch.randn(1, 2, 1, 63), grid_height=4, grid_width=5, grid_step=1,
    )  # fmt: skip
    checked(c)


@pytest.mark.parametrize("queries, keys", [(5, 0), (0, 5)])
@pytest.mark.parametrize("normalizer", ["softmax", "argmax_q"])
def test_no_keys_and_no_queries(queries, keys, normalizer):
    checked(call(queries=queries, keys=keys, normalizer=normalizer))


def test_what_a_mask_hides_does_not_leak(tuned):
    tuned(16, 16)
    c = call(batch=1, keys=20)
    seen = torch.rand(1, 1, 19, 20) < 0.7
    seen[..., 4] = False
    c = c._replace(mask=seen)
    dirty = c._replace(k=c.k.clone(), v=c.v.clone(), position_k=c.position_k.clone())
    dirty.k[:, 4], dirty.v[:, 4], dirty.position_k[:, 4] = math.nan, math.inf, math.nan
    (out, lse, _), (want, same, _) = kernels.fwd(*dirty), kernels.fwd(*c)
    assert torch.equal(lse, same)
    testing.assert_close_to_oracle("out", out, OP.definition(*wide([*c]))[0], want)


def test_packed_sequences_are_said_to_become_a_padded_batch():
    call = packed(20, ((3, 5), (2, 7)), beside="context")
    args, options = call.build({name: t.float() if t.is_floating_point() else t for name, t in call.tensors.items()})
    lowered, sequences = lower_packed(*args, **options)
    found, notes = slots.notes(lowered, sequences, "triton")
    assert "padded batch" in notes[-1] and not kernels.supported(*found.values()) and found["cu_q"] is None
    assert slots.notes(lowered, sequences, "cpu")[0]["cu_q"] is not None


def test_no_map_stands_where_there_are_slots():
    q, k, v = torch.randn(3, 2, 6, 2, 8).unbind(0)
    b = ContextualPosition(
        torch.randn(5, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 2, 8), torch.randint(0, 5, (6, 6))
    )
    lowered = lower(q, k, v, bias=b)
    found, notes = slots.notes(lowered, None, "triton")
    assert notes == [] and found["bias"] is None and found["position_v"].shape == (1, 2, 5, 8)
    assert not slots.unserved(lowered, "triton") and not kernels.supported(*found.values())
    assert "packed" in " ".join(kernels.supported(*Call(*found.values())._replace(cu_q=torch.zeros(2).int())))
