"""window_attention with options beyond one softmax of a window over itself: the windows are gathered, `attention` runs on their
rows, and its rows are put back."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import KeyBias, RelativePosition
from vitkern.mask import Segments
from vitkern.ops import _call, _checks
from vitkern.ops import _window_general_checks as checks
from vitkern.ops import _window_places as where
from vitkern.ops._dropout import Stream
from vitkern.ops.attention import attention
from vitkern.ops.window_rows import blank_rows, window_rows, window_sum
from vitkern.stats import Stats

NOTE = "the windows are gathered in front of attention, and its rows put back"


@dataclass(frozen=True)
class Layout:
    """Where queries and keys stand: axes and tables of each, and the shift of every image where they differ."""

    q_axes: tuple[where.Axis, ...]
    k_axes: tuple[where.Axis, ...]
    q: where.Places
    k: where.Places
    shifts: Tensor | None

    @property
    def window(self) -> tuple[int, ...]:
        return tuple(a.cells for a in self.q_axes)

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(a.cells for a in self.k_axes)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(a.length for a in self.q_axes)


def windowed(*args: Any, backend: str | None = None, **options: Any) -> tuple[Tensor, Stats]:
    """out and the statistics; the arguments are those of window_attention without lepe and groups."""
    layout, rows, given = prepare(*args, backend=backend, **options)
    found = attention(*rows, **given, backend=backend)
    out, stats = found if given["return_stats"] else (found, Stats())
    quiet, found = _call.beside(backend), stats._asdict()
    for name, places, lengths in (
        ("lse", layout.q, layout.lengths),
        ("key_mean", layout.k, [a.length for a in layout.k_axes]),
    ):
        t = found[name]
        if t is not None:
            t = t[:, : math.prod(places.cells), :, None]  # without the further keys
            found[name] = window_sum(t, places, lengths, backend=quiet)[0][..., 0]
    return window_sum(out, layout.q, layout.lengths, backend=quiet)[0], Stats(**found)


def explanation(*args: Any, backend: str | None = None, **options: Any) -> Any:
    _, rows, given = prepare(*args, backend=backend, move=blank_rows, **options)
    chosen, reasons, *notes = attention.explain(*rows, **given, backend=backend)  # type: ignore[attr-defined]
    return chosen, reasons, [NOTE, *(note for each in notes for note in each)]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: Any,
    shift_size: Any = 0,
    *,
    bias: Any = None,
    mask: Any = None,
    key_mask: Tensor | None = None,
    cosine: Any = None,
    scale: Any = None,
    normalizer: str = "softmax",
    partition: str = "block",
    context_size: Any = None,
    context_border: str = "pad",
    key_window_size: Any = None,
    pad_order: str = "pad_roll",
    pad_kv: Any = None,
    mask_value: float | None = -100.0,
    extra_kv: Any = None,
    shared_q: bool = False,
    order: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    return_stats: tuple[str, ...] = (),
    backend: str | None = None,
    move: Callable[..., Tensor] = window_rows,
) -> tuple[Layout, tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """The layout, the rows of q, k and v by `move`, and the other arguments of `attention`."""
    checks.tensors(q, k, v, shared_q)
    checks.options(k, v, partition, pad_order, pad_kv, mask_value, extra_kv, key_mask, return_stats, context_size)
    if _checks.autocast(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    lengths = k.shape[1:-2] if shared_q else q.shape[1:-2]
    q_axes, k_axes = checks.axes(
        lengths,
        k.shape[1:-2],
        window_size,
        shift_size,
        partition,
        context_size,
        context_border,
        key_window_size,
        pad_order,
    )
    shifts = shift_size if isinstance(shift_size, Tensor) else None
    layout = _layout(q_axes, k_axes, shifts, order, len(k), q.device)
    windows, n, quiet = math.prod(layout.q.counts), math.prod(layout.window), _call.beside(backend)
    if shared_q:
        checks.shared(q, layout.window)
        q_rows = q.flatten(1, -3)[:, None].expand(-1, windows, -1, -1, -1).flatten(0, 1)  # [B W, N, H, D]
    else:
        q_rows = move(q, layout.q, backend=quiet)
    k_pad, v_pad = pad_kv if isinstance(pad_kv, tuple) else (None, None)
    rows = (
        q_rows,
        move(k, layout.k, k_pad, backend=quiet),
        move(v, layout.k, v_pad, backend=quiet),
    )
    biases, masks = _listed(bias), _listed(mask)
    checks.biases(biases)
    biases = [_for_rows(b, layout, context_size is not None, q.device) for b in biases]
    hidden = _hidden(layout, key_mask, pad_kv is None, len(k))
    acc = torch.promote_types(q.dtype, torch.float32)
    if hidden is not None:
        gone = torch.zeros_like(hidden, dtype=acc).masked_fill(hidden, -math.inf)
        biases.append(KeyBias(gone[:, None]))
    if shifts is not None or any(a.shift for a in q_axes):
        code = where.regions(q_axes, shifts, q.device)  # [1|B, W, N]
        code = code.expand(len(k), -1, -1).flatten(0, 1)  # [B W, N]
        if mask_value is None:
            masks.append(Segments(code, code))
        elif mask_value != 0:
            differs = code[:, None, :, None] != code[:, None, None, :]
            biases.append(differs.to(acc) * mask_value)
    if extra_kv is not None:
        extra_kv = tuple(t if len(t) == 1 else t.repeat_interleave(windows, 0) for t in extra_kv)
    weight = None
    if "key_mean" in return_stats and not _whole(q_axes):
        real = where.real(layout.q).to(acc)  # pads ask nothing
        weight = real.expand(len(k), windows, n).flatten(0, 1)
    if dropout_p:
        drawn = dropout_seed if isinstance(dropout_seed, Stream) else Stream(dropout_seed)
        token = where.tokens(layout.q, list(lengths)).clamp(min=0)  # [1|B, W, N]
        images = torch.arange(len(k), device=q.device)[:, None, None]
        dropout_seed = drawn._replace(places=(images << 32) + token)
    given = {
        "bias": biases or None, "mask": masks or None, "cosine": cosine, "scale": scale, "normalizer": normalizer,
        "extra_kv": extra_kv, "dropout_p": dropout_p, "dropout_seed": dropout_seed,
        "return_stats": tuple(return_stats), "query_weight": weight,
    }  # fmt: skip
    return layout, rows, given


def _layout(q_axes: Any, k_axes: Any, shifts: Any, order: Any, batch: int, device: torch.device) -> Layout:
    q_places = where.places(q_axes, device)
    k_places = q_places if k_axes == q_axes else where.places(k_axes, device)
    lengths = [a.length for a in q_axes]
    if order is not None:
        checks.order(order, batch, lengths, k_axes == q_axes, device)
        q_places = k_places = where.ordered(q_places, order)
    if shifts is not None:
        checks.shifts(shifts, batch, q_axes, k_axes == q_axes, device)
        q_places = k_places = where.rolled(q_places, shifts, lengths)
    return Layout(q_axes, k_axes, q_places, k_places, shifts)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _whole(axes: tuple[where.Axis, ...]) -> bool:
    """Whether a token stands in every place."""
    return all(a.clamp or (a.step is None and a.count * a.cells == a.length) for a in axes)


def _hidden(layout: Layout, key_mask: Tensor | None, no_pads: bool, batch: int) -> Tensor | None:
    """The keys that nobody sees, bool [B W, M]."""
    gone = None
    if no_pads and not _whole(layout.k_axes):
        gone = ~where.real(layout.k)  # [1|B, W, M]
    if key_mask is not None:
        token = where.tokens(layout.k, list(key_mask.shape[1:]))  # [1|B, W, M]
        flat = key_mask.flatten(1)  # [B, T]
        seen = flat.gather(1, token.clamp(min=0).flatten(1).expand(batch, -1)).reshape(batch, *token.shape[1:])
        seen = seen | (token < 0)
        gone = ~seen if gone is None else gone | ~seen
    return None if gone is None else gone.expand(batch, -1, -1).flatten(0, 1)


def _for_rows(b: Any, layout: Layout, halo: bool, device: torch.device) -> Any:
    """A bias as `attention` takes it: a table of offsets gets the grid of the window, or the rows of its pairs."""
    if not isinstance(b, RelativePosition) or b.index is not None:
        return b
    if b.prefix_tokens or b.q_stride != 1:
        checks.plain_table(b)
    if layout.window == layout.keys and not halo:
        return dataclasses.replace(b, grid=tuple(b.grid or layout.window))
    checks.halo_table(b, layout.window, layout.keys, halo)
    return RelativePosition(b.table, halo_index(layout.window, layout.keys, b.sign, device))


def halo_index(window: tuple[int, ...], halo: tuple[int, ...], sign: str, device: torch.device) -> Tensor:
    """The row of the table of every pair of a query of the window and a key of its halo, [N, M] int32: w + c - 1 rows an axis."""
    index = torch.zeros((1,) * (2 * len(window)), dtype=torch.int32, device=device)  # [w..., c...]
    for a, (w, c) in enumerate(zip(window, halo, strict=True)):
        i, j = (torch.arange(n, dtype=torch.int32, device=device) for n in (w, c))
        offset = i[:, None] - j + c - 1 if sign == "query-key" else j - i[:, None] + w - 1
        shape = [1] * (2 * len(window))
        shape[a], shape[len(window) + a] = w, c
        index = index * (w + c - 1) + offset.reshape(shape)
    return index.reshape(math.prod(window), math.prod(halo))
