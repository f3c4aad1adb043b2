"""NATTEN's two-step functions, which it dropped in 0.20, for code that still calls them.

Maps lie heads first, ``[B, heads, *spatial, head_dim]``; the caller scales q. :func:`stand_in` lets transformers build its DiNAT
models where NATTEN is not installed; :func:`vitkern.patch` then serves their attention.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vitkern.ops.neighborhood_attention import neighborhood_av, neighborhood_qk

__all__ = ["natten1dav", "natten1dqkrpb", "natten2dav", "natten2dqkrpb", "natten3dav", "natten3dqkrpb", "stand_in"]


def _scores(axes: int) -> Callable[..., Tensor]:
    def function(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Any, dilation: Any) -> Tensor:
        _check(f"natten{axes}dqkrpb", axes, query=query, key=key)
        q, k = (t.movedim(1, -2) for t in (query, key))
        return neighborhood_qk(q, k, kernel_size, dilation=dilation, rpb=rpb, scale=1.0).movedim(-2, 1)

    function.__name__ = f"natten{axes}dqkrpb"
    function.__doc__ = (
        f"Scores ``[B, heads, *spatial, n]`` over the {axes} axes of a map, with `rpb` where it is not None."
    )
    return function


def _values(axes: int) -> Callable[..., Tensor]:
    def function(attn: Tensor, value: Tensor, kernel_size: Any, dilation: Any) -> Tensor:
        _check(f"natten{axes}dav", axes, attn=attn, value=value)
        a, v = (t.movedim(1, -2) for t in (attn, value))
        return neighborhood_av(a, v, kernel_size, dilation=dilation).movedim(-2, 1)

    function.__name__ = f"natten{axes}dav"
    function.__doc__ = f"Weights ``[B, heads, *spatial, n]`` over the {axes} axes of a map, applied to its values."
    return function


def _check(name: str, axes: int, **tensors: Tensor) -> None:
    for argument, t in tensors.items():
        if t.dim() != axes + 3:
            raise ValueError(
                f"{name}: {argument} must have shape [B, heads, *{axes} axes, head_dim], got {list(t.shape)}"
            )


natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_scores(axes) for axes in (1, 2, 3))
natten1dav, natten2dav, natten3dav = (_values(axes) for axes in (1, 2, 3))


def stand_in() -> None:
    """Makes transformers build and run DiNAT on these functions, for the life of the process; nothing happens where NATTEN
    is installed with them. Its own forward (5.x) swaps height and width, so patch the model too."""
    from transformers.models.dinat import modeling_dinat
    from transformers.utils import import_utils

    try:
        from natten.functional import natten2dqkrpb as _installed  # noqa: F401
    except ImportError:
        _, message = import_utils.BACKENDS_MAPPING["natten"]
        import_utils.BACKENDS_MAPPING["natten"] = (lambda: True, message)
        modeling_dinat.natten2dqkrpb, modeling_dinat.natten2dav = natten2dqkrpb, natten2dav
