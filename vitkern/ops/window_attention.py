"""window_attention: argument checks, lowering of the options, and the two ops (separate and packed q, k, v)."""

import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from vitkern.bias import RelativePosition
from vitkern.cosine import CosineScore
from vitkern.ops import _call, _checks, _dropout, _sharded, _window_general, _window_gpu, _window_groups, _window_views
from vitkern.ops._op import Op
from vitkern.ops._window_checks import NAME, check, signature
from vitkern.reference.window_attention import window_attention as definition
from vitkern.stats import Stats
from vitkern.value import DepthwiseValue

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from vitkern.ops._options import WindowOptions

OPTION_TENSORS = (
    "Tensor? bias",
    "Tensor? index",
    "Tensor? logit_scale",
    "Tensor? k_pad",
    "Tensor? v_pad",
    "Tensor? seed",
)
OPTIONS = (
    "SymInt[] window, SymInt[] shift, bool roll_first, bool pad_visible, float scale, float mask_value, "
    "float cosine_max, float cosine_eps, float dropout_p, str gpu"
)


@overload
def window_attention(  # type: ignore[overload-overlap]
    q: Tensor, k: Tensor, v: Tensor, window_size: Any, shift_size: Any = 0,
    *, return_stats: tuple[()] = (), **options: "Unpack[WindowOptions]",
) -> Tensor: ...  # fmt: skip


