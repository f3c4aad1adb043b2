"""Strided windows and shared queries as block windows of a view with two axes for each, which the window kernels run ungathered."""

from typing import Any

from torch import Tensor

from vitkern.ops._window_checks import check_sides

VIEWED = ("partition", "shared_q")


def as_blocks(
    maps: tuple[Tensor | None, Tensor, Tensor, Tensor], window: Any, shift: Any, options: dict[str, Any]
) -> tuple[tuple[Tensor | None, Tensor, Tensor, Tensor], tuple[int, ...]] | None:
    """Views of qkv (or None), q, k and v, and the windows of their axes; None where windows do not divide a map of one or two axes.

    An axis of n windows of w tokens is ``[n, w]`` with windows ``(1, w)`` for blocks, ``[w, n]`` with ``(w, 1)`` for a grid. Shared
    queries have stride 0 along n.
    """
    qkv, q, k, v = maps
    if not all(isinstance(t, Tensor) for t in (q, k, v)) or not 4 <= k.dim() <= 5 or not q.dim() == k.dim() == v.dim():
        return None
    lengths, partition, shared = k.shape[1:-2], options.get("partition", "block"), options.get("shared_q", False)
    sides, shifts = check_sides(window, shift, lengths)
    unfit = (
        not q.shape[0] == k.shape[0] == v.shape[0]
        or v.shape[1:-2] != lengths
        or any(n % w for n, w in zip(lengths, sides, strict=True))
        or any(shifts)
    )
    if unfit or q.shape[1:-2] != (sides if shared else lengths) or partition not in ("block", "grid", "unit"):
        return None
    if partition == "unit" and len(lengths) != 1:
        return None
    strided = partition != "block"
    counts = [n // w for n, w in zip(lengths, sides, strict=True)]
    found = [t if t is None else _split(t, sides, counts, strided) for t in (qkv, None if shared else q, k, v)]
    if shared:
        own = q
        for axis, n in reversed(list(enumerate(counts))):
            at = 2 + axis if strided else 1 + axis
            own = own.unsqueeze(at)
            own = own.expand(*own.shape[:at], n, *own.shape[at + 1 :])
        found[1] = own
    blocks = [side for w in sides for side in ((w, 1) if strided else (1, w))]
    return tuple(found), tuple(blocks)  # type: ignore[return-value]


def _split(t: Tensor, sides: tuple[int, ...], counts: list[int], strided: bool) -> Tensor:
    for axis in reversed(range(len(sides))):
        pair = (counts[axis], sides[axis])
        t = t.unflatten(1 + axis, pair[::-1] if strided else pair)
    return t


def joined(t: Tensor, axes: int) -> Tensor:
    """The map of a result on a view with two axes for each of `axes`."""
    for axis in range(axes):
        t = t.flatten(1 + axis, 2 + axis)
    return t
