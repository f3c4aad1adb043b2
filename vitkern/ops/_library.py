"""Ops about the library itself, and what `vitkern info` prints."""

import platform
from typing import Any

import torch

from vitkern import backends
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import library

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
    unwritten = Gpu()
    found["ops"] = {
        name: {
            "reference": None,
            "cpu": cpu,
            "triton": triton if gpu.triton else unwritten.triton_refusals(())[0],
            "cuda": cuda if gpu.cuda else unwritten.cuda_refusals(())[0],
        }
        for name, gpu in _public().items()
    }
    return found


def _public() -> dict[str, Gpu]:
    """Every public op that has kernels, with those for GPUs."""
    from vitkern.ops import (
        attention,
        bipartite_match,
        channel_attention,
        cluster_tokens,
        deformable_attention,
        linear_attention,
        merge_plan,
        merge_tokens,
        neighborhood_attention,
        reconstruct_tokens,
        restore_tokens,
        sampled_window_attention,
        selective_scan,
        soft_merge,
        unmerge_tokens,
        window_attention,
    )

    moved = merge_tokens.OP.gpu  # a back-end of select_tokens and drop_tokens is what moves the rows that they choose
    return {
        "attention": attention.OP.gpu,
        "attention_varlen": attention.OP.gpu,
        "window_attention": window_attention.PLAIN.gpu,
        "window_attention_qkvpacked": window_attention.PACKED.gpu,
        "linear_attention": linear_attention.OP.gpu,
        "bipartite_match": bipartite_match.OP.gpu,
        "merge_plan": merge_plan.OP.gpu,
        "merge_tokens": merge_tokens.OP.gpu,
        "unmerge_tokens": unmerge_tokens.OP.gpu,
        "select_tokens": moved,
        "drop_tokens": moved,
        "restore_tokens": restore_tokens.OP.gpu,
        "channel_attention": channel_attention.OP.gpu,
        "selective_scan": selective_scan.OP.gpu,
        "selective_scan_2d": selective_scan.OP.gpu,
        "deformable_attention": deformable_attention.OP.gpu,
        "neighborhood_attention": neighborhood_attention.OP.gpu,
        "neighborhood_qk": neighborhood_attention.QK.gpu,
        "neighborhood_av": neighborhood_attention.AV.gpu,
        "sampled_window_attention": sampled_window_attention.OP.gpu,
        "soft_merge": soft_merge.OP.gpu,
        "cluster_tokens": cluster_tokens.OP.gpu,
        "reconstruct_tokens": reconstruct_tokens.OP.gpu,
    }
