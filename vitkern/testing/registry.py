"""What a test knows about an op: how to draw calls of it, and which back-ends can run them."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import vitkern.backends


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a public function, in float64.

    `build(tensors)` gives the arguments; `tensors` are leaves, cast to the dtype under test, but for `parameters`, which
    stay float32 (float64 in the oracle). `view(name, tensor)` turns a leaf into what is passed: a slice, an expansion.
    """

    label: str
    function: Callable[..., Any]
    build: Callable[[dict[str, Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
    tensors: dict[str, Tensor]
    parameters: frozenset[str] = frozenset()
    expanded_gradient: bool = False  # the incoming gradient has stride 0, as sum().backward() makes
    seed: int = 0

    def __str__(self) -> str:
        return self.label

    def rounded(self, dtype: torch.dtype) -> "Call":
        """The call with its inputs rounded to what a run in `dtype` sees, so that this rounding is nobody's error."""
        kept = {
            n: t.to(self._dtype(n, dtype)).double() if t.is_floating_point() else t for n, t in self.tensors.items()
        }
        return replace(self, tensors=kept)

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if name in self.parameters and dtype != torch.float64 else dtype

    def leaves(self, dtype: torch.dtype, grad: bool = False) -> dict[str, Tensor]:
        made = {}
        for name, t in self.tensors.items():
            floating = t.is_floating_point()
            made[name] = t.to(self._dtype(name, dtype) if floating else t.dtype, copy=True)
            made[name].requires_grad_(grad and floating)
        return made

    def run(self, tensors: dict[str, Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
        """The tensors that the call returns."""
        args, kwargs = self.build(tensors)
        return flatten(self.function(*args, backend=backend, **kwargs))

    def weights(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The incoming gradients: fixed by the seed, and of few bits, so that no dtype rounds them."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = []
        for out in outputs:
            shape = () if self.expanded_gradient else out.shape
            weight = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-3.5, 3.5)
            drawn.append(((weight * 32).round() / 32).to(out.device).expand(out.shape))
        return [torch.where(o.detach().isfinite(), w, 0.0) for o, w in zip(outputs, drawn, strict=True)]

    def moved(self, dtype: torch.dtype, time: int) -> "Call":
        """The call with every input moved by at most one unit in the last place of `dtype`; another way each time."""
        generator = torch.Generator().manual_seed(self.seed + 1 + time)
        eps = torch.finfo(dtype).eps
        moved = {}
        for name, t in self.tensors.items():
            if t.is_floating_point():
                noise = torch.rand(t.shape, generator=generator, dtype=torch.float64) * 2 - 1
                t = (t * (1 + eps * noise)).to(dtype).double()
            moved[name] = t
        return replace(self, tensors=moved)


def label(number: int, facts: dict[str, Any]) -> str:
    return f"number={number} " + " ".join(f"{name}={value}" for name, value in facts.items())


def flatten(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return tuple(t for part in result if part is not None for t in flatten(part))


@dataclass(frozen=True, eq=False)
class Entry:
    """An op under test."""

    name: str
    draw: Callable[[random.Random], Call]  # one random call, of any size a test can afford
    small: Callable[[], list[Call]]  # hand-picked tiny calls: opcheck, gradcheck, instruction sets, emulators
    sizes: Callable[[], list[Call]]  # three sizes of one call, whose `build` serves all of them: compile
    cast: tuple[str, ...] = ()  # the tensors that autocast casts
    gradient: bool = True
    last: str = ""  # the torch.library op that its backward ends in, where it moves its rows by another op
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    extra: dict[str, Any] = field(default_factory=dict)
    derived: Callable[[], list[Call]] = (
        list  # tiny calls whose gradients are compared with differences, beside the first of `small`
    )


def entries() -> dict[str, Entry]:
    """Every op's entry, by name."""
    from vitkern.testing import (
        attention,
        attention_varlen,
        bipartite_match,
        chain_sum,
        channel_attention,
        cluster_kmeans,
        cluster_tokens,
        deformable_attention,
        depthwise_value,
        drop_tokens,
        feature_rows,
        grid_sum,
        linear_attention,
        mask_from_logits,
        merge_plan,
        merge_tokens,
        neighborhood_attention,
        reconstruct_tokens,
        restore_tokens,
        sampled_window_attention,
        select_tokens,
        selective_scan,
        soft_merge,
        unmerge_tokens,
        window_attention,
        window_options,
    )

    merging = (bipartite_match, merge_plan, merge_tokens, unmerge_tokens, select_tokens, restore_tokens, drop_tokens)
    modules = (
        window_attention,
        window_options,
        neighborhood_attention,
        attention,
        attention_varlen,
        mask_from_logits,
        linear_attention,
        feature_rows,
        chain_sum,
        grid_sum,
        depthwise_value,
        channel_attention,
        selective_scan,
        deformable_attention,
        depthwise_value,
        sampled_window_attention,
        *merging,
        soft_merge,
        cluster_tokens,
        cluster_kmeans,
        reconstruct_tokens,
    )
    return {e.name: e for module in modules for e in module.ENTRIES}


def cases(entry: Entry, count: int | None = None, first_seed: int = 0) -> list[int]:
    """Seeds of the sampler: VITKERN_FUZZ of them (default 50)."""
    return list(range(first_seed, first_seed + (count or int(os.environ.get("VITKERN_FUZZ", "50")))))


def backends(device: str = "cpu") -> list[str]:
    """The back-ends with kernels that can run on this device here, beside the reference."""
    if device == "cpu":
        return [] if vitkern.backends.load("_cpu") else ["cpu"]
    found = [] if vitkern.backends.triton_missing() else ["triton"]
    return found + ([] if vitkern.backends.load("_cuda") else ["cuda"])
