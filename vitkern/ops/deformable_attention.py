"""deformable_attention: argument checks, lowering, and the op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _sharded
from vitkern.ops._deformable_cuda import CUDA
from vitkern.ops._gpu import Gpu
from vitkern.ops._op import Op
from vitkern.reference.deformable_attention import deformable_attention as definition

NAME = "deformable_attention"
METHODS = ("bilinear", "nearest")


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    method: str = "bilinear",
    points_per_level: Sequence[int] | None = None,
    normalize_weights: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-scale deformable attention (Zhu et al. 2021): every query and head reads a few places of maps of several sizes.

    .. math:: \text{out}_{ih} = \sum_l \sum_p A_{ihlp}\, \text{value}_{lh}(x_{ihlp} W_l - 1/2,\; y_{ihlp} H_l - 1/2)

    A place between four cells is their bilinear mean; cells outside the level count 0. A location that is NaN, infinite or a
    whole cell outside the level counts 0 and has gradient 0.

    Args:
        value: ``[B, S, H, D]``: the levels one behind the other, each row by row. Any strides.
        spatial_shapes: ``((H_0, W_0), ...)``, together S cells. An int64 tensor ``[L, 2]`` is read, which on a GPU waits for it.
        sampling_locations: ``[B, N, H, L, P, 2]``: (x, y), where 0 and 1 are the outer edges of the level. Any strides; float32
            beside a half-precision value keeps the places exact, and they are computed in float32 at least.
        attention_weights: ``[B, N, H, L, P]``, taken as they are.
        method: ``"bilinear"``, or ``"nearest"``, the discrete sampling of RT-DETRv2 and D-FINE: the cell
            ``(floor(y H + 1/2), floor(x W + 1/2))``, held inside the level, without a gradient to the locations. It is half a
            cell away from ``grid_sample(mode="nearest")``.
        points_per_level: the points of each level where they differ; locations are then ``[B, N, H, J, 2]`` and weights
            ``[B, N, H, J]``, level behind level, J their sum.
        normalize_weights: whether the weights are logits, and a softmax in float32 over all points of a query and head is taken.
        backend: ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; raises with all reasons if it cannot run.

    Returns:
        ``[B, N, H, D]`` in the dtype of value, summed in float32 (float64 for a float64 value) and rounded once. Gradients go to
        value, locations and weights; they are the same bits in every run.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(value) not in _sharded.PLAIN and _sharded.met(value):
        return _sharded.call(deformable_attention, locals())
    args = _lower(
        value, spatial_shapes, sampling_locations, attention_weights, method, points_per_level, normalize_weights
    )
    return _call.run(OP, args, backend)


def _lower(
    value: Any,
    spatial_shapes: Any,
    sampling_locations: Any,
    attention_weights: Any,
    method: Any = "bilinear",
    points_per_level: Any = None,
    normalize_weights: Any = False,
) -> tuple[Any, ...]:
    """The arguments of the op: locations [B, N, H, G, Q, 2] and weights [B, N, H, G, Q] with G Q points."""
    _checks.tensor(NAME, "value", value)
    for name, t in (
        ("value", value),
        ("sampling_locations", sampling_locations),
        ("attention_weights", attention_weights),
    ):
        _checks.parameter(NAME, name, t, value.device, "value")
    if value.dim() != 4:
        raise ValueError(f"{NAME}: value must have shape [B, S, H, D], got {list(value.shape)}")
    if not 1 <= value.shape[3] <= 256 or value.shape[2] < 1:
        raise ValueError(
            f"{NAME}: value must have at least one head and a head size of 1 to 256, got {list(value.shape)}"
        )
    shapes = _shapes(spatial_shapes, value.shape[1])
    levels = len(shapes) // 2
    if method not in METHODS:
        raise ValueError(f"{NAME}: method must be 'bilinear' or 'nearest', got {method!r}")
    if not isinstance(normalize_weights, bool):
        raise TypeError(f"{NAME}: normalize_weights must be a bool, got {normalize_weights!r}")
    locations, points = sampling_locations, _points(points_per_level, levels)
    text = "[B, N, H, L, P, 2]" if points is None else "[B, N, H, J, 2]"
    if locations.dim() != (6 if points is None else 5) or locations.shape[-1] != 2:
        raise ValueError(
            f"{NAME}: sampling_locations must have shape {text}, the last axis (x, y), got {list(locations.shape)}"
        )
    if (locations.shape[0], locations.shape[2]) != (value.shape[0], value.shape[2]):
        raise ValueError(
            f"{NAME}: sampling_locations must have the batch and heads of value, {value.shape[0]} and {value.shape[2]}, "
            f"got {list(locations.shape)}"
        )
    _checks.shape(
        NAME, "attention_weights", attention_weights, locations.shape[:-1], "that of sampling_locations without (x, y)"
    )
    if points is None:
        if locations.shape[3] != levels:
            raise ValueError(
                f"{NAME}: sampling_locations must have the {levels} levels of spatial_shapes, got {list(locations.shape)}"
            )
        points = [locations.shape[4]] * levels
    else:
        if locations.shape[3] != sum(points):
            raise ValueError(
                f"{NAME}: sampling_locations must have the {sum(points)} points of points_per_level, "
                f"got {list(locations.shape)}"
            )
        locations, attention_weights = locations.unsqueeze(3), attention_weights.unsqueeze(3)
    return value, locations, attention_weights, shapes, points, method == "nearest", normalize_weights


def _shapes(given: Any, cells: int) -> list[int]:
    """Heights and widths in turn, whose cells are those of value."""
    if isinstance(given, Tensor):
        _checks.integers(NAME, "spatial_shapes", given)
        given = given.tolist()
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError(f"{NAME}: spatial_shapes must hold one (height, width) for each level, got {given!r}")
    flat: list[int] = []
    for pair in given:
        if not isinstance(pair, (list, tuple, torch.Size)) or len(pair) != 2:
            raise TypeError(f"{NAME}: spatial_shapes must hold one (height, width) for each level, got {pair!r}")
        flat += [_checks.integer(NAME, "a side of spatial_shapes", side, 1) for side in pair]
    total = sum(height * width for height, width in zip(flat[::2], flat[1::2], strict=True))
    if total != cells:
        raise ValueError(f"{NAME}: the levels of spatial_shapes have {total} cells, but value has {cells}")
    return flat


def _points(given: Any, levels: int) -> list[int] | None:
    if given is None:
        return None
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"{NAME}: points_per_level must hold one int for each level, got {given!r}")
    if len(given) != levels:
        raise ValueError(f"{NAME}: points_per_level must hold one int for each of the {levels} levels, got {given!r}")
    return [_checks.integer(NAME, "an entry of points_per_level", n, 0) for n in given]


# the op -----------------------------------------------------------------------------------------------------------------


class _Sampling(Op):
    """Under autocast only the value is cast: a place in half precision is off by a good part of a cell."""

    def cast(self, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
        value, *others = args
        narrow = value.dtype != torch.float64
        return (value.to(torch.get_autocast_dtype(device)) if narrow else value, *others)


def _fake(value: Tensor, locations: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((*locations.shape[:3], value.shape[3]))


def _triton() -> Any:
    from vitkern.triton_kernels import deformable_attention as kernels

    return kernels


def _explain(*args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    return _call.explanation(NAME, OP, _lower(*args, **options), backend)


OP = _Sampling(
    NAME,
    ("Tensor value", "Tensor locations", "Tensor weights"),
    "SymInt[] shapes, SymInt[] points, bool nearest, bool normalize, str gpu",
    differentiable=(0, 1, 2),
    batched=3,
    definition=definition,
    fake=_fake,
    gpu=Gpu(_triton, CUDA),
    outputs=("out",),
)
OP.register()
deformable_attention.explain = _explain  # type: ignore[attr-defined]
