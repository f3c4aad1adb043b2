"""bipartite_match: argument checks, lowering of the partition to roles, and the op."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _cuda, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import PlainOp
from vitkern.reference.bipartite_match import BYSTANDER, DESTINATION, MASKED, PROTECTED, SOURCE
from vitkern.reference.bipartite_match import bipartite_match as definition
from vitkern.reference.window_attention import philox
from vitkern.tokens import Match

NAME = "bipartite_match"


def bipartite_match(
    metric: Tensor,
    *,
    protect: int | Tensor = 1,
    partition: str | Tensor | tuple[Tensor, Tensor] = "alternate",
    mask: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    stride: int | tuple[int, int] = 2,
    seed: int | None = 0,
    segments: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    similarity: str = "cosine",
    eps: float = 1e-12,
    backend: str | None = None,
) -> Match:
    r"""The most similar destination of every source token: the matching of token merging (Bolya et al. 2023).

    Normalisation, similarity and the largest of each row in one pass; the matrix of similarities never exists.

    Args:
        metric: ``[B, N, C]``, or ``[B, N, H, C]`` whose mean over heads is taken; any strides and any C. float32, float64,
            bfloat16 or float16; the arithmetic is float32 (float64 for float64).
        protect: the first tokens, kept as they are: their number, or bool ``[B, N]`` with True for each protected token.
        partition: who is matched with whom. ``"alternate"``: even positions are sources, odd ones destinations.
            ``"random2d"``: one destination in every cell of ``stride`` on ``grid``, at a place drawn from ``seed``; the
            grid is the last Hs Ws tokens. A tensor ``[Nd]`` or ``[B, Nd]``: these positions are destinations, all
            others sources. A pair of such tensors: sources and destinations, all others are never matched.
        mask: bool ``[B, N]``, True for a real token. Padding is never matched.
        grid: ``(Hs, Ws)``, for ``"random2d"`` and for a window of two sides.
        stride: sides of a cell of ``"random2d"``.
        seed: of its pattern; None takes the first position of every cell.
        segments: integers ``[B, N]`` or ``[N]``: only tokens of one segment match.
        window: an int: only ``|i - j| <= window``; ``(wy, wx)``: at most so many rows and columns apart on ``grid``.
        similarity: ``"cosine"`` or ``"dot"``.
        eps: the least norm that a token is divided by.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        :class:`vitkern.Match`. Ties go to the smallest position; a token with a NaN or an infinity matches nothing; a
        zero token has similarity 0 to everything. No gradient flows.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(metric) not in _sharded.PLAIN and _sharded.met(metric):
        return _sharded.call(bipartite_match, locals())
    args, limit, ragged = _lower(
        metric, protect, partition, mask, grid, stride, seed, segments, window, similarity, eps
    )
    score, dst, role = _call.run(OP, args, backend)
    return Match(score, dst, role, limit, ragged)


# lowering ---------------------------------------------------------------------------------------------------------------


def _lower(
    metric: Any,
    protect: Any = 1,
    partition: Any = "alternate",
    mask: Any = None,
    grid: Any = None,
    stride: Any = 2,
    seed: Any = 0,
    segments: Any = None,
    window: Any = None,
    similarity: Any = "cosine",
    eps: float = 1e-12,
) -> tuple[tuple[Any, ...], int, bool]:
    """The arguments of the op, the most tokens that can merge, and whether samples may differ in it."""
    _checks.tensor(NAME, "metric", metric)
    _checks.floating(NAME, "metric", metric)
    if metric.dim() not in (3, 4) or (metric.dim() == 4 and metric.shape[2] < 1):
        raise ValueError(f"{NAME}: metric must have shape [B, N, C] or [B, N, H, C], got {list(metric.shape)}")
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"{NAME}: similarity must be 'cosine' or 'dot', got {similarity!r}")
    if not eps > 0:
        raise ValueError(f"{NAME}: eps must be above 0, got {eps!r}")
    batch, tokens = metric.shape[:2]
    prefix = _prefix(protect, metric)
    if grid is not None:
        grid = _grid(grid, tokens)
    if isinstance(partition, str) and partition == "alternate":
        limit = (tokens - prefix) // 2
        simple = mask is None and not isinstance(protect, Tensor)
        role = None if simple else torch.arange(tokens, device=metric.device)[None] % 2
    else:
        role, limit = _partition(partition, metric, prefix, grid, stride, seed)
    if role is not None:
        role = _mark(role, metric, protect, mask)
    if segments is not None:
        segments = _segments(segments, metric)
    limits = _window(window, grid)
    ragged = mask is not None or segments is not None or window is not None or isinstance(protect, Tensor)
    args = (metric.detach(), role, segments, prefix, limits, similarity == "cosine", float(eps))
    return args, limit, ragged


