"""The public functions through their GPU implementations, on CPU tensors: what the dispatcher does for CUDA tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

import vitkern
from vitkern import Stats
from vitkern.ops import _call
from vitkern.ops import linear_attention as linear_file
from vitkern.ops import window_attention as op_file
from vitkern.ops._op import Op, PlainOp
from vitkern.testing import Call


def apply(op: Op, *args: Any) -> Any:
    """The op with its CUDA forward and, under autograd, its CUDA backward."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = op.gpu.forward(op, *args)
            op._save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *douts: Any) -> Any:
            everything, count = ctx.saved_tensors, len(op.tensors)
            need = op.need(lambda i: ctx.needs_input_grad[i])
            gradient = op.composed or partial(op.gpu.backward, op)
            found = op.gradients(gradient, douts, everything[count:], everything[:count], ctx.options, need)
            grads = [None] * (count + len(ctx.options))
            for position, grad in zip(op.differentiable, found, strict=True):
                grads[position] = grad
            return tuple(grads)

    return Through.apply(*args)


@contextmanager
def tokens_on_gpu(gpu: str) -> Iterator[None]:
    """The token functions run what CUDA tensors run, with `gpu` forced, behind every backend but "reference"."""

    def run(op: Op | PlainOp, args: tuple[Any, ...], backend: str | None) -> Any:
        if backend == "reference":
            return op.definition(*args)
        if gpu == "cuda" and (reasons := op.gpu.cuda_refusals(args)):
            pytest.skip("; ".join(reasons))
        assert gpu == "cuda" or op.gpu.triton_refusals(args) == []
        return op.gpu.forward(op, *args, gpu) if isinstance(op, PlainOp) else apply(op, *args, gpu)

    def reasons(op: Op | PlainOp, args: tuple[Any, ...]) -> dict[str, list[str]]:
        return {"reference": [], "triton": op.gpu.triton_refusals(args), "cuda": op.gpu.cuda_refusals(args)}

    def overload(op: Op | PlainOp, suffix: str = "") -> Any:
        """What a composed backward calls."""
        return partial(op.gpu.forward, op)

    fused = linear_file._fused

    def in_the_op(lowered: Any, custom: Any, placed: Any, backend: str | None) -> bool:
        """Maps with parameters: Triton makes them where it can, CUDA C++ does not."""
        if backend == "reference":
            return fused(lowered, custom, placed, backend)
        trial = replace(lowered)
        able = (
            gpu == "triton"
            and fused(trial, custom, placed, "reference")
            and not linear_file.GPU.triton_refusals(trial.args)
        )
        return able and fused(lowered, custom, placed, "reference")

    by_pairs = linear_file._linear_pairs.chosen

    def in_pairs(lowered: Any, backend: str | None) -> bool:
        """Few tokens: CUDA C++ takes states alone, Triton what it can."""
        args = replace(lowered, pairs=True).args
        able = backend == "reference" or (gpu == "triton" and not linear_file.GPU.triton_refusals(args))
        return able and by_pairs(lowered, backend)

    with ExitStack() as patches:
        for kind in (Op, PlainOp):
            patches.enter_context(mock.patch.object(kind, "overload", overload))
        for module, name, made in (
            (_call, "run", run),
            (_call, "reasons", reasons),
            (linear_file, "_fused", in_the_op),
            (linear_file._linear_pairs, "chosen", in_pairs),
        ):
            patches.enter_context(mock.patch.object(module, name, made))
        yield


def lowered(call: Call, tensors: dict[str, torch.Tensor]) -> tuple[Any, ...]:
    """The arguments of the op `window_attention` for a call, packed or not."""
    args, options = call.build(tensors)
    options.pop("return_stats", None)
    if call.function is vitkern.window_attention_qkvpacked:
        args = (*args[0].unbind(-3), *args[1:])
    return op_file._lower(*args, **options)


def on_gpu(call: Call, gpu: str) -> Call:
    """The call with `gpu` ("triton", "cuda" or "": the choice of the library) behind every backend but "reference"."""
    public = call.function
    packed = public is vitkern.window_attention_qkvpacked

    def function(*args: Any, backend: str | None, return_stats: tuple[str, ...] = (), **options: Any) -> Any:
        if backend == "reference":
            return public(*args, backend=backend, return_stats=return_stats, **options)
        if packed:
            qkv, *rest = args
            out, lse = apply(op_file.PACKED, qkv, *op_file._lower(*qkv.unbind(-3), *rest, **options)[3:], gpu)
        else:
            out, lse = apply(op_file.PLAIN, *op_file._lower(*args, **options), gpu)
        return (out, Stats(lse=lse)) if return_stats else out

    return replace(call, function=function)
