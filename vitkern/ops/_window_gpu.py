"""window_attention on CUDA devices: which of Triton and CUDA C++ can run a call, and the two ways there."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _cuda
from vitkern.ops._gpu import Cuda, Gpu

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


def _triton() -> Any:
    from vitkern.triton_kernels import window_attention as kernels

    return kernels


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


@dataclass(frozen=True)
class WindowGpu(Gpu):
    """q, k and v by themselves, or `packed` in one tensor."""

    packed: bool = False

    def _separate(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[0].unbind(-3), *args[1:]) if self.packed else args

    def triton_refusals(self, args: tuple[Any, ...]) -> list[str]:
        return super().triton_refusals(self._separate(args))

    def cuda_refusals(self, args: tuple[Any, ...]) -> list[str]:
        return super().cuda_refusals(self._separate(args))

    def forward(self, op: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *inputs, named = args
        chosen = named or self.choose(tuple(inputs))
        return op.definition(*args) if chosen == "reference" else forward(chosen, *self._separate(tuple(inputs)))

    def backward(self, op: Any, dout: Any, dlse: Any, lse: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        *inputs, named, need = args
        chosen = named or self.choose(tuple(inputs))
        if chosen == "reference":
            return op.reference_backward(dout, dlse, lse, *args)
        leading = inputs[: 1 if self.packed else 3]
        grads = tuple(t.new_empty(t.shape) for t in leading)
        into = grads[0].unbind(-3) if self.packed else grads
        each = (need & 1) * 7 | need >> 1 << 3 if self.packed else need
        rest = backward(chosen, into, dout, dlse, lse, *self._separate(tuple(inputs)), each)
        return (*(t if need >> bit & 1 else None for bit, t in enumerate(grads)), *rest)


def forward(chosen: str, *inputs: Any) -> tuple[Tensor, Tensor]:
    """out and lse of the separate q, k, v by "triton" or "cuda"."""
    if chosen == "triton":
        return _triton().fwd(*inputs)
    q, v = inputs[0], inputs[2]
    out = v.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _cuda.ops._window_attention_cuda_fwd(*_as_kernel(list(inputs)), out, lse)
    return out, lse


def backward(
    chosen: str, into: tuple[Tensor, Tensor, Tensor], dout: Any, dlse: Any, lse: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of bias, logit_scale, k_pad, v_pad; those of q, k, v are written to `into`."""
    *inputs, need = args
    wanted = [bool(need >> bit & 1) for bit in range(7)]
    if chosen == "triton":
        from vitkern.triton_kernels import window_attention_bwd as kernels

        return kernels.bwd(dout, dlse, lse, *inputs, wanted, *into)[3:]  # type: ignore[call-arg]
    return _cuda_backward(into, dout, dlse, lse, inputs, wanted)


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


_CUDA = Cuda(cuda_refusals, partial(forward, "cuda"), partial(backward, "cuda"))
PLAIN, PACKED = (WindowGpu(_triton, _CUDA, packed) for packed in (False, True))
