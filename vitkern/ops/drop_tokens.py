"""drop_tokens: noise, argument checks, and how many tokens stay; select_tokens chooses them."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded, select_tokens
from vitkern.reference.merge_plan import inverse
from vitkern.reference.window_attention import philox

NAME = "drop_tokens"
STRUCTURES = ("token", "row", "col", "channel")


def drop_tokens(
    x: Tensor,
    ratio: float,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    protect: int = 0,
    order: str = "noise",
    min_keep: int = 0,
    structure: str = "token",
    grid: tuple[int, int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A random subset of the tokens of every sample (MAE, He et al. 2022; PatchDropout, Liu et al. 2023; PaSST).

    Of ``M = N - protect`` tokens ``max(min_keep, int(M (1 - ratio)))`` stay: those of least noise, ties by position. The
    inverse is :func:`vitkern.restore_tokens`, with a mask token as its fill; MAE's mask, 1 where a token was removed, is
    ``torch.ones(B, N).scatter(1, index.long(), 0.0)``: the opposite sign of the masks of this package.

    Args:
        x: ``[B, N, ...]`` of any trailing shape and strides: float32, float64, bfloat16 or float16.
        ratio: the fraction that goes, in [0, 1).
        seed: an int or one int64 element: the noise is then Philox of (seed, sample, position), the same on every device.
            None: ``torch.rand`` of torch's generator, in one call as in MAE's code.
        noise: ``[B, M]`` instead, or ``[B, rows | columns | channels]`` with a ``structure``. Compared in float32.
        protect: how many of the first tokens always stay (1 for PatchDropout on a class token).
        order: of the tokens that stay: ``"noise"`` (ascending, MAE) or ``"position"``.
        min_keep: at least so many stay (1 for PatchDropout).
        structure: what goes as a whole: a ``"token"``; a ``"row"`` or ``"col"`` of ``grid``, ``(rows, columns)``; a
            ``"channel"`` of ``grid``, ``(channels, tokens of each)``. ``M`` then counts these.
        grid: the last ``N - protect`` tokens as a grid, with a ``structure``.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` (which move the rows; on a GPU a Triton kernel
            chooses, plain PyTorch beyond 4096 tokens); raises with all reasons if it cannot run.

    Returns:
        ``(y, index)``: ``y [B, protect + kept, ...]`` in the dtype of x, ``index [B, protect + kept]`` int32.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(x) not in _sharded.PLAIN and _sharded.met(x):
        return _sharded.call(drop_tokens, locals())
    args = _lower(x, ratio, seed, noise, protect, order, min_keep, structure, grid)
    y, index, _ = select_tokens.gathered(NAME, x, args[0], args, "first", False, backend)
    return y, index


def _lower(
    x: Any,
    ratio: Any,
    seed: Any = None,
    noise: Any = None,
    protect: Any = 0,
    order: Any = "noise",
    min_keep: Any = 0,
    structure: Any = "token",
    grid: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the op that chooses."""
    batch, tokens = _checks.rows(NAME, x)
    prefix = _checks.prefix(NAME, protect, tokens)
    if not 0.0 <= _checks.number(NAME, "ratio", ratio) < 1.0:
        raise ValueError(f"{NAME}: ratio must lie in [0, 1), got {ratio!r}")
    if order not in ("noise", "position"):
        raise ValueError(f"{NAME}: order must be 'noise' or 'position', got {order!r}")
    _checks.integer(NAME, "min_keep", min_keep, 0)
    groups, each = _groups(structure, grid, tokens - prefix)
    if noise is not None:
        if seed is not None:
            raise ValueError(f"{NAME}: seed must be None where noise is given, got {seed!r}")
        _checks.parameter(NAME, "noise", noise, x.device, "x")
        _checks.shape(NAME, "noise", noise, (batch, groups), "[B, M]")
        noise = noise.detach().float()
    elif seed is None:
        noise = torch.rand(batch, groups, device=x.device)
    else:
        noise = seeded(seed, batch, groups, x.device)
    score = -noise  # [B, groups]
    if structure != "token":
        score = -inverse(noise.argsort(dim=1, stable=True)).float()  # ranks: groups of one noise stay whole
        whole = torch.arange(tokens - prefix, device=x.device)
        score = score[:, whole % groups if structure == "col" else whole // each]  # [B, N - protect]
    if prefix:
        score = torch.cat((score.new_zeros(batch, prefix), score), 1)  # [B, N]
    kept = min(groups, max(min_keep, int(groups * (1 - ratio)))) * each
    return (score.contiguous(), None, prefix, kept, prefix + kept, order == "noise", False)


def _groups(structure: Any, grid: Any, tokens: int) -> tuple[int, int]:
    """How many things the noise is drawn for, and the tokens of each."""
    if structure not in STRUCTURES:
        raise ValueError(f"{NAME}: structure must be 'token', 'row', 'col' or 'channel', got {structure!r}")
    if structure == "token":
        if grid is not None:
            raise ValueError(f"{NAME}: grid must go with structure='row', 'col' or 'channel', got {grid!r}")
        return tokens, 1
    if not isinstance(grid, (tuple, list)) or len(grid) != 2 or grid[0] * grid[1] != tokens or grid[0] < 1:
        raise ValueError(
            f"{NAME}: grid must be a pair whose product is N - protect = {tokens} for structure={structure!r}, got {grid!r}"
        )
    return (grid[1], grid[0]) if structure == "col" else (grid[0], grid[1])


def seeded(seed: int | Tensor, batch: int, count: int, device: torch.device) -> Tensor:
    """The first word of Philox(seed; position, sample, 0, 0) as a float in [0, 1) of 24 bits: float32 [batch, count]."""
    key = _checks.seed(NAME, "seed", seed, device)
    sample = torch.arange(batch, device=device)[:, None].expand(batch, count)
    position = torch.arange(count, device=device).expand(batch, count)
    zero = torch.zeros_like(position)
    return (philox([position, sample, zero, zero], key)[0] >> 8).float() * 2.0**-24


def _explain(x: Any, *args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    _lower(x, *args, **options)
    return select_tokens.explained(NAME, x, "first", backend)


drop_tokens.explain = _explain  # type: ignore[attr-defined]
