"""merge_plan: argument checks, how many tokens merge and into how many slots, and the op."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _cuda
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import PlainOp
from vitkern.reference.merge_plan import merge_plan as definition
from vitkern.tokens import Match, MergePlan

NAME = "merge_plan"
ORDERS = _cuda.ORDERS


def merge_plan(
    match: Match,
    *,
    r: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    order: str = "split",
    n_max: int | None = None,
    clip: bool = False,
    backend: str | None = None,
) -> MergePlan:
    r"""Which tokens merge: the r sources of largest score join their partners (Bolya et al. 2023).

    Args:
        match: from :func:`vitkern.bipartite_match`.
        r: how many tokens merge in every sample: an int, or integers ``[B]``. None: all that have a partner.
        threshold: only scores of at least this, a float or ``[B]``; with ``r`` the smaller number of both.
        order: of the slots. ``"split"``: protected tokens, then the other sources, then destinations, each by position
            (the published order with a class token). ``"score"``: the sources by descending score (the published order
            without). ``"position"``: all by position.
        n_max: how many slots there are, where samples may differ: more tokens merge where more are kept. By default N,
            or ``N - r`` for an int ``r`` without ``threshold``.
        clip: lowers an ``r`` beyond what can merge instead of refusing it.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        :class:`vitkern.MergePlan`, ragged where samples may keep different numbers of tokens (a mask, segments or a
        window in the match; ``threshold``; ``r [B]``; ``n_max``).

    Raises:
        ValueError, TypeError: an argument does not fit, or a sample keeps more tokens than there are slots.
    """
    args, n_out, ragged = _lower(match, r, threshold, order, n_max, clip)
    token_map, perm, offsets, lengths = _call.run(OP, args, backend)
    return MergePlan(token_map, perm, offsets, lengths, n_out, ragged)


def _lower(
    match: Any, r: Any = None, threshold: Any = None, order: Any = "split", n_max: Any = None, clip: bool = False
) -> tuple[tuple[Any, ...], int, bool]:
    """The arguments of the op, the number of slots, and whether samples may use fewer."""
    if not isinstance(match, Match):
        raise TypeError(f"{NAME}: match must be a vitkern.Match, got {type(match).__name__}")
    if order not in ORDERS:
        raise ValueError(f"{NAME}: order must be 'split', 'score' or 'position', got {order!r}")
    batch, tokens = match.score.shape
    most, counts = match.limit, None
    if isinstance(r, Tensor):
        counts = _counts(r, match, clip)
    elif r is not None:
        most = _count(r, match.limit, clip)
    least = None if threshold is None else _checks.threshold(NAME, threshold, batch, match.score.device, "match")
    if n_max is None:
        fixed = counts is None and least is None and (r is not None or not match.ragged)
        n_out = tokens - most if fixed else tokens
    else:
        n_out = _checks.count(NAME, "n_max", n_max, tokens, "N")
    ragged = match.ragged or counts is not None or least is not None or n_max is not None
    score, dst, role = (t.contiguous() for t in (match.score, match.dst, match.role))  # a Match that a caller made
    return (score, dst, role, counts, least, most, n_out, order), n_out, ragged


def _count(r: Any, limit: int, clip: bool) -> int:
    _checks.integer(NAME, "r", r, 0, "an int or an integer tensor [B]")
    if r > limit and not clip:
        raise ValueError(f"{NAME}: r must be at most {limit}, the tokens that can merge, got {r}; clip=True lowers it")
    return r if r <= limit else limit  # not min: sizes that a graph leaves open stay sums


def _counts(r: Tensor, match: Match, clip: bool) -> Tensor:
    _checks.integers(NAME, "r", r)
    _checks.shape(NAME, "r", r, (match.score.shape[0],), "[B]")
    if backends.may_read(r) and r.numel():
        low, high = int(r.min()), int(r.max())
        if low < 0 or (high > match.limit and not clip):
            raise ValueError(
                f"{NAME}: r must lie in [0, {match.limit}], the tokens that can merge, got {low} to {high}"
            )
    return r.to(torch.int32).contiguous()


def _triton() -> Any:
    from vitkern.triton_kernels import merge_plan as kernels

    return kernels


def _fake(score: Tensor, dst: Any, role: Any, r: Any, threshold: Any, most: int, n_out: int, *rest: Any) -> Any:
    batch, tokens = score.shape
    shapes = ((batch, tokens), (batch, tokens), (batch, n_out + 1), (batch,))
    return tuple(score.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options)[0], backend)


OP = PlainOp(
    NAME,
    ("Tensor score", "Tensor dst", "Tensor role", "Tensor? r", "Tensor? threshold"),
    "SymInt most, SymInt n_out, str order, str gpu",
    outputs=4,
    batched=5,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton, _cuda.PLAN),
)
OP.register()
merge_plan.explain = _explain  # type: ignore[attr-defined]
