"""window_attention on CUDA devices: which of Triton and CUDA C++ can run a call, and the two ways there."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_MAX_TOKENS = 64
CUDA_MAX_HEAD = 128
OPTIONS = 15  # arguments after q, k, v of the op, the back-end name left out


def triton_refusals(args: tuple[Any, ...]) -> list[str]:
    missing = backends.triton_missing()
    if missing:
        return [missing]
    from vitkern.triton_kernels import window_attention as kernels

    return kernels.supported(*args)


def cuda_refusals(args: tuple[Any, ...]) -> list[str]:
    q, _, v = args[:3]
    window = args[9]
    reasons = []
    if q.dtype not in CUDA_DTYPES:
        reasons.append(f"the dtype must be bfloat16 or float16, it is {q.dtype}")
    tokens = 1
    for w in window:
        tokens *= w
    if tokens > CUDA_MAX_TOKENS:
        reasons.append(f"a window may hold {CUDA_MAX_TOKENS} tokens, it holds {tokens}")
    for name, t in (("q and k", q), ("v", v)):
        if t.shape[-1] % 8 or t.shape[-1] > CUDA_MAX_HEAD:
            reasons.append(f"the head size of {name} must be a multiple of 8 up to {CUDA_MAX_HEAD}, it is {t.shape[-1]}")
    for name, t in zip("qkv", args[:3], strict=False):
        if t.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} must be contiguous, its stride is {t.stride(-1)}")
    missing = backends.load("_cuda")
    if missing:
        reasons.append(missing)
    return reasons


def choose(args: tuple[Any, ...]) -> str:
    """The faster back-end that can run: CUDA C++ for small windows in half precision, Triton otherwise."""
    if not cuda_refusals(args):
        return "cuda"
    if not triton_refusals(args):
        return "triton"
    return "reference"


def forward(definition: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """The CUDA implementation of window_attention and window_attention_fwd."""
    *inputs, gpu = args
    gpu = gpu or choose(tuple(inputs))
    if gpu == "triton":
        from vitkern.triton_kernels import window_attention as kernels

        return kernels.fwd(*inputs)
    if gpu == "cuda":
        q, v = inputs[0], inputs[2]
        out = v.new_empty((*q.shape[:-1], v.shape[-1]))
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        torch.ops.vitkern._window_attention_cuda_fwd(*inputs, out, lse)
        return out, lse
    return definition(*args)


def backward(
    reference_backward: Any, into: tuple[Tensor, Tensor, Tensor], dout: Any, dlse: Any, lse: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of bias, logit_scale, k_pad, v_pad; those of q, k, v are written to `into`."""
    *inputs, gpu, need = args
    gpu = gpu or choose(tuple(inputs))
    wanted = [bool(need >> bit & 1) for bit in range(7)]
    dq, dk, dv = into
    if gpu == "triton":
        from vitkern.triton_kernels import window_attention as kernels

        return kernels.bwd(dout, dlse, lse, *inputs, wanted, dq, dk, dv)[3:]
    if gpu == "cuda":
        return _cuda_backward(into, dout, dlse, lse, inputs, wanted)
    grads = reference_backward(dout, dlse, lse, *args)
    for target, grad in zip(into, grads, strict=False):
        if grad is not None:
            target.copy_(grad)
    return grads[3:]


def _cuda_backward(
    into: tuple[Tensor, Tensor, Tensor], dout: Any, dlse: Any, lse: Tensor, inputs: list[Any], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    raise NotImplementedError
