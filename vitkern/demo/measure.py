"""One model on one batch of pictures: time, peak memory and agreement of eager, compiled and patched runs."""

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Result:
    """One line of the table."""

    model: str
    size: tuple[int, int]
    dtype: str
    milliseconds: dict[str, float]
    megabytes: dict[str, float | None]
    difference: float  # largest, between vitkern and eager
    errors: dict[str, float]  # largest, of each against the model in float64
    scale: float
    same_best: bool
    same_five: float
    replaced: int

    @property
    def ratio(self) -> float:
        """How many times as fast as eager."""
        return self.milliseconds["eager"] / self.milliseconds["vitkern"]

    @property
    def ratio_compiled(self) -> float | None:
        if "compiled" not in self.milliseconds:
            return None
        return self.milliseconds["compiled"] / self.milliseconds["vitkern"]


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Class scores of a model, the masks of one that segments, or its features where it has neither."""
    out = model(pixels)
    if isinstance(out, Tensor):
        return out.flatten(1)
    for name in ("logits", "masks_queries_logits", "pooler_output", "last_hidden_state"):
        found = getattr(out, name, None)
        if found is not None:
            return found.flatten(1)
    raise ValueError(f"vitkern demo: {type(model).__name__} returns neither logits nor features")


def peak_megabytes(run: Callable[[], Any]) -> float | None:
    """Memory that one run needs above what is held before it; None where the system does not tell."""
    try:
        with contextlib.suppress(OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status("VmRSS")
        run()
        return max(0.0, (_status("VmHWM") - before) / 1024)
    except OSError:
        return None


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def interleaved(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each run, taken in turn for at least five rounds and about this long."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    while len(next(iter(taken.values()))) < 5 or time.perf_counter() - start < seconds:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def compare(
    name: str,
    model: nn.Module,
    pixels: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    compiled: Callable[[Tensor], Any] | None,
    seconds: float,
    step: Callable[[str], None],
    patch: Callable[[nn.Module], AbstractContextManager[Any]],
) -> Result:
    """Runs the model in its own code, compiled (if given) and inside `patch`; `exact` are its class scores in float64."""
    title = f"{name} {pixels.shape[-2]}x{pixels.shape[-1]} {str(dtype).removeprefix('torch.')}"
    model = model.to(dtype)
    pixels = pixels.to(dtype)

    def eager() -> Tensor:
        return logits(model, pixels)

    def patched() -> Tensor:
        with patch(model):
            return logits(model, pixels)

    runs: dict[str, Callable[[], Any]] = {"eager": eager}
    with torch.inference_mode():
        if compiled is not None:
            step(f"{title}: compiling")
            compiled(pixels)
            runs["compiled"] = lambda: compiled(pixels)
        runs["vitkern"] = patched
        step(f"{title}: checking")
        with patch(model) as report:
            replaced = len(report.replaced)
        want, got = eager().float(), patched().float()
        step(f"{title}: measuring")
        memory = {key: peak_megabytes(run) for key, run in runs.items()}
        times = interleaved(runs, seconds)
    five_want, five_got = (t.topk(min(5, t.shape[-1]), -1).indices for t in (want, got))
    shared = [len(set(a.tolist()) & set(b.tolist())) / len(a) for a, b in zip(five_want, five_got, strict=True)]
    return Result(
        name,
        (pixels.shape[-2], pixels.shape[-1]),
        str(dtype).removeprefix("torch."),
        times,
        memory,
        (want - got).abs().max().item(),
        {"eager": (want - exact).abs().max().item(), "vitkern": (got - exact).abs().max().item()},
        want.abs().max().item(),
        bool((want.argmax(-1) == got.argmax(-1)).all()),
        sum(shared) / len(shared),
        replaced,
    )
