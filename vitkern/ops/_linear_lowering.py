"""linear_attention: argument checks, and the arguments of the op."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern import feature_map as maps
from vitkern.ops import _checks
from vitkern.ops._attention_modifier_checks import fields
from vitkern.ops._linear_presets import EPS, FORMS, PRESETS, Preset
from vitkern.reference.linear_attention import NORMALIZERS, sequences, softmax_of_keys
from vitkern.rope import LAYOUTS, Rope

NAME = "linear_attention"


@dataclass
class Lowered:
    """One call: tensors as maps cut in windows, and what is left to do with the op."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    key_weight: Tensor | None
    tables: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    cu_q: Tensor | None
    cu_k: Tensor | None
    parameters: tuple[Tensor | None, Tensor | None, Tensor | None]  # of the feature map
    feature_map: str
    rate: float
    normalizer: str
    eps: float
    scale: float
    offset: float
    half: bool
    detach: bool
    shape: tuple[int, ...]  # of the output but its last axis
    pairs: bool = False  # by all pairs of queries and keys, without a state

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the op but the last."""
        own = (
            self.q,
            self.k,
            self.v,
            self.key_mask,
            self.key_weight,
            *self.tables,
            self.cu_q,
            self.cu_k,
            *self.parameters,
        )
        options = (self.feature_map, self.rate, self.normalizer, self.eps, self.scale, self.offset, self.half)
        return (*own, *options, self.detach, self.pairs)


def lower(
    q: Any,
    k: Any,
    v: Any,
    feature_map: Any = None,
    normalizer: Any = None,
    eps: Any = None,
    scale: Any = None,
    key_mask: Any = None,
    key_weight: Any = None,
    offset: Any = None,
    cu_seqlens: Any = None,
    cu_seqlens_k: Any = None,
    window_size: Any = None,
    rope: Any = None,
    rope_order: Any = None,
    preset: Any = None,
) -> tuple[Lowered, Any]:
    """The call for the op, and the object of the feature map where the op's own maps do not hold it."""
    chosen = _preset(preset)
    _check_tensors(q, k, v, cu_seqlens is not None)
    bounds = _check_bounds(cu_seqlens, cu_seqlens_k, q, k)
    cut_q, cut_k = _cuts(q, k, window_size, bounds[0] is not None)
    feature_map = _feature_map(feature_map, preset, chosen, q, k)
    normalizer = chosen.normalizer if normalizer is None else normalizer
    if normalizer not in NORMALIZERS:
        raise ValueError(f"{NAME}: normalizer must be one of {', '.join(map(repr, NORMALIZERS))}, got {normalizer!r}")
    if eps is None:
        eps = chosen.eps if preset is not None and normalizer == chosen.normalizer else EPS[normalizer]
    if scale is None:
        scale = q.shape[-1] ** -0.5 if chosen.scale == "width" else chosen.scale
    if offset is None:
        offset = float(feature_map.A.shape[-1] + 1) if chosen.of_bits else 0.0
    order = _rope_order(rope, chosen.rope_order if rope_order is None else rope_order, q.device)
    if key_mask is not None:
        _checks.tensor(NAME, "key_mask", key_mask)
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{NAME}: key_mask must be bool, True where a key is valid, got {key_mask.dtype}")
        _checks.shape(NAME, "key_mask", key_mask, k.shape[:-2], "k's without heads and channels")
        _checks.on_device(NAME, "key_mask", key_mask, "q", q.device)
        key_mask = cut_k(key_mask)
    if key_weight is not None:
        _checks.parameter(NAME, "key_weight", key_weight, q.device)
        shapes = (tuple(k.shape[:-1]), (*k.shape[:-2], 1))
        if tuple(key_weight.shape) not in shapes:
            raise ValueError(
                f"{NAME}: key_weight must have the shape of k without channels, {list(shapes[0])}, its heads 1 for all, "
                f"got {list(key_weight.shape)}"
            )
        key_weight = cut_k(key_weight.expand(k.shape[:-1]))
    if rope is not None and order == "before":
        turned = [
            rope.turn(t.flatten(1, -3), among).reshape(t.shape) for t, among in ((q, rope.q_range), (k, rope.k_range))
        ]
        q, k = turned
    q, k, v_cut = cut_q(q), cut_k(k), cut_k(v)
    tables: Any = (None,) * 4
    if rope is not None and order == "after":
        tables = _tables(rope, q, k, bounds[0] is not None)
    rate = 0.0
    if isinstance(feature_map, maps.Exp):
        feature_map, rate = "exp", float(feature_map.rate)
    custom = None if isinstance(feature_map, str) else feature_map
    if isinstance(feature_map, str) and feature_map == "softmax" and tables[0] is not None:
        custom = SoftmaxMap()  # with rotated keys the gradient of a column is not a product of states
    lowered = Lowered(
        q, k, v_cut, key_mask, key_weight, tables, *bounds, (None,) * 3,
        feature_map if custom is None else "identity", rate, normalizer,
        _finite("eps", eps), _finite("scale", scale), _finite("offset", offset), rope is not None and rope.layout == "half",
        chosen.detach, tuple(cut_q.shape[:-1]),
    )  # fmt: skip
    if chosen.reweighted and key_weight is None:
        lowered.key_weight = _rala_weight(lowered)
    return lowered, custom


