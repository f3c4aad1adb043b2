"""channel_attention: argument checks, lowering, and the op."""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.channel_attention import channel_attention as definition
from vitkern.reference.channel_attention import channels_first

NAME = "channel_attention"
NORMALIZERS = ("softmax", "relu", "none", "plus1")


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    temperature: Tensor | None = None,
    normalize: bool = True,
    normalizer: str = "softmax",
    topk: int | tuple[int, ...] | None = None,
    topk_weight: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-12,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window_size: int | tuple[int, int] | None = None,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention between channels: a D x E matrix a head, from sums over all tokens (XCiT, El-Nouby et al. 2021; Restormer,
    Zamir et al. 2022; EdgeNeXt; DaViT; DRSformer; DLGSANet; HiT-SR).

    ``L_ce = t s sum_n q_nc k_ne / (a_c b_e)``, ``P = softmax of L over e``, ``o_nc = sum_e P_ce v_ne``, with the norms
    ``a_c = max(|q_.c|, eps)`` and ``b_e`` likewise over the tokens, or 1 without `normalize`.

    Args:
        q: ``[B, N, H, D]`` or a map ``[B, Hs, Ws, H, D]`` of any strides; k, v: the same with E channels a head; 1 to 256 each.
            k and v may have fewer heads, Hk that divides H: heads ``h G`` to ``h G + G - 1`` of q, G = H / Hk, share head h
            (k and v are copied for them where G D > 256).
        temperature: t, ``[H]`` or ``[H, 1, 1]``; 1 if None.
        normalize: divide by the norms; XCiT and Restormer do, DaViT and HiT-SR do not.
        normalizer: ``"softmax"``; ``"relu"``, ``max(L, 0)``; ``"none"``, L; ``"plus1"``, ``exp(L) / (1 + sum exp(L))``.
        topk: all but the k largest of a row get weight 0 (ties: the first channels stay). A tuple, with `topk_weight`
            ``[T]``: ``P = sum_t w_t P_t`` (DRSformer).
        scale: s, 1 if None (DaViT: ``D ** -0.5``, its second version ``N ** -0.5``).
        eps: what a norm is at least, as in ``F.normalize``.
        key_mask: bool ``[B, N]`` or ``[B, Hs, Ws]``, True for a real token. The others take no part and give 0.
        cu_seqlens: int32 ``[S + 1]``: q, k and v are packed, ``[T, H, D]``, and each sequence has a matrix of its own.
        window_size: an int or (height, width): a matrix for each window of the map; those at the edges may be smaller. Of
            tokens ``[B, N, H, D]`` an int, runs of so many.
        order: int32 ``[N]`` or ``[B, N]``, a permutation: runs of `window_size` tokens, or those of `cu_seqlens` ([T]), count
            along it. The output stays in the order of q.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; raises with all reasons if it cannot run.

    Returns:
        The shape and dtype of q, float32 inside and rounded once; tokens side by side where they are so in q. Gradients go to q,
        k, v, temperature and topk_weight. No tensor of the size of q is stored.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(channel_attention, locals())
    args = _lower(
        q, k, v, temperature, normalize, normalizer, topk, topk_weight, scale, eps, key_mask, cu_seqlens, window_size, order
    )  # fmt: skip
    out = _call.run(OP, args, backend)[0]
    out = out if q.dim() == 5 else out[:, 0] if q.dim() == 4 else out[0, 0]
    return out if out.shape[-2] == q.shape[-2] else out.unflatten(-1, (-1, q.shape[-1])).flatten(-3, -2)


