"""Typed masks: which keys a query may see. ``.dense(q, k)`` is the definition: bool, True may attend, broadcastable to the
scores ``[B, H, Nq, Nk]`` of ``q [B, Nq, H, D]`` and ``k [B, Nk, Hk, D]``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern._export import exportable

EMPTY = ("full", "none")


@exportable
@dataclass(frozen=True, eq=False)
class Causal:
    """``j <= i + offset``; ``offset = Nk - Nq`` aligns the last query with the last key."""

    offset: int = 0

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[Nq, Nk]``."""
        i, j = _places(q, k)
        return j <= i + self.offset


@exportable
@dataclass(frozen=True, eq=False)
class NoSelf:
    """``i != j``: nobody sees the token at its own position."""

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[Nq, Nk]``."""
        i, j = _places(q, k)
        return i != j


@exportable
@dataclass(frozen=True, eq=False)
class Segments:
    """Tokens of one segment see each other: ``q_ids [B|1, Nq]`` and ``k_ids [B|1, Nk]`` are equal, or
    ``allow[q_id, k_id]``, a bool table. A negative id is padding: such a key is seen by nobody, such a query sees nothing."""

    q_ids: Tensor
    k_ids: Tensor
    allow: Tensor | None = None

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B|1, 1, Nq, Nk]``."""
        a, b = self.q_ids[:, None, :, None], self.k_ids[:, None, None, :]
        if self.allow is None:
            same = a == b
        else:
            table = torch.nn.functional.pad(self.allow, (0, 1, 0, 1))  # what padding reads, also of an empty table
            same = table[a.clamp(min=0).long(), b.clamp(min=0).long()]
        return same & (a >= 0) & (b >= 0)


@exportable
@dataclass(frozen=True, eq=False)
class BlockCausal:
    """``k_levels[j] <= q_levels[i]``: scales, chunks, prefixes (level 0). Levels are integers ``[B|1, N]``."""

    q_levels: Tensor
    k_levels: Tensor

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B|1, 1, Nq, Nk]``."""
        return self.k_levels[:, None, None, :] <= self.q_levels[:, None, :, None]


@exportable
@dataclass(frozen=True, eq=False)
class FromLogits:
    """Keys where a predicted mask is on (Mask2Former, Cheng et al. 2022; EoMT). No gradient goes to the logits.

    ``logits [B, Q, h, w]`` are resized bilinearly (``align_corners=False``, float32) to ``size``, whose row-major cells are
    the keys ``cols`` (all by default) of the queries ``rows`` (all by default); other pairs are visible. A cell is on where
    its logit is above ``threshold``; with ``inclusive`` where it is not below it, ties and NaN included.
    ``empty="full"``: a query that sees nothing of the block sees all of it; ``"none"``: it stays so.
    ``open_rows [B, Q]`` bool: these queries see the whole block.
    """

    logits: Tensor
    size: tuple[int, int]
    threshold: float = 0.0
    empty: str = "full"
    inclusive: bool = True
    rows: tuple[int, int] | None = None
    cols: tuple[int, int] | None = None
    open_rows: Tensor | None = None

    def dense(self, q: Tensor, k: Tensor) -> Tensor:
        """``[B, 1, Nq, Nk]``."""
        return seen_pairs(*self.among(q.shape[1], k.shape[1]))[:, None]

    def among(self, queries: int, keys: int) -> tuple[Any, ...]:
        """The arguments of :func:`seen_pairs`."""
        first = (self.rows or (0,))[0], (self.cols or (0,))[0]
        rule = float(self.threshold), self.empty == "full", self.inclusive
        return self.logits.detach(), self.open_rows, *self.size, *rule, queries, keys, *first


def seen_pairs(
    logits: Tensor,  # [B, Q, h, w]
    open_rows: Tensor | None,  # [B, Q]
    height: int,
    width: int,
    threshold: float,
    full: bool,  # a query that sees nothing sees all
    inclusive: bool,
    queries: int,
    keys: int,
    first_query: int,
    first_key: int,
) -> Tensor:  # [B, queries, keys]
    """Where the resized logits are on, or are not."""
    acc = torch.promote_types(logits.dtype, torch.float32)
    resized = logits.to(acc)
    if 0 in (*logits.shape[:2], height, width):  # interpolate takes no empty maps
        resized = resized.new_zeros((*logits.shape[:2], height, width))
    elif logits.shape[2:] != (height, width):  # interpolate would multiply by 0, on some devices infinities too
        resized = torch.nn.functional.interpolate(resized, size=(height, width), mode="bilinear", align_corners=False)
    resized = resized.flatten(2)  # [B, Q, cells]
    on = ~(resized < threshold) if inclusive else resized > threshold
    if full:
        on = on | ~on.any(-1, keepdim=True)
    if open_rows is not None:
        on = on | open_rows[:, :, None]
    behind = keys - first_key - on.shape[2], queries - first_query - on.shape[1]
    return torch.nn.functional.pad(on, (first_key, behind[0], first_query, behind[1]), value=True)


def seen_words(*args: Any) -> Tensor:
    """:func:`seen_pairs` as bits, ``[B, queries, ceil(keys / 32)]``; the last argument is the back-end of a GPU."""
    return packed(seen_pairs(*args[:11]))


def packed(seen: Tensor) -> Tensor:
    """bool ``[..., N]`` as int32 ``[..., ceil(N / 32)]``: bit j % 32 of word j // 32, 0 behind the last."""
    words = -(-seen.shape[-1] // 32)
    whole = torch.nn.functional.pad(seen, (0, 32 * words - seen.shape[-1]))
    return (whole.unflatten(-1, (words, 32)).int() << _bits(seen)).sum(-1, dtype=torch.int32)


def unpacked(words: Tensor, count: int) -> Tensor:
    """The bool ``[..., count]`` that :func:`packed` took."""
    return (words[..., None] >> _bits(words) & 1).flatten(-2)[..., :count] != 0


def _bits(t: Tensor) -> Tensor:
    return torch.arange(32, dtype=torch.int32, device=t.device)


def _places(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(k.shape[1], device=q.device)[None, :]