@dataclass(frozen=True)
class SoftmaxMap:
    """The map "softmax" where the op does not make it itself."""

    per_token = False

    def dense(self, x: Tensor, side: str, valid: Tensor | None = None) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if side == "q":
            return x.softmax(-1)
        return softmax_of_keys(x, valid)[0]


def _rala_weight(lowered: Lowered) -> Tensor:
    """RALA (Fan et al. 2024): n softmax_j(D^-1/2 <mean_i phi(q_i), phi(k_j)>) over the valid keys of a sequence."""
    if lowered.cu_q is not None or lowered.q.shape[5] != lowered.k.shape[5]:
        raise NotImplementedError(f"{NAME}: preset='rala' takes no packed sequences and no grouped heads")
    wide = torch.promote_types(lowered.q.dtype, torch.float32)
    a, b = (torch.nn.functional.elu(t.to(wide)) + 1 for t in (lowered.q, lowered.k))
    mean = a.mean((2, 4), keepdim=True)  # [B, Wy, 1, Wx, 1, H, D]
    logits = (mean * b).sum(-1) * a.shape[-1] ** -0.5  # [B, Wy, ky, Wx, kx, H]
    if lowered.key_mask is not None:
        logits = logits.masked_fill(~lowered.key_mask[..., None], -torch.inf)
    flat = sequences(logits)  # [S, N, H]
    count = flat.isfinite().sum(1, keepdim=True)
    weight = (flat.softmax(1) * count).nan_to_num(0.0)
    shape = logits.shape
    return weight.unflatten(0, (shape[0], shape[1], shape[3])).unflatten(3, (shape[2], shape[4])).transpose(2, 3)


# checks -----------------------------------------------------------------------------------------------------------------


