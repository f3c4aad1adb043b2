"""apply_diffusion: merging around the sub-layers of diffusers' transformer blocks, undone right behind each."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vitkern.ops import _checks
from vitkern.ops.bipartite_match import bipartite_match
from vitkern.ops.merge_plan import merge_plan
from vitkern.ops.merge_tokens import merge_tokens
from vitkern.ops.unmerge_tokens import unmerge_tokens
from vitkern.patch import Kept, PatchReport, Replaced, _foreign, _Forward
from vitkern.tokens import MergePlan

NAME = "merging.apply_diffusion"
BLOCK = "diffusers.models.attention.BasicTransformerBlock"
PARTS = ("attn1", "attn2", "ff")


@dataclass
class DiffusionReport(PatchReport):
    """What :func:`apply_diffusion` did. ``tokens``: block -> tokens outside and inside its merged parts, last pass."""

    tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        super().undo()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


@dataclass
class Pass:
    """What one forward pass of the model knows: the size of the sample, and how many passes there were."""

    ratio: float
    stride: tuple[int, int]
    seed: int
    max_downsample: int
    height: int = 0
    width: int = 0
    count: int = -1

    def start(self, sample: Tensor) -> None:
        self.height, self.width = sample.shape[-2:]
        self.count += 1

    def grid(self, tokens: int) -> tuple[int, int] | None:
        """Rows and columns of a block with so many tokens; None where it does not merge."""
        if not tokens or not self.height:
            return None
        down = math.ceil(math.sqrt(self.height * self.width / tokens))
        grid = (math.ceil(self.height / down), math.ceil(self.width / down))
        return grid if grid[0] * grid[1] == tokens and down <= self.max_downsample else None

    def plan(self, x: Tensor) -> MergePlan | None:
        grid = self.grid(x.shape[1])
        if grid is None:
            return None
        seed = None if x.shape[0] % 2 else self.seed + self.count
        match = bipartite_match(x, protect=0, partition="random2d", grid=grid, stride=self.stride, seed=seed)
        return merge_plan(match, r=int(x.shape[1] * self.ratio), clip=True)


def apply_diffusion(
    model: nn.Module,
    ratio: float = 0.5,
    *,
    stride: int | tuple[int, int] = 2,
    max_downsample: int = 1,
    parts: tuple[str, ...] = ("attn1",),
    seed: int = 0,
) -> DiffusionReport:
    r"""Merges tokens inside the transformer blocks of a diffusion model, in place and reversibly (Bolya and Hoffman 2023).

    A block matches the tokens that enter it, before its norm, to one random destination in every cell of ``stride``; the
    chosen sub-layers run on the merged tokens, unweighted means, and their outputs go back to every token.

    Args:
        model: a model of diffusers with ``BasicTransformerBlock``, whose first argument is the sample ``[B, C, H, W]``.
        ratio: the share of the tokens that merge, in (0, 1); at most what the destinations leave.
        stride: the cell that holds one destination, an int or ``(sy, sx)``.
        max_downsample: blocks whose grid is at most so many times smaller than the sample merge: 1, 2, 4 or 8.
        parts: of ``"attn1"`` (self-attention), ``"attn2"`` (cross-attention) and ``"ff"``.
        seed: of the pattern, which changes with every pass. In an odd batch (no classifier-free guidance pairs) every
            destination is the first of its cell.

    Returns:
        :class:`DiffusionReport`; ``report.undo()`` restores the model.

    Raises:
        ValueError: an argument does not fit, or the model has no such block.
    """
    sides = tuple(stride) if isinstance(stride, (tuple, list)) else (stride, stride)
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"{NAME}: ratio must lie in (0, 1), got {ratio!r}")
    if len(sides) != 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sides):
        raise ValueError(f"{NAME}: stride must be an int of at least 1, or two, got {stride!r}")
    _checks.integer(NAME, "max_downsample", max_downsample, 1)
    if not parts or any(part not in PARTS for part in parts):
        raise ValueError(f"{NAME}: parts must be some of {', '.join(PARTS)}, got {parts!r}")
    report, state = DiffusionReport(), Pass(ratio, sides, seed, max_downsample)
    for path, block in model.named_modules():
        if f"{type(block).__module__}.{type(block).__qualname__}" == BLOCK:
            _serve(path, block, parts, state, report)
    if not report.replaced and not report.kept:
        raise ValueError(f"{NAME}: model must hold blocks of {BLOCK}, it holds none")
    if report.replaced:
        first = lambda module, args, kwargs: state.start(args[0] if args else kwargs["sample"])  # noqa: E731
        report.handles.append(model.register_forward_pre_hook(first, with_kwargs=True))
    return report


def _serve(path: str, block: Any, parts: tuple[str, ...], state: Pass, report: DiffusionReport) -> None:
    if block.only_cross_attention:
        report.kept.append(Kept(path, type(block).__qualname__, "its attn1 is a cross-attention"))
        return
    found = [(part, getattr(block, part)) for part in parts if getattr(block, part, None) is not None]
    reasons = [reason for _, module in found if (reason := _foreign(module))]
    if reasons:
        report.kept.append(Kept(path, type(block).__qualname__, reasons[0]))
        return
    plan: list[MergePlan | None] = [None]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        plan[0] = state.plan(x)
        report.tokens[path] = (x.shape[1], x.shape[1] if plan[0] is None else plan[0].n_out)

    report.handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
    for part, module in found:
        report._modules.append(module)
        module.__dict__["forward"] = _Forward(module, _around(plan, part == "attn1"))
        report.replaced.append(Replaced(f"{path}.{part}" if path else part, type(module).__qualname__, "merge_tokens"))


def _around(plan: list[MergePlan | None], own_keys: bool) -> Callable[..., Tensor]:
    def merging_forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = type(module).forward
        if plan[0] is None:
            return own(module, hidden_states, *args, **kwargs)
        if own_keys and isinstance(kwargs.get("attention_mask"), Tensor):
            raise ValueError(f"{NAME}: attention_mask must be None in a block that merges tokens, got a tensor")
        merged, _ = merge_tokens(hidden_states, plan[0])
        return unmerge_tokens(own(module, merged, *args, **kwargs), plan[0])

    return merging_forward
