"""merge_tokens, unmerge_tokens and restore_tokens in Triton, and what they carry, interpreted on the CPU, against the
reference in float64. Run by tests/test_triton.py."""

import random

import pytest
import torch

from vitkern import testing
from vitkern.ops import _call
from vitkern.ops._op import PlainOp
from vitkern.triton_kernels import merge_tokens, restore_tokens, unmerge_tokens

ENTRIES = testing.entries()
KERNELS = {"merge_tokens": merge_tokens, "unmerge_tokens": unmerge_tokens, "restore_tokens": restore_tokens}
NAMES = (*KERNELS, "select_tokens", "drop_tokens")  # the last two choose in PyTorch and move rows by merge_tokens


class Interpreted(torch.autograd.Function):
    """The launch functions as one differentiable call."""

    @staticmethod
    def forward(ctx, op, *args):
        kernels = KERNELS[op.name]
        assert kernels.supported(*args) == []
        ctx.op, ctx.args = op, args
        out = kernels.fwd(*args)
        ctx.saved = out[1:] if isinstance(out, tuple) else ()
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, *douts):
        need = ctx.op.need(lambda i: ctx.needs_input_grad[i + 1])
        found = KERNELS[ctx.op.name].bwd(*douts, *ctx.saved, *ctx.args, need)
        found = found if isinstance(found, tuple) else (found,)
        grads = dict(zip(ctx.op.differentiable, found, strict=True))
        return (None, *(grads.get(i) for i in range(len(ctx.args))))


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Public calls with backend="cpu" run the Triton launch functions on CPU tensors."""

    def run(op, args, backend, *refusals):
        plain = backend == "reference" or isinstance(op, PlainOp)
        return op.definition(*args) if plain else Interpreted.apply(op, *args)

    monkeypatch.setattr(_call, "run", run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_small_calls(name, dtype):
    for call in ENTRIES[name].small():
        testing.assert_matches(ENTRIES[name], call, dtype, "cpu")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", NAMES)
def test_sampled_calls(name, seed):
    call = ENTRIES[name].draw(random.Random(f"triton {seed}"))
    testing.assert_matches(ENTRIES[name], call, torch.float32, "cpu")


def test_refusals_are_sentences():
    x, plan = torch.zeros(1, 2, 9000, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.int32)
    why = merge_tokens.supported(x, plan, plan, plan, None, "mean", True)
    assert why == [
        "x must be float32, bfloat16 or float16, got torch.float64",
        "a token may have 8192 channels, it has 9000",
    ]
    why = restore_tokens.supported(x[..., :4].float(), plan, x, None, 2, 0.0)
    assert why == ["fill must be float32, bfloat16 or float16, got torch.float64"]
