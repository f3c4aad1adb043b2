"""Windows of a map that they divide, as block windows of a view with two axes for each: nothing is gathered, in any kernel."""

from typing import Any

from torch import Tensor, nn

from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked


def split(x: Tensor, rows: int, columns: int) -> Tensor:
    """[B, H, W, ...] as [B, H / rows, rows, W / columns, columns, ...]."""
    return x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))


def joined(x: Tensor) -> Tensor:
    """[B, a, b, c, d, ...] as the map [B, a b, c d, ...]."""
    return x.flatten(3, 4).flatten(1, 2)


def partitioned(qkv: Tensor, window: tuple[int, int], grid: bool, **options: Any) -> Tensor:
    """Attention of a packed map ``[B, H, W, 3, heads, D]`` in windows of neighbours or, with `grid`, of tokens that lie evenly over
    the map: of n windows along an axis, window i has the tokens i, i + n, i + 2 n (MaxViT, Tu et al. 2022)."""
    if not grid:
        return window_attention_qkvpacked(qkv, window, **options)  # type: ignore[return-value]
    height, width = qkv.shape[1:3]
    view = split(qkv, height // window[0], width // window[1])
    return joined(window_attention_qkvpacked(view, (window[0], 1, window[1], 1), **options))  # type: ignore[arg-type]


def with_shared_queries(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attention of the same queries ``[B, *window, heads, D]`` in every window of the map of k and v (GC ViT)."""
    window = q.shape[1:3]
    keys, values = split(k, *window), split(v, *window)
    queries = q[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3], -1, -1, -1)
    return joined(window_attention(queries, keys, values, (1, window[0], 1, window[1]), **options))  # type: ignore[arg-type]


def check_divides(module: nn.Module, window: tuple[int, int], x: Tensor) -> None:
    """Refuses a map [B, H, W, C] that windows do not divide."""
    if any(length % w for w, length in zip(window, x.shape[1:3], strict=True)):
        raise ValueError(
            f"{type(module).__name__}: windows {list(window)} must divide the map, got {list(x.shape[1:3])}"
        )