def _prefix(protect: Any, metric: Tensor) -> int:
    """How many of the first tokens are protected; 0 where a mask says which."""
    if isinstance(protect, Tensor):
        _checks.flags(NAME, "protect", protect, tuple(metric.shape[:2]), "metric", metric.device)
        return 0
    return _checks.prefix(NAME, protect, metric.shape[1], "an int or a bool tensor [B, N]")


def _pair_of_ints(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in pair):
        raise TypeError(f"{NAME}: {name} must be an int or two ints, got {value!r}")
    if any(n < least for n in pair):
        raise ValueError(f"{NAME}: {name} must be at least {least}, got {value!r}")
    return pair


def _grid(grid: Any, tokens: int) -> tuple[int, int]:
    if isinstance(grid, int):
        raise TypeError(f"{NAME}: grid must be (Hs, Ws), got {grid!r}")
    grid = _pair_of_ints("grid", grid, 1)
    if grid[0] * grid[1] > tokens:
        raise ValueError(f"{NAME}: grid must hold at most the tokens of metric ({tokens}), got {grid[0]} x {grid[1]}")
    return grid


def _window(window: Any, grid: tuple[int, int] | None) -> list[int]:
    if window is None:
        return []
    if not isinstance(window, (list, tuple)):
        return [_pair_of_ints("window", window, 0)[0]]
    if grid is None:
        raise ValueError(f"{NAME}: grid must be given with a window of two sides, got None")
    return [*_pair_of_ints("window", window, 0), *grid]


def _segments(segments: Any, metric: Tensor) -> Tensor:
    _checks.integers(NAME, "segments", segments)
    if segments.dim() == 1:
        segments = segments[None]
    if (
        segments.dim() != 2
        or not _checks.fits(segments.shape[0], metric.shape[0])
        or segments.shape[1] != metric.shape[1]
    ):
        want = list(metric.shape[:2])
        raise ValueError(f"{NAME}: segments must have shape [B, N] = {want} or [N], got {list(segments.shape)}")
    _checks.on_device(NAME, "segments", segments, "metric", metric.device)
    return segments.to(torch.int32)


