"""The one rule: a kernel's error against the float64 reference is at most twice that of the reference run in the
kernel's own dtype (three times for gradients), plus a few units in the last place.

A case of few elements can be lucky: one run of the reference then says little about rounding. So in float32 the
reference's error is the largest of three runs, two of them with every input moved by at most one unit in the last place.
A float64 kernel is measured against the float32 reference, whose error counts 2^-29 times, and twice: the oracle, being
float64 too, may be off by as much as the kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vitkern.testing.registry import Call, Entry

FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 8.0


@contextmanager
def poisoned() -> Iterator[None]:
    """Tensors that torch allocates without a value hold NaN inside the block, so that an unwritten element shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def assert_close_to_oracle(
    name: str, got: Tensor, oracle: Tensor, eager: Tensor, gradient: bool = False, moved: tuple[Tensor, ...] = ()
) -> None:
    """Raises AssertionError where `got` breaks the rule. `oracle` is float64, `eager` the reference in got's dtype (in
    float32 for a float64 `got`), `moved` the same on inputs moved by a unit in the last place.
    """
    assert got.shape == oracle.shape, f"{name}: shape {list(got.shape)}, the oracle has {list(oracle.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got.cpu(), oracle.cpu()), f"{name}: differs first at {_first((got != oracle).cpu())}"
        return
    double = got.dtype == torch.float64
    assert got.dtype == eager.dtype or double, f"{name}: dtype {got.dtype}, the reference gives {eager.dtype}"
    if oracle.numel() == 0:
        return
    got64, eager64, oracle = got.double().cpu(), eager.double().cpu(), oracle.double().cpu()
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got64) != test(oracle)
        if kind == "+inf" and got.dtype == torch.float16:
            wrong = wrong & (test(eager64) != test(got64))  # beyond float16, where the oracle is still finite
        assert not wrong.any(), (
            f"{name}: {kind} at {int(wrong.sum())} places where the oracle differs, first {_first(wrong)}"
        )
    finite = oracle.isfinite() & got64.isfinite() & eager64.isfinite()
    if not finite.any():
        return
    error = torch.where(finite, (got64 - oracle).abs(), 0.0)
    reference_error = torch.where(finite, (eager64 - oracle).abs(), 0.0).max().item()
    for other in moved:
        distance = (other.double().cpu() - oracle).abs()
        reference_error = max(reference_error, torch.where(finite & distance.isfinite(), distance, 0.0).max().item())
    if double:
        reference_error *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    factor = (GRADIENT_FACTOR if gradient else FACTOR) * (2.0 if double else 1.0)
    unit = torch.finfo(got.dtype).eps * oracle[finite].abs().max().item()
    tiny = torch.finfo(got.dtype).smallest_normal
    budget = factor * reference_error + ULPS * unit + tiny
    worst = error.max().item()
    if worst > budget:
        place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{name}: error {worst:.3e} at {place} (got {got64[place]:.9g}, oracle {oracle[place]:.9g}) exceeds "
            f"{factor:g} x {reference_error:.3e} (reference in {got.dtype}) + {ULPS:g} ulp x {unit:.3e} = {budget:.3e}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def assert_matches(entry: Entry, call: Call, dtype: torch.dtype, backend: str, grad: bool = True) -> None:
    """Runs one call on a back-end and holds outputs and gradients to the rule. The inputs must come out untouched."""
    rounded = call.rounded(dtype)
    grad = grad and entry.gradient
    oracle = _run(entry, rounded, torch.float64, "reference", grad)
    precise = dtype in (torch.float32, torch.float64)
    eager = _run(entry, rounded, torch.float32 if precise else dtype, "reference", grad)
    moved = [_run(entry, rounded.moved(torch.float32, t), torch.float32, "reference", grad) for t in (0, 1) if precise]
    with poisoned():
        got = _run(entry, rounded, dtype, backend, grad)
    for name, value in got.items():
        title = f"{entry.name}[{call}, {dtype}, {backend}] {name}"
        assert_close_to_oracle(title, value, oracle[name], eager[name], "grad" in name, tuple(m[name] for m in moved))


def _run(entry: Entry, call: Call, dtype: torch.dtype, backend: str, grad: bool) -> dict[str, Tensor]:
    tensors = call.leaves(dtype, grad)
    before = {name: t.detach().clone() for name, t in tensors.items()}
    outputs = call.run(tensors, backend)
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if grad:
        loss: Any = sum(
            (out.double() * weight).sum() for out, weight in zip(outputs, call.weights(outputs), strict=True)
        )
        wanted = [name for name in tensors if tensors[name].requires_grad]
        grads = torch.autograd.grad(loss, [tensors[name] for name in wanted], allow_unused=True)
        for name, g in zip(wanted, grads, strict=True):
            result[f"grad of {name}"] = torch.zeros_like(tensors[name]) if g is None else g
    for name, t in tensors.items():
        assert torch.equal(t.detach().nan_to_num(), before[name].nan_to_num()), f"{entry.name}: {name} was changed"
    return result
