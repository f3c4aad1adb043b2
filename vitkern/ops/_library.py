"""Ops about the library itself, and what `vitkern info` prints."""

import platform
from typing import Any

import torch

from vitkern import backends
from vitkern.ops._op import library

OPS = (
    "window_attention",
    "window_attention_qkvpacked",
    "bipartite_match",
    "merge_plan",
    "merge_tokens",
    "unmerge_tokens",
    "cluster_tokens",
    "reconstruct_tokens",
)

library.define("_cpu_capability() -> str")
library.define("_cpu_capabilities() -> str")
library.define("_cpu_set_capability(str name) -> str")
library.define("_cpu_product_flops(SymInt repeats) -> float")
library.define("_cpu_exps(SymInt repeats) -> float")


def info() -> dict[str, Any]:
    """Versions, instruction set and, for every op, each back-end with the reason why it is not there."""
    cpu, triton = backends.load("_cpu"), backends.triton_missing()
    device = None if torch.cuda.is_available() else "no CUDA device"
    cuda = device or backends.load("_cuda")
    triton = triton or device
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name() if device is None else platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction set": cpu or torch.ops.vitkern._cpu_capability(),
        "instruction sets here": cpu or torch.ops.vitkern._cpu_capabilities(),
    }
    found["ops"] = {op: {"reference": None, "cpu": cpu, "triton": triton, "cuda": cuda} for op in OPS}
    return found