def _lower(
    q: Any,
    k: Any,
    v: Any,
    temperature: Any = None,
    normalize: Any = True,
    normalizer: Any = "softmax",
    topk: Any = None,
    topk_weight: Any = None,
    scale: Any = None,
    eps: Any = 1e-12,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    window_size: Any = None,
    order: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the op."""
    _check_tokens(q, k, v, cu_seqlens is not None)
    axes, heads = q.shape[:-2], q.shape[-2]
    if temperature is not None:
        _checks.parameter(NAME, "temperature", temperature, q.device)
        if tuple(temperature.shape) not in ((heads,), (heads, 1, 1)):
            raise ValueError(
                f"{NAME}: temperature must have shape [H] or [H, 1, 1] = [{heads}, 1, 1], got {list(temperature.shape)}"
            )
        temperature = temperature.reshape(heads)
    if not isinstance(normalize, bool):
        raise TypeError(f"{NAME}: normalize must be a bool, got {normalize!r}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{NAME}: normalizer must be 'softmax', 'relu', 'none' or 'plus1', got {normalizer!r}")
    kept = _kept(topk, topk_weight, k)
    scale = 1.0 if scale is None else _checks.number(NAME, "scale", scale)
    if not math.isfinite(scale):
        raise ValueError(f"{NAME}: scale must be finite, got {scale!r}")
    if not 0 < _checks.number(NAME, "eps", eps) < math.inf:
        raise ValueError(f"{NAME}: eps must be positive and finite, got {eps!r}")
    if key_mask is not None:
        _checks.tensor(NAME, "key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{NAME}: key_mask must be bool, got {key_mask.dtype}")
        _checks.shape(NAME, "key_mask", key_mask, tuple(axes), "that of q without heads and channels")
        _checks.on_device(NAME, "key_mask", key_mask, "q", q.device)
    window = _window(window_size, cu_seqlens, q)
    order = _order(order, window, cu_seqlens, q)
    group = heads // k.shape[-2]
    if group > 1 and group * q.shape[-1] > 256:
        k, v = (t.repeat_interleave(group, -2) for t in (k, v))
    elif group > 1:  # the rows of their matrices below each other
        q = q.unflatten(-2, (-1, group)).flatten(-2)
    while q.dim() < 5:
        at = 0 if q.dim() == 3 else 1
        q, k, v = (t.unsqueeze(at) for t in (q, k, v))
        key_mask = None if key_mask is None else key_mask.unsqueeze(at)
    return (
        q, k, v, temperature, topk_weight, None if key_mask is None else key_mask.contiguous(), cu_seqlens, order, normalize,
        normalizer, kept, window, scale, float(eps),
    )  # fmt: skip


def _check_tokens(q: Any, k: Any, v: Any, packed: bool) -> None:
    wanted = "[T, H, D]" if packed else "[B, N, H, D] or [B, Hs, Ws, H, D]"
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, t)
        _checks.floating(NAME, name, t)
        if t.dim() not in ((3,) if packed else (4, 5)):
            raise ValueError(f"{NAME}: {name} must have shape {wanted}, got {list(t.shape)}")
        if t.shape[:-2] != q.shape[:-2]:
            raise ValueError(f"{NAME}: {name} must have the tokens of q, {list(q.shape[:-2])}, got {list(t.shape)}")
        _checks.on_device(NAME, name, t, "q", q.device)
        if t.dtype != q.dtype:
            raise TypeError(f"{NAME}: {name} must have the dtype of q ({q.dtype}), got {t.dtype}")
        if not 1 <= t.shape[-1] <= 256:
            raise ValueError(f"{NAME}: the head size of {name} must be 1 to 256, got {t.shape[-1]}")
    if v.shape[-1] != k.shape[-1]:
        raise ValueError(f"{NAME}: v must have the head size of k ({k.shape[-1]}), got {v.shape[-1]}")
    if q.shape[-2] < 1:
        raise ValueError(f"{NAME}: q must have at least one head, got {list(q.shape)}")
    if k.shape[-2] != v.shape[-2] or k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"{NAME}: k and v must have as many heads as each other, and a number that divides those of q ({q.shape[-2]}), "
            f"got {k.shape[-2]} and {v.shape[-2]}"
        )


def _kept(topk: Any, weight: Any, k: Tensor) -> list[int]:
    several = isinstance(topk, (tuple, list))
    kept = list(topk) if several else [] if topk is None else [topk]
    for count in kept:
        if not 1 <= _checks.integer(NAME, "topk", count, what="an int or a tuple of ints") <= k.shape[-1]:
            raise ValueError(f"{NAME}: topk must lie in [1, E] = [1, {k.shape[-1]}], got {topk!r}")
    if several and (weight is None or not kept):
        raise ValueError(f"{NAME}: topk must come with topk_weight and not be empty where it is a tuple, got {topk!r}")
    if weight is not None:
        _checks.parameter(NAME, "topk_weight", weight, k.device)
        _checks.shape(NAME, "topk_weight", weight, (len(kept),), "[T], one entry for each topk,")
    return kept


def _window(window_size: Any, cu_seqlens: Any, q: Tensor) -> list[int]:
    if window_size is None:
        return []
    if cu_seqlens is not None:
        raise ValueError(f"{NAME}: window_size must be None with cu_seqlens, got {window_size!r}")
    sides = _checks.per_axis(NAME, "window_size", window_size, q.dim() - 3)
    for side in sides:
        _checks.integer(NAME, "window_size", side, 1)
    return [1, *sides][-2:]


def _order(order: Any, window: list[int], cu_seqlens: Any, q: Tensor) -> Tensor | None:
    if cu_seqlens is not None:
        _checks.tensor(NAME, "cu_seqlens", cu_seqlens)
        _checks.on_device(NAME, "cu_seqlens", cu_seqlens, "q", q.device)
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
            raise TypeError(
                f"{NAME}: cu_seqlens must be int32 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        _checks.offsets(NAME, "cu_seqlens", cu_seqlens, q.shape[0], q.shape[0], "q")
    if order is None:
        return None
    _checks.tensor(NAME, "order", order)
    _checks.on_device(NAME, "order", order, "q", q.device)
    if order.dtype != torch.int32:
        raise TypeError(f"{NAME}: order must be int32, got {order.dtype}")
    tokens, batch = (q.shape[0], 1) if q.dim() == 3 else (q.shape[1], q.shape[0])
    if q.dim() == 5 or tuple(order.shape) not in ((tokens,), (batch, tokens)):
        wanted = f"[N] or [B, N] = {[batch, tokens]}, of tokens [B, N, H, D]"
        raise ValueError(
            f"{NAME}: order must have shape {wanted}, got {list(order.shape)} for {q.dim() - 2} axes of tokens"
        )
    if backends.may_read(order):
        place = torch.arange(tokens, dtype=torch.int32, device=order.device)
        if not torch.equal(order.sort(-1).values, place.expand_as(order)):
            raise ValueError(f"{NAME}: order must be a permutation of the {tokens} tokens, got {order.tolist()}")
    return order.expand(batch, tokens).contiguous() if window or cu_seqlens is not None else None


# the op -----------------------------------------------------------------------------------------------------------------


def _empty_like(t: Tensor) -> Tensor:
    """Without values: [B, Y, X, H, D] with tokens side by side where they are so in t, anything else contiguous."""
    if t.dim() == 5 and channels_first(t):
        batch, high, wide, heads, width = t.shape
        return t.new_empty((batch, heads, width, high, wide)).permute(0, 3, 4, 1, 2)
    return t.new_empty(t.shape)


def _fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, window = rest[4], rest[9]
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, high, across, heads, d = q.shape
    windows = 1
    if cu_seqlens is not None:
        windows = cu_seqlens.shape[0] - 1
    elif window:
        windows = -(-high // window[0]) * -(-across // window[1])
    gram = q.new_empty((batch, windows, heads, d, k.shape[4]), dtype=wide)
    return _empty_like(q), gram, q.new_empty((batch, windows, heads, d + k.shape[4]), dtype=wide)


def _triton() -> Any:
    from vitkern.triton_kernels import channel_attention as kernels

    return kernels


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = Op(
    NAME,
    (
        "Tensor q", "Tensor k", "Tensor v", "Tensor? temperature", "Tensor? topk_weight", "Tensor? key_mask",
        "Tensor? cu_seqlens", "Tensor? order",
    ),
    "bool normalize, str normalizer, SymInt[] topk, SymInt[] window, float scale, float eps, str gpu",
    differentiable=(0, 1, 2, 3, 4),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton),
    outputs=("out", "gram", "squares"),
    gradient_like=_empty_like,
)  # fmt: skip
OP.register()
channel_attention.explain = _explain  # type: ignore[attr-defined]
