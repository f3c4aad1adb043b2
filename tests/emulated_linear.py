"""linear_attention on the emulated CUDA kernels: calls that they serve, one of them against the oracle."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from emulated import check_schedules
from gpu_path import tokens_on_gpu

from vitkern import testing
from vitkern.ops import _linear_gpu
from vitkern.ops._linear_lowering import lower
from vitkern.testing import Call
from vitkern.testing import linear_attention as registry
from vitkern.testing.linear_attention import make

ENTRY = testing.entries()["linear_attention"]
SUMS = {"return_state": True}


def changed(call: Call, change: Callable) -> Call:
    """The call with (q, k, v, options) as `change` leaves them."""

    def build(tensors):
        args, options = call.build(tensors)
        return tuple(change(*args, options)), options

    return replace(call, build=build)


def unaligned(q, k, v, _):
    """Rows that start two bytes off."""
    return (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v))


def broken_where_hidden(q, k, v, options):
    hidden = ~options["key_mask"][..., None, None]
    return q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf)


CALLS = {
    "one tile": make(1, 1, (9,), masked=True, **SUMS),
    "tiles": make(2, 2, (70,), (330,), heads=2, kv_heads=1, d=16, dv=24, name="elu1", masked=True, **SUMS),
    "weights": make(3, 1, (130,), (70,), heads=4, kv_heads=2, d=40, dv=16, name="identity", weight="heads", normalizer="none"),
    "a wide head": make(4, 1, (20,), (70,), heads=1, d=72, dv=128, name="silu_norm", layout="packed", masked=True, **SUMS),
    "wide values": make(5, 1, (65,), d=8, dv=56, name="leaky_relu", normalizer="abs_max", eps=0.75, offset=0.5),
    "windows": make(6, 2, (4, 6), d=24, name="silu_norm", window_size=(2, 3), offset=0.5, layout="heads", **SUMS),
    "packed": make(7, 1, (), lengths=((3, 3), (0, 2), (70, 67), (1, 0)), d=16, name="exp", masked=True, weight="shared", **SUMS),
    "the mean taken off": make(8, 2, (30,), name="identity", normalizer="subtract", masked=True, scale=0.5),
    "the largest": make(9, 1, (30,), name="exp", normalizer="max", eps=300.0, layout="batch"),
    "rotated before": make(10, 1, (20,), d=16, name="elu1", rope="half before", normalizer="mean"),
    "no tokens": make(11, 0, (5,)),
    "unaligned": changed(make(12, 1, (70,), d=16, dv=24, name="relu"), unaligned),
    "broken": changed(make(13, 1, (70,), heads=1, d=32, name="elu1", masked=True, **SUMS), broken_where_hidden),
}  # fmt: skip


def draw(build, rng: random.Random) -> Call:
    """A small call of the registry's sampler that the kernels serve."""
    while True:
        call = registry.draw(rng)
        args, options = call.build(call.leaves(torch.bfloat16))
        options.pop("return_state", None)
        lowered, custom = lower(*args, **options)
        with build.active():
            if custom is None and args[0].numel() < 10000 and not _linear_gpu.refusals(lowered.args):
                return call


def check(build, call: Call, dtype: torch.dtype, seeds) -> None:
    with build.active(), tokens_on_gpu("cuda"):
        check_schedules(build, ENTRY, call, dtype, seeds)