@overload
def window_attention(
    q: Tensor, k: Tensor, v: Tensor, window_size: Any, shift_size: Any = 0,
    *, return_stats: tuple[str, ...], **options: "Unpack[WindowOptions]",
) -> tuple[Tensor, Stats]: ...  # fmt: skip


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Any,
    shift_size: Any = 0,
    *,
    bias: Any = None,
    mask: Any = None,
    cosine: CosineScore | None = None,
    scale: float | Tensor | None = None,
    normalizer: str = "softmax",
    partition: str = "block",
    context_size: int | tuple[int, ...] | None = None,
    pad_order: str = "pad_roll",
    pad_kv: str | tuple[Tensor | None, Tensor | None] | None = None,
    mask_value: float | None = -100.0,
    extra_kv: tuple[Tensor, Tensor] | None = None,
    shared_q: bool = False,
    lepe: DepthwiseValue | None = None,
    order: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_stats: tuple[str, ...] = (),
    key_mask: Tensor | None = None,
    key_window_size: int | tuple[int, ...] | None = None,
    context_border: str = "pad",
    backend: str | None = None,
) -> Any:
    r"""Softmax attention inside (shifted) windows of a map: the attention of Swin (Liu et al. 2021) and Swin V2 (2022).

    ``softmax(scale q k^T + bias + mask_value [regions differ]) v`` in every window, with the roll, the partition, their
    inverses and the padding in the addressing. Nothing of q, k or v is copied. What the arguments from ``partition`` on ask for
    (but dropout and lse), and biases other than tensors and tables of offsets, gathers the windows in front of
    :func:`vitkern.attention` and puts its rows back.

    Args:
        q: ``[B, *spatial, H, D]``, 1 to 4 spatial axes, any strides. float32, float64, bfloat16 or float16.
        k: ``[B, *spatial, Hk, D]``; Hk divides H (grouped queries).
        v: ``[B, *spatial, Hk, Dv]``.
        window_size: tokens per axis of a window: an int, or one per axis, None for the whole axis. It may exceed the map.
            A list of tuples has a window for each of the equal groups that the heads are split into (CSWin).
        shift_size: cyclic shift per axis, ``0 <= shift < window``; a list of tuples as for windows (StyleSwin); integers
            ``[B, axes]`` shift every sample by its own, where windows divide the map.
        bias: added to the scores: a tensor that broadcasts to ``[H, N, M]`` (N queries and M keys of a window, row-major),
            a modifier of :mod:`vitkern.bias`, whose sequences are the windows, or a list of these; ``-inf`` hides.
            :class:`vitkern.bias.PerHeadGroup` holds one for each group of heads. With context_size a table of
            :class:`vitkern.bias.RelativePosition` without an index has ``w + c - 1`` rows per axis.
        cosine: :class:`vitkern.CosineScore` for Swin V2's scores; ``scale`` must then be None.
        scale: factor of the scores, default ``D ** -0.5``.
        pad_order: ``"pad_roll"`` pads the map to whole windows and then shifts (torchvision, transformers);
            ``"roll_pad"`` shifts first (timm).
        pad_kv: what pads show to real queries: ``None`` nothing; ``"zero"`` zero keys and values that take part;
            ``(k_pad [Hk, D], v_pad [Hk, Dv])`` these (padding before the projection gives its bias), with gradients.
        mask_value: added where a shift brought tokens of different regions together. ``None`` hides exactly.
        dropout_p: probability of dropping a weight. The pattern is a function of ``dropout_seed``, image, head, query
            token and key slot alone (Philox), so every back-end and every way to run the windows draws the same.
        dropout_seed: an int, or a one-element int64 tensor; ``None`` draws one from torch's generator.
        partition: ``"block"``; ``"grid"``, strided windows (MaxViT, Tu et al. 2022): of each axis, window i of n has the tokens
            i, i + n, i + 2 n, ...; ``"unit"``, the same on a list of tokens (Hiera, Ryali et al. 2023).
        mask: bool that broadcasts to ``[H, N, M]``, True may attend, or modifiers of :mod:`vitkern.mask`.
        normalizer: as in :func:`vitkern.attention`.
        context_size: keys of a window per axis, from a halo around it (HAT, Chen et al. 2023): they begin
            ``(context - window) // 2`` before it. ``context_border="pad"``: cells beyond the map are pads; ``"shift"``: the halo
            is moved into the map.
        key_window_size: keys of a window per axis, where k and v have a map of their own; default in proportion to the maps.
        extra_kv: ``(k, v) [B|1, E, Hk, D|Dv]``: further keys of every window, behind its own, with bias 0 unless it has M + E
            columns.
        key_mask: bool ``[B, *spatial]`` of k, True may be attended.
        shared_q: q is ``[B, *window, H, D]``, the queries of all windows of an image (GC ViT, Hatamizadeh et al. 2023).
        lepe: :class:`vitkern.DepthwiseValue`, a depthwise convolution of v on the map or inside the windows, added to the output.
        order: integers ``[L]`` or ``[B, L]``: the tokens of a map of one axis in the order that windows are cut from.
        return_stats: names out of ``"lse"`` ``[B, *spatial, H]``; ``"key_mean"`` on the map of k, the mean weight each key gets
            from the queries of its window; ``"probs"`` and ``"logits"`` ``[B windows, H, N, M]``, stored.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, *spatial, H, Dv]`` on q's map (k's with shared_q) in the dtype of v, or ``(out, Stats)`` with ``return_stats``.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(q) not in _sharded.PLAIN and _sharded.met(q):
        return _sharded.call(window_attention, locals())
    options: dict[str, Any] = {
        "bias": bias, "cosine": cosine, "scale": scale, "pad_order": pad_order, "pad_kv": pad_kv, "mask_value": mask_value,
        "dropout_p": dropout_p, "dropout_seed": dropout_seed,
    }  # fmt: skip
    few = mask is extra_kv is order is key_mask is lepe is context_size is key_window_size is None and shared_q is False  # type: ignore[comparison-overlap]
    if not few or partition != "block" or normalizer != "softmax" or context_border != "pad":
        options |= {
            "mask": mask, "normalizer": normalizer, "partition": partition, "context_size": context_size,
            "extra_kv": extra_kv, "shared_q": shared_q, "lepe": lepe, "order": order, "key_mask": key_mask,
            "key_window_size": key_window_size, "context_border": context_border,
        }  # fmt: skip
    return _run(None, q, k, v, window_size, shift_size, return_stats, backend, options)


@overload
def window_attention_qkvpacked(  # type: ignore[overload-overlap]
    qkv: Tensor, window_size: Any, shift_size: Any = 0,
    *, return_stats: tuple[()] = (), **options: "Unpack[WindowOptions]",
) -> Tensor: ...  # fmt: skip


@overload
def window_attention_qkvpacked(
    qkv: Tensor, window_size: Any, shift_size: Any = 0,
    *, return_stats: tuple[str, ...], **options: "Unpack[WindowOptions]",
) -> tuple[Tensor, Stats]: ...  # fmt: skip


def window_attention_qkvpacked(
    qkv: Tensor,
    window_size: Any,
    shift_size: Any = 0,
    *,
    return_stats: tuple[str, ...] = (),
    backend: str | None = None,
    **options: Any,
) -> Any:
    """:func:`window_attention` of a packed projection ``qkv [B, *spatial, 3, H, D]`` (any strides).

    The options are those of :func:`window_attention`. The gradient is one packed tensor, so that neither direction
    copies, but for the options that gather the windows.
    """
    if type(qkv) not in _sharded.PLAIN and _sharded.met(qkv):
        return _sharded.call(window_attention_qkvpacked, locals())
    return _run(qkv, *_parts(qkv), window_size, shift_size, return_stats, backend, options)


def _parts(qkv: Any) -> tuple[Tensor, Tensor, Tensor]:
    _checks.tensor(NAME, "qkv", qkv)
    if not 5 <= qkv.dim() <= 8 or qkv.shape[-3] != 3:
        raise ValueError(
            f"{NAME}: qkv must have shape [B, *spatial, 3, heads, head_dim] with 1 to 4 spatial axes, got {list(qkv.shape)}"
        )
    return qkv.unbind(-3)


# Options that the window kernels know in this form alone; any other is for gathered windows.
FURTHER = {
    "mask": None, "normalizer": "softmax", "partition": "block", "context_size": None, "extra_kv": None, "shared_q": False,
    "order": None, "key_mask": None, "key_window_size": None, "context_border": "pad",
}  # fmt: skip


def _run(
    qkv: Tensor | None,
    q: Any,
    k: Any,
    v: Any,
    window: Any,
    shift: Any,
    stats: Any,
    backend: Any,
    options: dict[str, Any],
) -> Any:
    """The call by head groups, by gathered windows, or by the op; `qkv` where q, k and v are parts of one tensor."""
    if _window_groups.are_given(window, shift, options.get("bias")):
        more = {"return_stats": stats, "backend": backend, **options}
        return _window_groups.grouped(window_attention, q, k, v, window, shift, **more)
    lepe = options.pop("lepe", None)
    options = _fewest(options)
    maps, blocks, plain = _seen(qkv, q, k, v, window, shift, stats, options)
    if blocks is None:
        out, found = _window_general.windowed(q, k, v, window, shift, return_stats=stats, backend=backend, **options)
    else:
        args = _lower(maps[1], maps[2], maps[3], blocks, shift, **plain)
        out, lse = _call.run(PLAIN, args, backend) if qkv is None else _call.run(PACKED, (maps[0], *args[3:]), backend)
        if len(plain) < len(options):  # torch 2.10 cannot compile `is not` of dictionaries
            out, lse = (_window_views.joined(t, k.dim() - 3) for t in (out, lse))
        found = Stats(lse=lse)
    if lepe is not None:
        sides, heads = out.shape[1:-2], out.shape[-2]
        values = v.to(out.dtype)
        out = out + _window_groups.added(values, lepe, heads, sides, window, shift, backend=backend, **options)
    return (out, found) if stats else out


def _seen(
    qkv: Any, q: Any, k: Any, v: Any, window: Any, shift: Any, stats: Any, options: dict[str, Any]
) -> tuple[tuple[Any, Any, Any, Any], Any, dict[str, Any]]:
    """qkv, q, k, v, windows and options as the window kernels see them; None for windows that are beyond them."""
    maps = (qkv, q, k, v)
    if not _is_general(q, k, shift, stats, options):
        return maps, window, options
    plain = {name: value for name, value in options.items() if name not in _window_views.VIEWED}
    if len(plain) < len(options) and not _is_general(k, k, shift, stats, plain):
        found = _window_views.as_blocks(maps, window, shift, options)
        if found is not None:
            return found[0], found[1], plain
    return maps, None, options


def _fewest(options: dict[str, Any]) -> dict[str, Any]:
    """The options without those of FURTHER that say nothing."""
    return {name: value for name, value in options.items() if name not in FURTHER or not _is_default(name, value)}


def _is_default(name: str, value: Any) -> bool:
    return value is FURTHER[name] or (isinstance(value, str) and value == FURTHER[name])


def _is_general(q: Any, k: Any, shift: Any, stats: Any, options: dict[str, Any]) -> bool:
    """Whether the call is beyond the window kernels: one softmax of every window over its own tokens."""
    bias = options.get("bias")
    if (
        any(name in FURTHER for name in options)
        or isinstance(shift, Tensor)
        or isinstance(options.get("scale"), Tensor)
    ):
        return True
    if not (bias is None or isinstance(bias, (Tensor, RelativePosition))) or (stats and tuple(stats) != ("lse",)):
        return True
    maps = isinstance(q, Tensor) and isinstance(k, Tensor) and q.dim() == k.dim() > 3
    return maps and q.shape[1:-2] != k.shape[1:-2]


# lowering ---------------------------------------------------------------------------------------------------------------


_lowered: dict[Any, tuple[Any, ...]] = {}  # what checks and sizes alone decide, by everything they depend on


def _lower(
    q: Any,
    k: Any,
    v: Any,
    window_size: Any,
    shift_size: Any = 0,
    *,
    bias: Any = None,
    cosine: Any = None,
    scale: Any = None,
    pad_order: Any = "pad_roll",
    pad_kv: Any = None,
    mask_value: Any = -100.0,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the op. Checks that depend on shapes alone are made once per combination of shapes."""
    if isinstance(window_size, list):
        window_size = tuple(window_size)
    if isinstance(shift_size, list):
        shift_size = tuple(shift_size)
    arguments = (q, k, v, window_size, shift_size, bias, cosine, scale, pad_order, pad_kv, mask_value)
    if torch.compiler.is_compiling():
        fixed = check(*arguments)
    else:
        key = tuple(map(signature, arguments)) + (torch.is_autocast_enabled(),)
        fixed = _lowered.get(key) or _remember(key, arguments)
    window, shift, roll_first, scale, mask_value = fixed
    table, index = bias, None
    if isinstance(bias, RelativePosition):
        table, index = bias.table, bias.rows(tuple(window), q.device)
    elif bias is not None:
        n = math.prod(window)
        table = bias.expand(q.shape[-2], n, n)
    tau, cosine_max, cosine_eps = None, 0.0, 0.0
    if cosine is not None:
        tau, cosine_max, cosine_eps = cosine.logit_scale.reshape(-1), float(cosine.max), float(cosine.eps)
    k_pad, v_pad = pad_kv if isinstance(pad_kv, tuple) else (None, None)
    seed = _dropout.stream(NAME, dropout_p, dropout_seed, q.device)
    options = (
        window,
        shift,
        roll_first,
        pad_kv is not None,
        scale,
        mask_value,
        cosine_max,
        cosine_eps,
        float(dropout_p),
    )
    return (q, k, v, table, index, tau, k_pad, v_pad, seed, *options)


