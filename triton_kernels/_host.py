"""What the launch functions of all ops ask of a device."""

import functools
import json
import pathlib

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
MAX_TOKENS = 4096  # of a sample that one block holds


def device_reasons(name: str, x: Tensor, interpreted: bool) -> list[str]:
    """Why Triton kernels cannot run on the device of x, one sentence each."""
    if x.device.type != "cuda":
        return [] if interpreted else [f"Triton kernels need CUDA tensors, {name} is on {x.device}"]
    if torch.cuda.get_device_capability(x.device) < MIN_CAPABILITY:
        return [f"Triton kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or later"]
    return []


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and at least `least` (matrix products want 16)."""
    return max(least, 1 << (n - 1).bit_length())


@functools.cache
def tables(op: str) -> dict:
    return json.loads((pathlib.Path(__file__).parent / "configs" / f"{op}.json").read_text())


@functools.cache
def family(device: torch.device) -> str:
    """The configuration family of a device: "sm90" for an H100, whether or not the table knows it."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "default"


@functools.cache
def config(op: str, name: str, kernel: str, n: int, width: int, itemsize: int) -> dict:
    """The first row of a kernel's table that allows this size N, padded width and element size; a family's rows come
    before the default ones."""
    for row in tables(op).get(name, {}).get(kernel, []) + tables(op)["default"][kernel]:
        size = n <= row.get("max_n", n) and row.get("min_width", width) <= width <= row.get("max_width", width)
        if size and itemsize == row.get("bytes", itemsize):
            return row
    raise LookupError(f"no {kernel} configuration for N={n}, D={width}, {itemsize} bytes")


def plan_reasons(score: Tensor, interpreted: bool) -> list[str]:
    """Why the kernels that hold a sample in one block cannot run these scores [B, N], one sentence each."""
    why = device_reasons("score", score, interpreted)
    if score.dtype != torch.float32:
        why.append(f"score must be float32, got {score.dtype}")
    if score.shape[1] > MAX_TOKENS:
        why.append(f"a sample may hold {MAX_TOKENS} tokens, it has {score.shape[1]}")
    return why


def plan_shape(tokens: int) -> dict[str, int]:
    """The block of a sample, and warps for eight tokens to a thread."""
    block = power(tokens)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def stream(seed: Tensor | None) -> tuple[Tensor | None, ...]:
    """The seed, the numbers of head 0 and image 0 and the places of queries that dropout counts, None where it is not given."""
    return (None,) * 3 if seed is None else (seed, *(seed[n:] if len(seed) > n else None for n in (1, 2)))
