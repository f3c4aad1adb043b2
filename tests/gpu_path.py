"""The public functions through their GPU implementations, on CPU tensors: what the dispatcher does for CUDA tensors."""

from dataclasses import replace
from typing import Any

import torch

import vitkern
from vitkern import Stats
from vitkern.ops import window_attention as op_file
from vitkern.testing import Call


def apply(op: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The op with its CUDA forward and, under autograd, its CUDA backward."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            outputs = op.cuda_forward(*args)
            op._save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
            *tensors, lse = ctx.saved_tensors
            need = op.need(lambda i: ctx.needs_input_grad[i])
            found = op.cuda_backward(dout, dlse, lse, *tensors, *ctx.options, need)
            grads = [None] * (len(tensors) + len(ctx.options))
            for position, grad in zip(op.differentiable, found, strict=True):
                grads[position] = grad
            return tuple(grads)

    return Through.apply(*args)


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
