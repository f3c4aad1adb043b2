"""The private ops of the CUDA C++ kernels: their schemas, and where they are found."""

from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern.ops._gpu import Cuda
from vitkern.ops._op import library

ops: Any = torch.ops.vitkern  # tests put emulated ones here
schemas: list[str] = []


def define(*found: str) -> None:
    for schema in found:
        library.define(schema)
    schemas.extend(found)


define(
    "_bipartite_match_cuda(Tensor metric, Tensor? role, Tensor? segments, SymInt protect, SymInt[] window, bool cosine, "
    "float eps, Tensor(a!) score, Tensor(b!) dst, Tensor(c!) role_out) -> ()",
    "_merge_plan_cuda(Tensor score, Tensor dst, Tensor role, Tensor? r, Tensor? threshold, SymInt most, SymInt order, "
    "Tensor(a!) token_map, Tensor(b!) perm, Tensor(c!) offsets, Tensor(d!) lengths) -> ()",
    "_merge_tokens_cuda(Tensor x, Tensor token_map, Tensor perm, Tensor offsets, Tensor? weight, SymInt reduce, "
    "bool include_dst, Tensor(a!) y, Tensor(b!) size) -> ()",
    "_merge_tokens_cuda_bwd(Tensor? dy, Tensor? dsize, Tensor x, Tensor token_map, Tensor perm, Tensor offsets, "
    "Tensor? weight, SymInt reduce, bool include_dst, Tensor(a!)? dx, Tensor(b!)? dweight) -> ()",
    "_unmerge_tokens_cuda(Tensor y, Tensor token_map, Tensor perm, Tensor offsets, float fill, Tensor(a!) x) -> ()",
)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAN_TOKENS, SCORE_TOKENS = 16384, 4096
ORDERS = ("split", "score", "position")
MLERP_WIDTH = 8192
REDUCTIONS = ("mean", "sum", "max", "first", "mlerp")


def _rows_refusals(x: Tensor, *others: Tensor | None) -> list[str]:
    reasons = []
    if x.dtype not in TYPES:
        reasons.append(f"the dtype must be float32, bfloat16 or float16, it is {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        reasons.append(f"the last dimension must be contiguous, its stride is {x.stride(-1)}")
    reasons += [f"weights must not be {t.dtype}" for t in others if t is not None and t.dtype == torch.float64]
    missing = backends.load("_cuda")
    return [*reasons, missing] if missing else reasons


def match_refusals(args: tuple[Any, ...]) -> list[str]:
    return _rows_refusals(args[0])


def match(
    metric: Tensor, role: Any, segments: Any, protect: int, window: list[int], cosine: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    score, dst, found = (metric.new_empty(metric.shape[:2], dtype=t) for t in (torch.float32, torch.int32, torch.int8))
    role, segments = (None if t is None else t.contiguous() for t in (role, segments))
    ops._bipartite_match_cuda(metric, role, segments, protect, window, cosine, eps, score, dst, found)
    return score, dst, found


def plan_refusals(args: tuple[Any, ...]) -> list[str]:
    tokens, order = args[0].shape[1], args[7]
    most = SCORE_TOKENS if order == "score" else PLAN_TOKENS
    reasons = [] if tokens <= most else [f"order={order!r} takes at most {most} tokens, there are {tokens}"]
    missing = backends.load("_cuda")
    return [*reasons, missing] if missing else reasons


def plan(
    score: Tensor, dst: Tensor, role: Tensor, r: Any, threshold: Any, most: int, n_out: int, order: str
) -> tuple[Tensor, ...]:
    batch, tokens = score.shape
    shapes = ((batch, tokens), (batch, tokens), (batch, n_out + 1), (batch,))
    outputs = tuple(score.new_empty(shape, dtype=torch.int32) for shape in shapes)
    inputs = (t.contiguous() for t in (score, dst, role))
    ops._merge_plan_cuda(*inputs, r, threshold, most, ORDERS.index(order), *outputs)
    return outputs


def merge_refusals(args: tuple[Any, ...]) -> list[str]:
    wide = args[5] == "mlerp" and args[0].shape[2] > MLERP_WIDTH
    reasons = [f"reduce='mlerp' takes at most {MLERP_WIDTH} channels, there are {args[0].shape[2]}"] if wide else []
    return reasons + _rows_refusals(args[0], args[4])


def merge(
    x: Tensor, token_map: Tensor, perm: Tensor, offsets: Tensor, weight: Any, reduce: str, include_dst: bool
) -> tuple[Tensor, Tensor]:
    slots = offsets.shape[1] - 1
    y, size = x.new_empty((x.shape[0], slots, x.shape[2])), x.new_empty((x.shape[0], slots), dtype=torch.float32)
    ops._merge_tokens_cuda(x, token_map, perm, offsets, _weight(weight), REDUCTIONS.index(reduce), include_dst, y, size)
    return y, size


def merge_backward(
    dy: Any, dsize: Any, _size: Tensor, x: Tensor, token_map: Tensor, perm: Tensor, offsets: Tensor, weight: Any, reduce: str,
    include_dst: bool, need: int,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    dx = x.new_empty(x.shape) if need & 1 else None
    dweight = x.new_empty(weight.shape, dtype=torch.float32) if need & 2 else None
    given = (None if dy is None else dy.contiguous(), None if dsize is None else dsize.float().contiguous())
    ops._merge_tokens_cuda_bwd(
        *given, x, token_map, perm, offsets, _weight(weight), REDUCTIONS.index(reduce), include_dst, dx, dweight
    )
    return dx, None if dweight is None else dweight.to(weight.dtype)


def _weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.float().contiguous()


def unmerge_refusals(args: tuple[Any, ...]) -> list[str]:
    return _rows_refusals(args[0])


def unmerge(y: Tensor, token_map: Tensor, perm: Tensor, offsets: Tensor, fill: float) -> Tensor:
    x = y.new_empty((*token_map.shape, y.shape[2]))
    ops._unmerge_tokens_cuda(y, token_map, perm, offsets, fill, x)
    return x


def unmerge_backward(
    dx: Tensor, y: Tensor, token_map: Tensor, perm: Tensor, offsets: Tensor, fill: float, need: int
) -> Tensor | None:
    if not need & 1:
        return None
    return merge(dx.contiguous(), token_map, perm, offsets, None, "sum", True)[0]


MATCH = Cuda(match_refusals, match)
PLAN = Cuda(plan_refusals, plan)
MERGE = Cuda(merge_refusals, merge, merge_backward)
UNMERGE = Cuda(unmerge_refusals, unmerge, unmerge_backward)