def _preset(preset: Any) -> Preset:
    if preset is None:
        return Preset("relu", "sum", EPS["sum"])
    if preset not in PRESETS:
        raise ValueError(f"{NAME}: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset]


def _feature_map(given: Any, preset: Any, chosen: Preset, q: Tensor, k: Tensor) -> Any:
    wanted = chosen.feature_map if given is None else given
    if isinstance(wanted, type):
        raise ValueError(
            f"{NAME}: preset={preset!r} needs feature_map=vitkern.feature_map.{wanted.__name__}(...), got None"
        )
    if isinstance(wanted, str):
        if wanted not in maps.NAMES:
            known = ", ".join(map(repr, maps.NAMES))
            objects = ", ".join(m.__name__ for m in maps.OBJECTS)
            raise ValueError(
                f"{NAME}: feature_map must be one of {known}, or an object of vitkern.feature_map ({objects}), got {wanted!r}"
            )
        return wanted
    if not callable(getattr(wanted, "dense", None)):
        raise TypeError(
            f"{NAME}: feature_map must be a name or an object of vitkern.feature_map, got {type(wanted).__name__}"
        )
    if isinstance(wanted, maps.OBJECTS):
        fields("feature_map", wanted, q.device, NAME)
    for kind, name, choices in (
        (maps.Hedgehog, "form", tuple(FORMS.values())),
        (maps.Focused, "norm", ("width", "head")),
    ):
        if isinstance(wanted, kind) and getattr(wanted, name) not in choices:
            raise ValueError(
                f"{NAME}: {name} of {kind.__name__} must be one of {choices}, got {getattr(wanted, name)!r}"
            )
    form = FORMS.get(preset)
    if form is not None and isinstance(wanted, maps.Hedgehog) and wanted.form != form:
        raise ValueError(f"{NAME}: preset={preset!r} needs Hedgehog(form={form!r}), got {wanted.form!r}")
    for name in ("scale", "power") if isinstance(wanted, (maps.Focused, maps.Polar)) else ():
        t = getattr(wanted, name)
        if isinstance(t, Tensor) and t.numel() != q.shape[-2] * q.shape[-1]:
            raise ValueError(
                f"{NAME}: {name} of {type(wanted).__name__} must have H D = {q.shape[-2] * q.shape[-1]} elements, "
                f"got {list(t.shape)}"
            )
    if isinstance(wanted, (maps.Focused, maps.Polar, maps.Hedgehog, maps.Hash)) and q.shape[-2] != k.shape[-2]:
        raise NotImplementedError(
            f"{NAME}: {type(wanted).__name__} takes as many heads of k as of q, got {k.shape[-2]}"
        )
    return wanted


def _check_tensors(q: Any, k: Any, v: Any, packed: bool) -> None:
    ranks = "[T, heads, channels]" if packed else "[B, N, heads, channels] or [B, Hs, Ws, heads, channels]"
    for name, t in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(NAME, name, t)
        _checks.floating(NAME, name, t)
        if t.dim() not in ((3,) if packed else (4, 5)):
            raise ValueError(f"{NAME}: {name} must have shape {ranks}, got {list(t.shape)}")
        _checks.on_device(NAME, name, t, "q", q.device)
        if t.dtype != q.dtype:
            raise TypeError(f"{NAME}: {name} must have the dtype of q ({q.dtype}), got {t.dtype}")
        if not 1 <= t.shape[-1] <= 256:
            raise ValueError(f"{NAME}: the head size of {name} must be 1 to 256, got {t.shape[-1]}")
    if k.dim() != q.dim():
        raise ValueError(f"{NAME}: k must have the rank of q ({q.dim()}), got {k.dim()}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{NAME}: v must have the shape of k but for its channels, {list(k.shape[:-1])}, got {list(v.shape[:-1])}"
        )
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"{NAME}: k must have the batch of q ({q.shape[0]}), got {k.shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{NAME}: k must have the head size of q ({q.shape[-1]}), got {k.shape[-1]}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{NAME}: the heads of k must divide the heads of q ({heads}), got {kv_heads}")


