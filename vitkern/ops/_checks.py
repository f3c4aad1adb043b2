"""Argument checks that ops share. Each raises a sentence: op, argument, what it must be, what it got."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")


def floating(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {value.dtype}")


def parameter(op: str, name: str, value: Any, device: torch.device, of: str = "q") -> None:
    """A floating tensor on the device of the argument `of`: tables, biases, scales, weights."""
    tensor(op, name, value)
    floating(op, name, value)
    on_device(op, name, value, of, device)


def on_device(op: str, name: str, value: Tensor, of: str, device: torch.device) -> None:
    """`of` names the argument that decides the device."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on the device of {of} ({device}), got {value.device}")


def autocast(device: str) -> bool:
    """Whether autocast is on for a kind of device; meta tensors know none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def fits(n: Any, want: Any) -> bool:
    """Whether a length broadcasts to `want`; while tracing, `in` does not find a size of its own graph in a tuple."""
    return bool(n == 1 or n == want)


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds, asked without a guard: of sizes that a graph leaves open it does not."""
    if not torch.compiler.is_compiling() and not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def shape(op: str, name: str, value: Tensor, want: tuple[int, ...], text: str) -> None:
    if tuple(value.shape) != tuple(want):
        raise ValueError(f"{op}: {name} must have shape {text} = {list(want)}, got {list(value.shape)}")


def rows(op: str, x: Any) -> tuple[int, int]:
    """Batch and length of x [B, N, ...]."""
    tensor(op, "x", x)
    floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [B, N, ...], got {list(x.shape)}")
    return x.shape[0], x.shape[1]


def flags(op: str, name: str, value: Any, want: tuple[int, ...], of: str, device: torch.device) -> None:
    """A bool tensor [B, N] on the device of the argument `of`."""
    tensor(op, name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool, got {value.dtype}")
    shape(op, name, value, want, "[B, N]")
    on_device(op, name, value, of, device)


def integers(op: str, name: str, value: Any) -> None:
    """A tensor of integers."""
    tensor(op, name, value)
    if value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")


def integer(op: str, name: str, value: Any, least: int | None = None, what: str = "an int") -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be {what}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return value  # type: ignore[return-value] # a SymInt stands for an int


def count(op: str, name: str, value: Any, most: int, text: str) -> int:
    """An int from 0 to `most`, which `text` names."""
    if not 0 <= integer(op, name, value) <= most:
        raise ValueError(f"{op}: {name} must lie in [0, {text}] = [0, {most}], got {value}")
    return value


def prefix(op: str, value: Any, tokens: int, what: str = "an int") -> int:
    """`protect` as a number of first tokens: no more than there are."""
    value = integer(op, "protect", value, 0, what)
    return value if value <= tokens else tokens  # not min: sizes that a graph leaves open stay sums


def number(op: str, name: str, value: Any, least: float | None = None, what: str = "a float") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be {what}, got {value!r}")
    if least is not None and not value >= least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")
    return float(value)


def threshold(op: str, value: Any, batch: int, device: torch.device, of: str) -> Tensor:
    """A float, or floats [B], as float32 [B]."""
    if not isinstance(value, Tensor):
        value = number(op, "threshold", value, what="a float or a tensor [B]")
        return torch.full((batch,), value, dtype=torch.float32, device=device)
    parameter(op, "threshold", value, device, of)
    shape(op, "threshold", value, (batch,), "[B]")
    return value.detach().float().contiguous()


def seed(op: str, name: str, value: Any, device: torch.device) -> Tensor:
    """A seed of Philox as int64 [1]."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.int64 or value.device != device:
            raise ValueError(
                f"{op}: {name} must be an int or one int64 element on {device}, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        return value.reshape(1)
    integer(op, name, value, what="an int or an int64 tensor of one element")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must fit in 64 bits, got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=device)  # a kernel's argument, not a copy


def offsets(op: str, name: str, cu: Tensor, total: int, longest: int, limit: str) -> None:
    """The bounds of packed sequences, where their values may be read: from 0 to `total` in steps of at most `longest`."""
    if not backends.may_read(cu):
        return
    steps = cu.diff()
    if int(cu[0]) != 0 or int(cu[-1]) != total or bool((steps < 0).any()):
        raise ValueError(f"{op}: {name} must ascend from 0 to the {total} tokens, got {cu.tolist()}")
    if len(steps) and int(steps.max()) > longest:
        raise ValueError(f"{op}: {limit} must be at least the longest sequence ({int(steps.max())}), got {longest}")


def maps(op: str, q: Any, k: Any, v: Any, same_dtype: bool, own_map: bool = False) -> None:
    """q [B, *L, H, D], k [B, *L, Hk, D], v [B, *L, Hk, Dv] with 1 to 4 axes L; with `own_map` k and v may have others."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        tensor(op, name, t)
        floating(op, name, t)
        if not 4 <= t.dim() <= 7:
            raise ValueError(
                f"{op}: {name} must have shape [B, *spatial, heads, head_dim] with 1 to 4 spatial axes, got {list(t.shape)}"
            )
    for name, t in (("k", k), ("v", v)):
        if t.dim() != q.dim():
            raise ValueError(f"{op}: {name} must have the rank of q ({q.dim()}), got {t.dim()}")
        like, of = (k, "k") if own_map and name == "v" else (q, "q")
        same = slice(0, 1) if own_map and name == "k" else slice(0, -2)
        if t.shape[same] != like.shape[same]:
            what = "batch" if same.stop == 1 else "batch and map"
            raise ValueError(
                f"{op}: {name} must have the {what} of {of}, {list(like.shape[same])}, got {list(t.shape[same])}"
            )
        on_device(op, name, t, "q", q.device)
        if same_dtype and t.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q ({q.dtype}), got {t.dtype}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads < 1 or kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(f"{op}: the heads of k must divide the heads of q ({heads}), got {kv_heads}")
    if v.shape[-2] != kv_heads:
        raise ValueError(f"{op}: v must have the heads of k ({kv_heads}), got {v.shape[-2]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: k must have the head size of q ({q.shape[-1]}), got {k.shape[-1]}")
    for name, width in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= width <= 256:
            raise ValueError(f"{op}: the head size of {name} must be 1 to 256, got {width}")
    for t in (q, k):
        for axis, length in enumerate(t.shape[1:-2]):
            if length < 1:
                raise ValueError(f"{op}: axis {axis} of the map must have at least one token, got {length}")


def per_axis(op: str, name: str, value: Any, axes: int) -> tuple[int, ...]:
    """An int for all axes, or a sequence of one int per axis."""
    if isinstance(value, (list, tuple)):
        entries = tuple(value)
        if len(entries) != axes:
            raise ValueError(f"{op}: {name} must be an int or have one entry per map axis ({axes}), got {value!r}")
    else:
        entries = (value,) * axes
    for entry in entries:
        if isinstance(entry, bool) or not isinstance(entry, (int, torch.SymInt)):
            raise TypeError(f"{op}: {name} must hold ints, got {value!r}")
    return entries
