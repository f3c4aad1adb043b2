"""Calls of the op attention on its own arguments, and its Triton kernels against the reference."""

import math

import torch

from vitkern import testing
from vitkern.ops import _attention_definition as definition
from vitkern.ops.attention import OP
from vitkern.triton_kernels import _attention_visits, _host
from vitkern.triton_kernels import attention as kernels
from vitkern.triton_kernels._attention_host import Call

HALF, FULL = torch.float16, torch.float32  # the interpreter cannot multiply bfloat16
NAMES = [definition.TENSORS[p] for p in OP.differentiable]
EVERYTHING = (1 << len(NAMES)) - 1


def table(block_m, block_n, programs=3):
    """A row for every kernel of attention and of window_attention."""
    row = {"block_m": block_m, "block_n": block_n, "warps": 4, "stages": 1, "programs": programs}
    kernels = "forward", "backward_queries", "backward_keys", "backward_bias", "backward_window"
    return {x: [row | {"block": 64}] for x in kernels}


def small_tiles(monkeypatch):
    """Sets the tiles of every kernel; at first one for a small call, since the interpreter pays for each."""

    def use(block_m, block_n, programs=3):
        monkeypatch.setattr(_host, "tables", lambda op: {"default": table(block_m, block_n, programs)})
        _host.config.cache_clear()
        monkeypatch.setattr(_attention_visits, "FEWEST", 2)

    use(64, 64)
    return use


def scores(shape, *, hide=0.0):
    x = torch.randn(shape)
    return x.masked_fill(torch.rand(shape) < hide, -math.inf) if hide else x


def arguments(
    batch=2, queries=5, keys=7, heads=2, kv_heads=None, d=8, dv=None, dtype=FULL, bias=None, key_bias=None, mask=None,
    factor=None, sink=None, seed=None, normalizer="softmax", scale=0.3, causal=False, offset=0, dropout_p=0.0,
):  # fmt: skip
    """The arguments of the op."""
    kv_heads, dv = kv_heads or heads, dv or d
    shapes = (queries, heads, d), (keys, kv_heads, d), (keys, kv_heads, dv)
    q, k, v = (torch.randn(batch, *s).to(dtype) for s in shapes)
    plain = {name: kind() if kind in (bool, int, float) else None for name, kind in Call.__annotations__.items()}
    given = {"q": q, "k": k, "v": v, "bias": bias, "key_bias": key_bias, "mask": mask, "factor": factor, "sink": sink}
    given |= {"seed": seed, "normalizer": normalizer, "scale": scale, "causal": causal, "offset": offset}
    return list(Call(**plain | given | {"dropout_p": dropout_p, "rule": "none"}))


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def check_op(args, dlse=True):
    """fwd and bwd against the reference on the op's own arguments; returns the gradients."""
    with testing.poisoned():
        out, lse, key_mean = kernels.fwd(*args)
        dout = torch.randn(out.shape).to(out.dtype)
        dlse = torch.randn(lse.shape).where(lse.isfinite(), 0.0) if dlse and "softmax" in args else None
        dmean = torch.randn(key_mean.shape) if key_mean.numel() else None
        got = kernels.bwd(dout, dlse, dmean, lse, key_mean, *args, EVERYTHING)
    eager, oracle = OP.definition(*args), OP.definition(*wide(args))
    for name, x, y, z in zip(OP.outputs, (out, lse, key_mean), oracle, eager, strict=True):
        testing.assert_close_to_oracle(name, x, y, z)
    rest = [None if x is None else x.double() for x in (dout, dlse, dmean)]
    eager = OP.reference_backward(dout, dlse, dmean, *[None] * 2, *args, "", EVERYTHING)
    oracle = OP.reference_backward(*rest, *[None] * 2, *wide(args), "", EVERYTHING)
    for name, x, y, z in zip(NAMES, got, oracle, eager, strict=True):
        assert (x is None) == (z is None), name
        if x is not None:
            assert x.dtype == z.dtype
            testing.assert_close_to_oracle(name, x, y, z, gradient=True)
    return got


def mixtures(heads, *names):
    shapes = {"pre_weight": (heads, heads), "pre_bias": (heads,), "post_weight": (heads, heads), "post_bias": (heads,)}
    return {name: torch.randn(shapes[name]) for name in names or shapes}