def _partition(partition: Any, metric: Tensor, prefix: int, grid: Any, stride: Any, seed: Any) -> tuple[Tensor, int]:
    """role [B|1, N] before protection and mask, and the most tokens that can merge."""
    tokens = metric.shape[1]
    if isinstance(partition, str) and partition == "random2d":
        if grid is None:
            raise ValueError(f"{NAME}: grid must be (Hs, Ws) for partition='random2d', got None")
        sides = _pair_of_ints("stride", stride, 1)
        if seed is not None:
            _checks.integer(NAME, "seed", seed, what="an int or None")
        place = random_places(grid, sides, seed, metric.device) + (tokens - grid[0] * grid[1])  # [cells]
        role = torch.full((1, tokens), BYSTANDER, dtype=torch.int8, device=metric.device)
        role[:, tokens - grid[0] * grid[1] :] = SOURCE
        return role.index_fill(1, place, DESTINATION), max(0, grid[0] * grid[1] - place.shape[0])
    pair = isinstance(partition, (list, tuple))
    if not pair and not isinstance(partition, Tensor):
        raise ValueError(
            f"{NAME}: partition must be 'alternate', 'random2d', an index tensor or a pair of them, got {partition!r}"
        )
    if pair and len(partition) != 2:
        raise ValueError(f"{NAME}: partition must be a pair (sources, destinations), got {len(partition)} entries")
    parts = [_index(t, metric) for t in (partition if pair else (partition,))]
    rows = max(t.shape[0] for t in parts)
    role = torch.full((rows, tokens), BYSTANDER if pair else SOURCE, dtype=torch.int8, device=metric.device)
    for t, value in zip(parts, (SOURCE, DESTINATION) if pair else (DESTINATION,), strict=True):
        role = role.scatter(1, t.expand(rows, -1), value)
    limit = parts[0].shape[1] if pair else max(0, tokens - prefix - parts[0].shape[1])
    return role, limit


def _index(index: Any, metric: Tensor) -> Tensor:
    """Positions as int64 [B|1, n]."""
    _checks.integers(NAME, "partition", index)
    if index.dim() == 1:
        index = index[None]
    if index.dim() != 2 or not _checks.fits(index.shape[0], metric.shape[0]):
        raise ValueError(f"{NAME}: partition must have shape [n] or [B, n], got {list(index.shape)}")
    _checks.on_device(NAME, "partition", index, "metric", metric.device)
    if backends.may_read(index) and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < metric.shape[1]:
        raise ValueError(
            f"{NAME}: partition must hold positions in [0, {metric.shape[1]}), "
            f"got {int(index.min())} to {int(index.max())}"
        )
    return index.long()


def _mark(role: Tensor, metric: Tensor, protect: Any, mask: Any) -> Tensor:
    """The roles with protected and masked tokens, int8."""
    role = role.to(torch.int8)
    if isinstance(protect, Tensor):
        role = torch.where(protect, PROTECTED, role)
    else:
        role = torch.where(torch.arange(metric.shape[1], device=metric.device) < protect, PROTECTED, role)
    if mask is not None:
        _checks.flags(NAME, "mask", mask, tuple(metric.shape[:2]), "metric", metric.device)
        role = torch.where(mask, role, MASKED)
    return role.to(torch.int8)


def random_places(grid: tuple[int, int], stride: tuple[int, int], seed: int | None, device: torch.device) -> Tensor:
    """One position of the grid for every whole cell, int64 [cells]: Philox(seed, cell) mod (sy sx) inside the cell, the
    cell's first where seed is None."""
    rows, columns = grid[0] // stride[0], grid[1] // stride[1]
    cell = torch.arange(rows * columns, device=device)  # [cells]
    zero = torch.zeros_like(cell)
    inside = zero
    if seed is not None:
        key = torch.full((1,), seed, dtype=torch.int64, device=device)
        inside = philox([cell, zero, zero, zero], key)[0] % math.prod(stride)  # [cells]
    y = torch.div(cell, max(columns, 1), rounding_mode="floor") * stride[0] + inside // stride[1]
    return y * grid[1] + cell % max(columns, 1) * stride[1] + inside % stride[1]


# the op -----------------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    from vitkern.triton_kernels import bipartite_match as kernels

    return kernels


def _fake(metric: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = metric.shape[:2]
    score, dst, role = (metric.new_empty(shape, dtype=dtype) for dtype in (torch.float32, torch.int32, torch.int8))
    return score, dst, role


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options)[0], backend)


OP = PlainOp(
    NAME,
    ("Tensor metric", "Tensor? role", "Tensor? segments"),
    "SymInt protect, SymInt[] window, bool cosine, float eps, str gpu",
    outputs=3,
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton, _cuda.MATCH),
)
OP.register()
bipartite_match.explain = _explain  # type: ignore[attr-defined]