def _check_bounds(cu_q: Any, cu_k: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if cu_q is None:
        if cu_k is not None:
            raise ValueError(f"{NAME}: cu_seqlens_k must go with cu_seqlens, got it alone")
        return None, None
    own = cu_q if cu_k is None else cu_k
    for name, cu, total in (("cu_seqlens", cu_q, q.shape[0]), ("cu_seqlens_k", own, k.shape[0])):
        _checks.tensor(NAME, name, cu)
        if cu.dtype != torch.int32 or cu.dim() != 1 or len(cu) < 1:
            raise TypeError(f"{NAME}: {name} must be int32 [sequences + 1], got {cu.dtype} {list(cu.shape)}")
        _checks.on_device(NAME, name, cu, "q", q.device)
        _checks.offsets(NAME, name, cu, total, total, name)
    if len(own) != len(cu_q):
        raise ValueError(f"{NAME}: cu_seqlens_k must have the length of cu_seqlens ({len(cu_q)}), got {len(own)}")
    return cu_q.contiguous(), own.contiguous()


class _Cut:
    """Maps of one grid as maps cut in windows."""

    def __init__(self, shape: torch.Size, windows: tuple[int, ...] | None, packed: bool):
        self.shape, self.windows, self.packed = shape, windows, packed

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return x[None, None, None, None]
        if len(self.shape) == 4:
            count = self.windows[0] if self.windows else 1
            return x[:, None, None].unflatten(3, (count, self.shape[1] // count))
        rows, columns = self.windows or (1, 1)
        x = x.unflatten(2, (columns, self.shape[2] // columns))
        return x.unflatten(1, (rows, self.shape[1] // rows))


def _cuts(q: Tensor, k: Tensor, window_size: Any, packed: bool) -> tuple[_Cut, _Cut]:
    if window_size is None:
        return _Cut(q.shape, None, packed), _Cut(k.shape, None, packed)
    if packed:
        raise ValueError(f"{NAME}: window_size must be None with cu_seqlens, got {window_size!r}")
    sides = _checks.per_axis(NAME, "window_size", window_size, q.dim() - 3)
    counts = []
    for axis, side in enumerate(sides):
        length, of_keys = q.shape[1 + axis], k.shape[1 + axis]
        if side < 1 or length % side:
            raise ValueError(f"{NAME}: window_size must divide the map, {list(q.shape[1:-2])}, got {window_size!r}")
        counts.append(length // side)
        if of_keys % max(counts[-1], 1):
            raise ValueError(
                f"{NAME}: the map of k must divide into the {counts[-1]} windows of q, got {list(k.shape[1:-2])}"
            )
    windows = tuple(max(c, 1) for c in counts)
    return _Cut(q.shape, windows, packed), _Cut(k.shape, windows, packed)


def _rope_order(rope: Any, order: Any, device: torch.device) -> str:
    if order not in ("before", "after"):
        raise ValueError(f"{NAME}: rope_order must be 'before' or 'after', got {order!r}")
    if rope is not None:
        if not isinstance(rope, Rope):
            raise TypeError(f"{NAME}: rope must be a vitkern.Rope, got {type(rope).__name__}")
        fields("rope", rope, device, NAME)
        if rope.layout not in LAYOUTS:
            raise ValueError(f"{NAME}: the layout of rope must be one of {LAYOUTS}, got {rope.layout!r}")
    return order


def _tables(rope: Rope, q: Tensor, k: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cos and sin of queries and keys, [S|1, N, H|1, R/2]: one row of tables for each token, those that stay with angle 0."""
    found = []
    for name, x, among in (("q", q, rope.q_range), ("k", k, rope.k_range)):
        tokens, sequences_of = x.shape[2] * x.shape[4], x.shape[0] * x.shape[1] * x.shape[3]
        first, last = among or (0, tokens)
        for table, rest in ((rope.cos, 1.0), (rope.sin, 0.0)):
            if (
                table.dim() != 4
                or not _checks.fits(table.shape[0], sequences_of)
                or not _checks.fits(table.shape[2], x.shape[5])
            ):
                raise ValueError(
                    f"{NAME}: the tables of rope must have shape [B|1, n, H|1, R/2] with B = {sequences_of} and H = {x.shape[5]}, "
                    f"got {list(table.shape)}"
                )
            if 2 * table.shape[3] > x.shape[6]:
                raise ValueError(f"{NAME}: rope turns {2 * table.shape[3]} channels, {name} has {x.shape[6]}")
            count = table.shape[1]
            if not 0 <= first <= last <= tokens or (last - first) % max(count, 1) or (last > first and not count):
                raise ValueError(
                    f"{NAME}: rope must have angles for the tokens {first} to {last} of the {tokens} of {name}, got {count}"
                )
            table = table.repeat(1, (last - first) // max(count, 1), 1, 1)
            found.append(torch.nn.functional.pad(table, (0, 0, 0, 0, first, tokens - last), value=rest))
    return found[0], found[1], found[2], found[3]


def _finite(name: str, value: Any) -> float:
    if not -math.inf < _checks.number(NAME, name, value) < math.inf:
        raise ValueError(f"{NAME}: {name} must be finite, got {value!r}")
    return float(value)
