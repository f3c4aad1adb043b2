"""window_attention on CUDA devices: which of Triton and CUDA C++ can run a call, and the two ways there."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _cuda

CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_MAX_TOKENS = 64
CUDA_MAX_HEAD = 128
CUDA_STRIDE = 2**31

_OPTIONS = (
    "Tensor? bias, Tensor? index, Tensor? logit_scale, Tensor? k_pad, Tensor? v_pad, Tensor? seed, SymInt[] window, "
    "SymInt[] shift, bool roll_first, bool pad_visible, float scale, float mask_value, float cosine_max, "
    "float cosine_eps, float dropout_p"
)
_cuda.define(
    f"_window_attention_cuda_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    f"_window_attention_cuda_bwd(Tensor dout, Tensor? dlse, Tensor lse, Tensor q, Tensor k, Tensor v, {_OPTIONS}, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!)? dlogit_scale, Tensor(f!)? dk_pad, "
    "Tensor(g!)? dv_pad, Tensor(h!) workspace) -> ()",
    "_window_attention_cuda_workspace(SymInt heads, SymInt kv_heads, SymInt windows, SymInt tokens, SymInt d, "
    "SymInt dv) -> SymInt",
)


def triton_refusals(args: tuple[Any, ...]) -> list[str]:
    missing = backends.triton_missing()
    if missing:
        return [missing]
    from vitkern.triton_kernels import window_attention as kernels

    return kernels.supported(*args)


def cuda_refusals(args: tuple[Any, ...]) -> list[str]:
    """The limits of csrc/cuda/window_attention.cu, each as a sentence where this call is beyond it."""
    q, _, v = args[:3]
    tokens = math.prod(args[9])
    reasons = []
    if q.dtype not in CUDA_DTYPES:
        reasons.append(f"the dtype must be bfloat16 or float16, it is {q.dtype}")
    if tokens > CUDA_MAX_TOKENS:
        reasons.append(f"a window may hold {CUDA_MAX_TOKENS} tokens, it holds {tokens}")
    for name, t in (("q and k", q), ("v", v)):
        if t.shape[-1] % 8 or t.shape[-1] > CUDA_MAX_HEAD:
            reasons.append(
                f"the head size of {name} must be a multiple of 8 up to {CUDA_MAX_HEAD}, it is {t.shape[-1]}"
            )
    for name, t in zip("qkv", args[:3], strict=False):
        if t.stride(-1) != 1:
            reasons.append(f"the last dimension of {name} must be contiguous, its stride is {t.stride(-1)}")
        if any(s >= CUDA_STRIDE for s in t.stride()[1:-2]):
            reasons.append(f"the strides of {name} on the map must be below 2^31")
    for name, t in (("bias", args[3]), ("logit_scale", args[5])):
        if t is not None and t.dtype == torch.float64:
            reasons.append(f"{name} must not be float64")
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
        _cuda.ops._window_attention_cuda_fwd(*_as_kernel(inputs), out, lse)
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
        from vitkern.triton_kernels import window_attention_bwd as kernels

        return kernels.bwd(dout, dlse, lse, *inputs, wanted, dq, dk, dv)[3:]
    if gpu == "cuda":
        return _cuda_backward(into, dout, dlse, lse, inputs, wanted)
    grads = reference_backward(dout, dlse, lse, *args)
    for target, grad in zip(into, grads, strict=False):
        if grad is not None:
            target.copy_(grad)
    return grads[3:]


def _as_kernel(inputs: list[Any]) -> list[Any]:
    """The arguments as the CUDA kernels take them: contiguous pads in q's dtype, the logit scale in float32."""
    given = list(inputs)
    for position in (6, 7):
        if given[position] is not None:
            given[position] = given[position].to(given[0].dtype).contiguous()
    if given[5] is not None:
        given[5] = given[5].float().contiguous()
    return given


def _cuda_backward(
    into: tuple[Tensor, Tensor, Tensor], dout: Any, dlse: Any, lse: Tensor, inputs: list[Any], wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    q, k, v, bias, index, logit_scale, k_pad, v_pad = inputs[:8]
    window = inputs[9]
    heads, kv_heads, tokens = q.shape[-2], k.shape[-2], math.prod(window)
    windows = q.shape[0] * math.prod(-(-n // w) for n, w in zip(q.shape[1:-2], window, strict=True))
    shapes = (
        None if bias is None else bias.shape if index is not None else (heads, tokens, tokens),
        None if logit_scale is None else (heads,),
        None if k_pad is None else k_pad.shape,
        None if v_pad is None else v_pad.shape,
    )
    sums = [
        q.new_empty(s, dtype=torch.float32) if s is not None and w else None
        for s, w in zip(shapes, wanted[3:], strict=True)
    ]
    if dout is None:
        dout = v.new_zeros((*q.shape[:-1], v.shape[-1]))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # the size depends on the current device
        size = _cuda.ops._window_attention_cuda_workspace(heads, kv_heads, windows, tokens, q.shape[-1], v.shape[-1])
    workspace = q.new_empty(size, dtype=torch.float32)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    _cuda.ops._window_attention_cuda_bwd(dout, dlse, lse, *_as_kernel(inputs), *into, *sums, workspace)
    return tuple(
        None if s is None else s.sum_to_size(like.shape).to(like.dtype)
        for s, like in zip(sums, (bias, logit_scale, k_pad, v_pad), strict=True)
    )
