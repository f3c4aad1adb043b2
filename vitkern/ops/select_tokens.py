"""select_tokens: argument checks, lowering, and the op that chooses; merge_tokens moves the rows."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _sharded, merge_tokens
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import PlainOp
from vitkern.reference.select_tokens import select_tokens as definition
from vitkern.tokens import MergePlan

NAME = "select_tokens"


def select_tokens(
    x: Tensor,
    score: Tensor,
    k: int | None = None,
    *,
    protect: int = 1,
    threshold: float | Tensor | None = None,
    fuse_rest: bool | str = False,
    order: str = "position",
    mask: Tensor | None = None,
    n_max: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    r"""The k tokens of largest score, and what is left out in one more (EViT, Liang et al. 2022; DynamicViT, VisionZip).

    ``y = [prefix | kept | fused]``. The fused token is ``sum_j s_j x_j`` over the tokens left out (EViT, which does not
    normalise it), with ``"mean"`` divided by ``sum_j s_j``. One pass chooses, by a radix select; the rows are moved by the
    kernels of :func:`vitkern.merge_tokens`, whose backward is a gather.

    Args:
        x: ``[B, N, ...]`` of any trailing shape and strides: float32, float64, bfloat16 or float16.
        score: ``[B, N]``, compared in float32; with gradient through the fused token alone. The scores of protected tokens
            are ignored; NaN counts as ``-inf``.
        k: how many tokens are kept beside the protected ones, at most N - protect. ``k = N - protect`` keeps all of them,
            and there is no fused token. None, with ``threshold``: all that reach it.
        protect: how many of the first tokens are always kept.
        threshold: only scores of at least this, a float or ``[B]``; of those at most ``k``.
        fuse_rest: ``"sum"`` (or True) or ``"mean"``: adds the fused token, last. Tokens whose score is not finite and
            masked ones take no part. Not with ``threshold``.
        order: of the kept tokens: ``"position"``, or ``"score"``, the largest first (as EViT and DynamicViT return them).
        mask: bool ``[B, N]``, True for a real token; the score of the others is ``-inf``.
        n_max: with ``threshold``: the length of y, protected tokens included; at most so many are kept.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"`` (which move the rows; on a GPU a Triton kernel
            chooses, plain PyTorch beyond 4096 tokens); raises with all reasons if it cannot run.

    Returns:
        ``(y, index)``: ``y [B, protect + k (+ 1), ...]`` in the dtype of x, ``index [B, protect + k]`` int32, the positions
        of its rows but the fused one: what :func:`vitkern.restore_tokens` wants. With ``threshold`` and ``n_max``
        ``(y [B, n_max, ...], index [B, n_max], lengths [B])``: rows past ``lengths`` are 0 and their index is N. With
        ``threshold`` alone ``(y [T, ...], index [T], cu_seqlens [B + 1])``, one sample after another (reads T on the host).

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(x) not in _sharded.PLAIN and _sharded.met(x):
        return _sharded.call(select_tokens, locals())
    args, reduce = _lower(x, score, k, protect, threshold, fuse_rest, order, mask, n_max)
    ragged = threshold is not None
    y, index, plan = gathered(NAME, x, score, args, reduce, ragged, backend)
    if not ragged:
        return y, index
    if n_max is not None:
        return y, index, plan.lengths
    return plan.pack(y), plan.pack(index), plan.cu_seqlens


def gathered(
    name: str, x: Tensor, score: Tensor, args: tuple[Any, ...], reduce: str, ragged: bool, backend: str | None
) -> tuple[Tensor, Tensor, MergePlan]:
    """The rows that `args` (of the op) choose, their positions, and the plan. A named back-end moves the rows; off the CPU
    the op finds its own to choose, unless the reference is named."""
    *_, slots, by_score, fuse = args
    wanted = backends.forced(backend)
    if wanted:
        explained(name, x, reduce, backend)
    itself = x.device.type != "cpu" and wanted != "reference"
    chosen = _call.dispatch(OP, args, None) if itself else _call.run(OP, args, wanted)
    token_map, perm, offsets, lengths = chosen
    plan = MergePlan(token_map, perm, offsets, lengths, slots + int(fuse), ragged)
    weight = None
    if fuse:
        alone = plan.token_map < slots
        weight = torch.where(alone, 1.0, score.to(torch.promote_types(score.dtype, torch.float32)))
    rows = (merge_tokens.rows(x), plan.token_map, plan.perm, plan.offsets, weight, reduce, True)
    y = _call.run(merge_tokens.OP, rows, backend)[0]
    index = plan.perm[:, :slots]
    used = plan.key_mask
    if used is not None:
        index = torch.where(used, index, x.shape[1])
    return y.reshape(y.shape[0], y.shape[1], *x.shape[2:]), index, plan


