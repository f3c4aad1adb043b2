"""linear_attention: signature, and the op."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from vitkern import backends
from vitkern.feature_map import Polar
from vitkern.ops import _attention_checks, _call, _checks, _linear_decay, _linear_pairs, _sharded
from vitkern.ops._linear_gpu import GPU
from vitkern.ops._linear_lowering import NAME, Lowered, lower
from vitkern.ops._linear_maps import apply_map, features_in_front, fused
from vitkern.ops._op import Op
from vitkern.reference import linear_features
from vitkern.reference.linear_attention import linear_attention as definition

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import LinearOptions

State = tuple[Tensor, Tensor, Tensor]  # S, z and n


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[False] = False, **options: "Unpack[LinearOptions]"
) -> Tensor: ...


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: Literal[True], **options: "Unpack[LinearOptions]"
) -> tuple[Tensor, State]: ...


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_state: bool, **options: "Unpack[LinearOptions]"
) -> Tensor | tuple[Tensor, State]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: Any = None,
    normalizer: str | None = None,
    eps: float | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    key_weight: Tensor | None = None,
    offset: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window_size: Any = None,
    rope: Any = None,
    rope_order: str | None = None,
    decay: Any = None,
    causal: bool | int = False,
    initial_state: Any = None,
    return_state: bool = False,
    lepe: Any = None,
    preset: str | None = None,
    backend: str | None = None,
) -> Any:
    r"""Attention in time linear in the tokens (Katharopoulos et al. 2020): with features ``phi``,

        o_i = phi(q_i)^T S / (phi(q_i)^T z + eps),   S = sum_j phi(k_j) v_j^T,   z = sum_j phi(k_j)

    float32 inside (float64 for float64), rounded once; no map of scores and no copy of q, k, v is made. So few tokens that all
    pairs take fewer products are summed as ``(phi(q) phi(k)^T) v``; the shape alone chooses. With `decay` or `causal` the features
    exist in float32, and short calls that want gradients sum over all pairs; `explain` tells.

    Args:
        q: ``[B, Nq, H, D]``, on a grid ``[B, Hs, Ws, H, D]``, packed ``[T, H, D]``; any strides; float32, float64, bfloat16 or
            float16; D and Dv 1 to 256.
        k, v: ``[B, Nk, Hk, D]`` and ``[B, Nk, Hk, Dv]`` likewise; Hk divides H: query head h reads key head ``h // (H / Hk)``.
        feature_map: ``"relu"``, ``"elu1"`` (elu + 1), ``"identity"``, ``"leaky_relu"``, ``"softmax"`` (queries over channels, keys
            over tokens), ``"silu_norm"``, or an object of `vitkern.feature_map`; a new map needs only ``.dense``.
        normalizer: with ``den = phi(q_i)^T z`` and n the number of valid keys: ``"sum"`` num / (den + eps), ``"mean"``
            num / (den + n eps), ``"none"`` num, ``"max"`` num / max(den, eps), ``"abs_max"`` num / max(abs den, eps),
            ``"subtract"`` num / n + (1 - den / n) mean(v). A divisor of exactly 0 gives 0, and gradients 0.
        eps, scale: a factor of ``phi(q)`` in numerator and denominator. None: the preset's values, else those of the
            normalizer (1e-6; 1 of abs_max) and 1.
        key_mask: bool ``[B, Nk]`` (as k without heads and channels), True where a key is valid. It acts after the map: what a
            hidden key holds never leaks.
        key_weight: ``[B, Nk, Hk]`` or ``[B, Nk, 1]``, multiplies ``phi(k)``; differentiable.
        offset: c adds ``c sum_j v_j`` to the numerator and ``c n`` to the denominator.
        cu_seqlens, cu_seqlens_k: int32 bounds ``[sequences + 1]`` of packed sequences, for the keys where they differ.
        window_size: one S and z for each window of the map; the windows divide it.
        rope, rope_order: a `vitkern.Rope`. ``"after"`` rotates the features, in the numerator alone; ``"before"`` q and k.
        decay: one of `vitkern.decay` (``Retention``, ``Gated``, ``Manhattan``, ``Polyline``), or a list whose masks are averaged:
            factors of numerator and denominator. Still linear in the tokens, forward and backward.
        causal: True: a query sees the keys up to its own; an int L: up to the end of its block of L tokens (the frames of a video).
        initial_state: what an earlier call returned, as if its tokens stood in front; with causal.
        return_state: also the sums, ``(S [B, Hk, F, Dv], z [B, Hk, F], n [B, Hk])`` in float32, of every sequence; with causal
            those behind the last token, of H heads.
        lepe: a `vitkern.DepthwiseValue`, added to the output.
        preset: what a published model means by linear attention: map, normalizer, eps, scale, order of the rotation.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, Nq, H, Dv]`` (as q) in the dtype of v, with `return_state` ``(out, state)``. Gradients go to q, k, v, key_weight,
        the tensors of the feature map and of rope.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(linear_attention, locals())
    lowered, custom = lower(
        q, k, v, feature_map, normalizer, eps, scale, key_mask, key_weight, offset, cu_seqlens, cu_seqlens_k, window_size,
        rope, rope_order, preset,
    )  # fmt: skip
    placed = _linear_decay.lower(lowered, custom, decay, causal, initial_state, return_state, cu_seqlens_k)
    _check_lepe(lepe, q, v)
    if isinstance(custom, Polar) and (return_state or initial_state is not None):
        raise NotImplementedError(f"{NAME}: return_state must be False with feature_map.Polar, which has two states")
    out, state = _run(lowered, custom, placed, return_state, backend)
    if lepe is not None:
        values = v.to(out.dtype).flatten(1, -3)
        added = lepe.of(values, backend=_call.beside(backend))
        out = (out.flatten(1, -3) + added.repeat_interleave(q.shape[-2] // k.shape[-2], 2)).reshape(out.shape)
    return (out, state) if return_state else out


def _run(
    lowered: Lowered, custom: Any, placed: _linear_decay.Placed | None, return_state: bool, backend: str | None
) -> tuple[Tensor, Any]:
    device = lowered.q.device.type
    if _checks.autocast(device):
        if lowered.q.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            lowered.q, lowered.k, lowered.v = (t.to(dtype) for t in (lowered.q, lowered.k, lowered.v))
        with torch.autocast(device, enabled=False):
            return _run(lowered, custom, placed, return_state, backend)
    wide = torch.promote_types(lowered.q.dtype, torch.float32)
    halves = False
    if custom is not None and not _fused(lowered, custom, placed, backend):
        apply_map(lowered, custom)
        halves = isinstance(custom, Polar)
    lowered.tables = tuple(None if t is None else t.to(wide) for t in lowered.tables)  # type: ignore[assignment]
    out, state = (_two_halves if halves else _one)(lowered, placed, return_state, backend)
    return out.reshape(*lowered.shape, out.shape[-1]), state


def _fused(lowered: Lowered, custom: Any, placed: _linear_decay.Placed | None, backend: str | None) -> bool:
    """Whether the op makes the features of `custom`: decays take features, and CUDA C++ knows no such map."""
    wanted = backends.forced(backend)
    if placed is not None or (lowered.q.device.type != "cpu" and wanted == "cuda"):
        return False
    if lowered.q.device.type == "cpu" or wanted == "reference":
        return fused(lowered, custom)
    trial = replace(lowered)
    return fused(trial, custom) and not GPU.triton_refusals(trial.args) and fused(lowered, custom)


def _one(
    lowered: Lowered, placed: _linear_decay.Placed | None, return_state: bool, backend: str | None
) -> tuple[Tensor, Any]:
    if placed is not None:
        return _linear_decay.attend(lowered, placed, backend)
    lowered.pairs = not return_state and _linear_pairs.chosen(lowered, backend)
    out, state, _ = _call.run(OP, lowered.args, backend)
    return out, None if lowered.pairs else (state[..., :-1, :-1], state[..., :-1, -1], state[..., -1, -1])


def _two_halves(
    lowered: Lowered, placed: _linear_decay.Placed | None, return_state: bool, backend: str | None
) -> tuple[Tensor, Any]:
    """PolaFormer: the halves of the features of q exchanged for the second half of v's channels."""
    q, v = lowered.q, lowered.v
    width, features = v.shape[-1] // 2, q.shape[-1] // 2
    found = []
    for queries, values in (
        (q, v[..., :width]),
        (torch.cat((q[..., features:], q[..., :features]), -1), v[..., width:]),
    ):
        lowered.q, lowered.v = queries, values
        found.append(_one(lowered, placed, return_state, backend)[0])
    return torch.cat(found, -1), None


def _check_lepe(lepe: Any, q: Tensor, v: Tensor) -> None:
    if lepe is None:
        return
    if q.dim() == 3:
        raise ValueError(f"{NAME}: lepe must be None with cu_seqlens, got {type(lepe).__name__}")
    _attention_checks.check_lepe(lepe, q.flatten(1, -3), v.flatten(1, -3), NAME)


# the op -----------------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    cu, map0, map1, feature_map, pairs = rest[6], rest[8], rest[9], rest[11], rest[19]
    count = q.shape[0] * q.shape[1] * q.shape[3] if cu is None else q.shape[0] * (cu.shape[0] - 1)
    heads, width, channels = k.shape[5], k.shape[6], v.shape[6]
    sums = (0, 0) if pairs else (linear_features.width(feature_map, width, map0, map1) + 1, channels + 1)
    state = q.new_empty((count, heads, *sums), dtype=acc)
    kept = q.new_empty((count, heads, linear_features.kept_width(feature_map, width)), dtype=acc)
    return v.new_empty((*q.shape[:6], channels)), state, kept


def _explain(
    *args: Any,
    backend: str | None = None,
    lepe: Any = None,
    return_state: bool = False,
    decay: Any = None,
    causal: Any = False,
    initial_state: Any = None,
    **options: Any,
) -> _call.Found:
    lowered, custom = lower(*args, **options)
    placed = _linear_decay.lower(
        lowered, custom, decay, causal, initial_state, return_state, options.get("cu_seqlens_k")
    )
    if placed is not None:
        return _linear_decay.explanation(lowered, placed, backend)
    if custom is not None and not _fused(lowered, custom, placed, backend):
        features_in_front(lowered, custom)
    lowered.pairs = not return_state and _linear_pairs.chosen(lowered, backend)
    return _call.explanation(NAME, OP, lowered.args, backend)


OP = Op(
    NAME,
    ("Tensor q", "Tensor k", "Tensor v", "Tensor? key_mask", "Tensor? key_weight", "Tensor? cos_q", "Tensor? sin_q",
     "Tensor? cos_k", "Tensor? sin_k", "Tensor? cu_q", "Tensor? cu_k", "Tensor? map0", "Tensor? map1", "Tensor? map2"),
    "str feature_map, float rate, str normalizer, float eps, float scale, float offset, bool half, bool detach, bool pairs, "
    "str gpu",
    differentiable=(0, 1, 2, 4, 5, 6, 7, 8, 11, 12, 13),
    batched=5,
    definition=definition,
    fake=_fake,
    gpu=GPU,
    outputs=("out", "state", "kept"),
    autocast=False,
)  # fmt: skip
OP.register()
linear_attention.explain = _explain  # type: ignore[attr-defined]
