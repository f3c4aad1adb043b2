"""What an op has for CUDA tensors beside its reference: a Triton module and CUDA C++ kernels, and the choice of one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vitkern import backends

Reasons = Callable[[tuple[Any, ...]], list[str]]


@dataclass(frozen=True)
class Cuda:
    """CUDA C++ kernels; functions of the op's arguments without the last, which names the back-end."""

    refusals: Reasons  # sentences why these arguments cannot run
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None  # as `bwd` of a Triton module


@dataclass(frozen=True)
class Gpu:
    """`triton` imports the op's Triton module: `supported(*args)` gives sentences why not, `fwd(*args)` the outputs,
    `bwd(*gradients of the outputs, *all outputs but the first, *args, need)` the gradients."""

    triton: Callable[[], Any] | None = None
    cuda: Cuda | None = None

    def triton_refusals(self, args: tuple[Any, ...]) -> list[str]:
        if self.triton is None:
            return ["no Triton kernel is written for this op"]
        missing = backends.triton_missing()
        return [missing] if missing else self.triton().supported(*args)

    def cuda_refusals(self, args: tuple[Any, ...]) -> list[str]:
        return ["no CUDA C++ kernel is written for this op"] if self.cuda is None else self.cuda.refusals(args)

    def choose(self, args: tuple[Any, ...]) -> str:
        """The first back-end that can run: CUDA C++, Triton, the reference."""
        if not self.cuda_refusals(args):
            return "cuda"
        return "reference" if self.triton_refusals(args) else "triton"

    def forward(self, op: Any, *args: Any) -> Any:
        """The outputs of `op`; the last argument names the back-end, or is "" for the choice."""
        *inputs, named = args
        chosen = named or self.choose(tuple(inputs))
        if chosen == "cuda":
            return self.cuda.forward(*inputs)  # type: ignore[union-attr]
        return self.triton().fwd(*inputs) if chosen == "triton" else op.definition(*args)  # type: ignore[misc]

    def backward(self, op: Any, *args: Any) -> Any:
        """The gradients; the arguments are those of the op's `_bwd`."""
        *given, named, need = args
        chosen = named or self.choose(tuple(given[op.lead :]))
        if chosen == "cuda":
            return self.cuda.backward(*given, need)  # type: ignore[union-attr, misc]
        if chosen == "triton":
            return self.triton().bwd(*given, need)  # type: ignore[misc]
        return op.reference_backward(*args)