def explained(name: str, x: Tensor, reduce: str, backend: str | None) -> _call.Found:
    """What moves the rows of x."""
    return _call.explanation(
        name, merge_tokens.OP, (merge_tokens.rows(x), None, None, None, None, reduce, True), backend
    )


# lowering ---------------------------------------------------------------------------------------------------------------


def _lower(
    x: Any,
    score: Any,
    k: Any = None,
    protect: Any = 1,
    threshold: Any = None,
    fuse_rest: Any = False,
    order: Any = "position",
    mask: Any = None,
    n_max: Any = None,
) -> tuple[tuple[Any, ...], str]:
    """The arguments of the op, and how merge_tokens reduces."""
    batch, tokens = _checks.rows(NAME, x)
    _checks.tensor(NAME, "score", score)
    _checks.floating(NAME, "score", score)
    _checks.shape(NAME, "score", score, (batch, tokens), "[B, N]")
    _checks.on_device(NAME, "score", score, "x", x.device)
    prefix = _checks.prefix(NAME, protect, tokens)
    if order not in ("position", "score"):
        raise ValueError(f"{NAME}: order must be 'position' or 'score', got {order!r}")
    if fuse_rest not in (False, True, "sum", "mean"):
        raise ValueError(f"{NAME}: fuse_rest must be False, True, 'sum' or 'mean', got {fuse_rest!r}")
    if k is None and threshold is None:
        raise ValueError(f"{NAME}: k must be an int where there is no threshold, got None")
    most = tokens - prefix if k is None else _checks.count(NAME, "k", k, tokens - prefix, "N - protect")
    least = None
    if threshold is not None:
        least = _checks.threshold(NAME, threshold, batch, x.device, "x")
        if fuse_rest:
            raise ValueError(f"{NAME}: fuse_rest must be False with a threshold, got {fuse_rest!r}")
    slots = prefix + most
    if n_max is not None:
        if threshold is None:
            raise ValueError(f"{NAME}: n_max must go with a threshold, got {n_max!r} without one")
        slots = _checks.count(NAME, "n_max", n_max, tokens, "N")
        if slots < prefix:
            raise ValueError(f"{NAME}: n_max must hold the {prefix} protected tokens, got {n_max}")
        most = min(most, slots - prefix)
    ranked = score.detach().to(torch.float32)
    if mask is not None:
        _checks.flags(NAME, "mask", mask, (batch, tokens), "x", x.device)
        ranked = ranked.masked_fill(~mask, -torch.inf)
    fuse = bool(fuse_rest) and most < tokens - prefix
    reduce = "first" if not fuse else "mean" if fuse_rest == "mean" else "sum"
    return (ranked.contiguous(), least, prefix, most, slots, order == "score", fuse), reduce


# the op -----------------------------------------------------------------------------------------------------------------


def _triton() -> Any:
    from vitkern.triton_kernels import select_tokens as kernels

    return kernels


def _fake(
    score: Tensor, threshold: Any, protect: int, most: int, slots: int, by_score: bool, fuse: bool, *rest: Any
) -> tuple[Tensor, ...]:
    batch, tokens = score.shape
    shapes = ((batch, tokens), (batch, tokens), (batch, slots + int(fuse) + 1), (batch,))
    return tuple(score.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _explain(x: Any, *args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return explained(NAME, x, _lower(x, *args, **options)[1], backend)


OP = PlainOp(
    NAME,
    ("Tensor score", "Tensor? threshold"),
    "SymInt protect, SymInt most, SymInt slots, bool by_score, bool fuse, str gpu",
    outputs=4,
    batched=2,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
)
OP.register()
select_tokens.explain = _explain  # type: ignore[attr-defined]
