"""Timing, ceilings and checks: interleaved runs, medians, and no speed-up printed over a wrong result."""

import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import vitkern
from vitkern.testing import assert_close_to_oracle


@dataclass
class Ceilings:
    """What this machine can do, measured in the same run."""

    bandwidth: float  # bytes a second of dst.copy_(src), read plus written, larger than the last cache
    flops: dict[str, float]  # operations a second of a 2048^3 product, by dtype, or of our own loop where it is faster
    own_flops: float  # of our own product loop on cached data
    exps: float  # of our own vector exp

    def floor(self, work: dict[str, float], dtype: torch.dtype) -> tuple[float, str]:
        """The least seconds the work can take, and what binds."""
        rate = self.flops["float32" if dtype == torch.float16 else str(dtype).removeprefix("torch.")]
        times = {
            "bytes": work["bytes"] / self.bandwidth,
            "flops": work["flops"] / rate,
            "exps": work["exps"] / self.exps,
        }
        binds = max(times, key=lambda name: times[name])
        return times[binds], binds


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int, budget: float = 8.0) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that a slow moment of the machine meets all of them."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
        if time.perf_counter() - start > budget and len(taken[name]) >= 5:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def supported(baselines: Any, names: list[str], case: Any, device: str, backward: bool) -> list[str]:
    """The baselines that can run a case: all of a module that does not say."""
    can = getattr(baselines, "supports", None)
    return [name for name in names if can is None or can(name, case, device, backward)]


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a 2048^3 product; of a 256^3 one where that would take more than two seconds."""
    rate = 0.0
    for n, repeats in ((256, 3), (2048, 5)):
        if rate and 2 * n**3 / rate > 2.0:
            break
        a, b = torch.rand(2, n, n).to(dtype)
        rate = 2 * n**3 / interleaved({"product": lambda a=a, b=b: a @ b}, repeats, 4.0)["product"]
    return rate


def cpu_ceilings() -> Ceilings:
    source = torch.rand(64 << 18)  # 64 MiB
    target = torch.rand_like(source)
    copy = interleaved({"copy": lambda: target.copy_(source)}, 15)["copy"]
    flops = {str(dtype).removeprefix("torch."): product_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    own = max(torch.ops.vitkern._cpu_product_flops(2000) for _ in range(5))
    exps = max(torch.ops.vitkern._cpu_exps(2000) for _ in range(5))
    # PyTorch's product may leave the widest vectors unused, and bfloat16 slow where there is no unit for it
    flops = {name: max(rate, own) for name, rate in flops.items()}
    return Ceilings(2 * source.numel() * 4 / copy, flops, own, exps)


def environment() -> dict[str, Any]:
    """Device, versions and commit of a result."""
    info = vitkern.info()
    info.pop("ops")
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        with open("/proc/cpuinfo") as cpuinfo:
            model = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "")
    except OSError:
        commit, model = "", ""
    return info | {"commit": commit, "cpu": model}


def agreement(name: str, got: list[torch.Tensor], oracle: list[torch.Tensor], eager: list[torch.Tensor]) -> str | None:
    """None where every tensor keeps the oracle rule, else the sentence of the first that does not."""
    try:
        for i, (g, o, e) in enumerate(zip(got, oracle, eager, strict=True)):
            assert_close_to_oracle(f"{name} tensor {i}", g, o, e, gradient=i > 0)
    except AssertionError as error:
        return str(error)
    return None


def as_json(ceilings: Ceilings) -> dict[str, Any]:
    return asdict(ceilings)
