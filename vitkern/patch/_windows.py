"""What the libraries' Swin blocks share: reasons to refuse one, heads and pads of a projection, one attention call."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition, offset_index
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked

_SWIN_PARTS = {"attn": "WindowAttention", "attn.qkv": nn.Linear, "attn.attn_drop": nn.Dropout}

# reasons --------------------------------------------------------------------------------------------------------------


def version_refusal(library: str, version: str, first: tuple[int, ...], series: int) -> str | None:
    """Refuses versions before `first`, and those that differ from it in the leading `series` numbers."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[: len(first)])
    if numbers >= first and numbers[:series] == first[:series]:
        return None
    known = f"{'.'.join(map(str, first))} to {'.'.join(map(str, first[:series]))}.x"
    return f"{library} {version} is not a known version ({known})"


def part_refusal(block: nn.Module, parts: Mapping[str, str | type] = _SWIN_PARTS) -> str | None:
    """Refuses a block a part of which, that the op takes over, was replaced: a class, or the one of that name in its own file."""
    for path, kind in parts.items():
        wanted = f"{type(block).__module__}.{kind}" if isinstance(kind, str) else _name(kind)
        found = _name(type(block.get_submodule(path)))
        if found != wanted:
            return f"{path} is a {found}, not a {wanted}"
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def shift_refusal(window: Sequence[int], shift: Sequence[int]) -> str | None:
    """Refuses a shift that the op does not take."""
    if all(0 <= s < w for w, s in zip(window, shift, strict=True)):
        return None
    return f"the shift {list(shift)} is not between 0 and the window {list(window)}"


def index_refusal(index: Tensor, window: Sequence[int]) -> str | None:
    """Refuses an index buffer, [N, N] or flattened, other than Swin's of this window: the op computes Swin's."""
    swin = offset_index(tuple(window), "query-key", torch.device("cpu"))
    if index.is_meta or torch.equal(index.cpu().int().flatten(), swin.flatten()):
        return None
    return "relative_position_index is not that of Swin"


# calls ----------------------------------------------------------------------------------------------------------------


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., C] as [..., heads, C / heads]."""
    return x.unflatten(-1, (heads, -1))


def pad_of(linear: nn.Linear, heads: int) -> Tensor | None:
    """What a zero-padded token becomes after this projection, [heads, head_dim]; None is zero."""
    return None if linear.bias is None else linear.bias.view(heads, -1)


def separate(
    x: Tensor, q: nn.Linear, k: nn.Linear, v: nn.Linear, heads: int, window: Any, shift: Any, **options: Any
) -> Tensor:
    """Window attention of a map x [B, *spatial, C] through three projections; pads are those of the projected zero."""
    out = window_attention(
        split_heads(q(x), heads),
        split_heads(k(x), heads),
        split_heads(v(x), heads),
        window,
        shift,
        pad_kv=(pad_of(k, heads), pad_of(v, heads)),
        **options,
    )
    return out.flatten(-2)


def packed(
    qkv: Tensor, k_bias: Tensor | None, v_bias: Tensor | None, heads: int, window: Any, shift: Any, **options: Any
) -> Tensor:
    """Window attention of a projected map [B, *spatial, 3 C]. A zero-padded token became its biases [C]; None is 0."""
    pads = tuple(None if bias is None else split_heads(bias, heads) for bias in (k_bias, v_bias))
    out = window_attention_qkvpacked(qkv.unflatten(-1, (3, heads, -1)), window, shift, pad_kv=pads, **options)
    return out.flatten(-2)


def thirds(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """The biases of q, k and v in that of a packed projection, [3 C]."""
    return (None, None, None) if bias is None else bias.chunk(3)


def without_key_bias(q_bias: Tensor, v_bias: Tensor) -> Tensor:
    """The bias of a packed projection whose keys have none (Swin V2)."""
    return torch.cat((q_bias, torch.zeros_like(v_bias), v_bias))


def undropped_refusal(module: Any, op: str) -> str | None:
    """Why a module that drops weights in training keeps its own forward there, where the op drops none."""
    drop = getattr(module, "attn_drop", None)
    if drop is None or not drop.p or not module.training:
        return None
    return f"attn_drop is {drop.p} in training, and {op} drops no weights"


def dropout_rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def clamp_window(
    size: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift on a map: an axis not longer than its window is one window and does not shift (Video Swin)."""
    fits = [length > w for length, w in zip(size, window, strict=True)]
    return (
        tuple(w if fit else length for fit, length, w in zip(fits, size, window, strict=True)),
        tuple(s if fit else 0 for fit, s in zip(fits, shift, strict=True)),
    )


def leading_table(table: Tensor, configured: Sequence[int], window: Sequence[int]) -> RelativePosition:
    """The table of the configured window on a smaller one, by the first rows and columns of the configured index: what
    Video Swin reads, which is the offset of two tokens only where the first axis alone is smaller.
    """
    configured, tokens = tuple(configured), torch.Size(window).numel()
    if configured == tuple(window):
        return RelativePosition(table)
    read = _leading_index if torch.compiler.is_compiling() else _cached_leading_index
    return RelativePosition(table, read(configured, tokens, table.device))


def _leading_index(configured: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    return offset_index(configured, "query-key", device)[:tokens, :tokens].contiguous()


@lru_cache(maxsize=64)
def _cached_leading_index(configured: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor born in inference mode could not be used in training later
        return _leading_index(configured, tokens, device)


def continuous_table(mlp: nn.Module, coordinates: Tensor) -> Tensor:
    """The table 16 sigmoid(MLP(log-spaced offsets)) of Swin V2, [R, H]: one row per offset, so that the MLP runs on few rows."""
    return 16 * torch.sigmoid(mlp(coordinates).flatten(0, -2))