def _remember(key: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(_lowered) >= 4096:
        _lowered.clear()
    _lowered[key] = fixed = check(*arguments)
    return fixed


def _explain(*args: Any, **options: Any) -> Any:
    return _explanation(None, *args, **options)


def _explain_packed(qkv: Tensor, *args: Any, **options: Any) -> Any:
    return _explanation(qkv, *_parts(qkv), *args, **options)


def _explanation(
    qkv: Any,
    q: Any,
    k: Any,
    v: Any,
    window_size: Any,
    shift_size: Any = 0,
    return_stats: Any = (),
    backend: Any = None,
    **options: Any,
) -> Any:
    """Of groups of heads, that of the first."""
    more = {"return_stats": return_stats, "backend": backend}
    if _window_groups.are_given(window_size, shift_size, options.get("bias")):
        return _window_groups.first(_explain, q, k, v, window_size, shift_size, **more, **options)
    options = _fewest({name: value for name, value in options.items() if name != "lepe"})
    maps, blocks, plain = _seen(qkv, q, k, v, window_size, shift_size, return_stats, options)
    if blocks is None:
        return _window_general.explanation(q, k, v, window_size, shift_size, **more, **options)
    args = _lower(maps[1], maps[2], maps[3], blocks, shift_size, **plain)
    if qkv is None:
        return _call.explanation(NAME, PLAIN, args, backend)
    return _call.explanation(NAME, PACKED, (maps[0], *args[3:]), backend)


# the ops ----------------------------------------------------------------------------------------------------------------


def _packed_definition(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(-3)
    return definition(q, k, v, *rest)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    accumulate = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=accumulate)


def _packed_fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(*qkv.unbind(-3), *rest)


PLAIN = Op(
    NAME,
    ("Tensor q", "Tensor k", "Tensor v", *OPTION_TENSORS),
    OPTIONS,
    differentiable=(0, 1, 2, 3, 5, 6, 7),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=_window_gpu.PLAIN,
)
PACKED = Op(
    f"{NAME}_qkvpacked",
    ("Tensor qkv", *OPTION_TENSORS),
    OPTIONS,
    differentiable=(0, 1, 3, 4, 5),
    batched=1,
    definition=_packed_definition,
    fake=_packed_fake,
    gpu=_window_gpu.PACKED,
)
PLAIN.register()
PACKED.register()
window_attention.explain = _explain  # type: ignore[attr-defined]
window_attention_qkvpacked.explain = _explain_packed  # type: ignore[attr-defined]
