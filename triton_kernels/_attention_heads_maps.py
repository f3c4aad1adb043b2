"""The gradients of what mixed heads have beside biases: of factors and tables from a map that all samples share, and of positions
from maps of dS of a few samples at a time, never of all.
"""

import torch
from torch import Tensor

from ._attention_bwd_relative import path_gradient
from ._attention_bwd_tables import map_gradient
from ._attention_heads_bwd_tiles import _heads_bias
from ._attention_heads_sums import token_sums
from ._attention_host import TABLES, Call, folded, of_samples, of_tokens, packed, summed
from ._attention_position_sums import map_rows
from ._attention_visits import seen_tiles, shared_strides
from ._reduce import add_parts

PROGRAMS = 2048                         # from so many on, the samples that share a map are not shared out
MOST = 2**26                            # bytes of the maps of dS that stand at once, or one sample
FACTORS = {"gain": 6, "weight": 7, "early_gain": 33, "early_weight": 34}


def _tile_by_tile(shared: dict) -> dict:
    """The arguments of a kernel that asks of each tile whether it is seen, in place of lists."""
    seen = seen_tiles(shared, shared, together=True)
    lists = "visit_ptr", "count_ptr", "visit_strides"
    rest = {name: x for name, x in shared.items() if name not in lists}
    return rest | {"seen_ptr": seen, "seen_strides": shared_strides(seen)}


def dense_gradient(shared: dict, like: Tensor, target: int, most: int = PROGRAMS) -> Tensor:
    """The gradient of a bias or factor with queries and keys, whose place in `terms` is `target`: in chunks of the samples that
    share it where its tiles are too few programs."""
    batch, queries, keys = shared["sizes"][:3]
    members = like.shape[0], batch // like.shape[0]
    fans = members[0] * -(-queries // shared["BLOCK_M"]) * -(-keys // shared["BLOCK_N"])
    chunks = max(1, min(members[1], most, PROGRAMS // fans))
    parts = torch.empty((chunks, *like.shape), dtype=torch.float32, device=like.device)
    _heads_bias[(fans * chunks,)](
        **_tile_by_tile(shared), dbias_ptr=parts, members=members, chunks=chunks, origin=0,
        SHARED=like.shape[1] < shared["sizes"][3], TARGET=target)
    return add_parts(parts, like.dtype)


def factor_gradients(shared: dict, call: Call, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Of factors and of tables of offsets, with four partial maps at most."""
    found = {}
    for name, target in FACTORS.items():
        x = getattr(call, name)
        if needs[name] and summed(x, None):
            found[name] = dense_gradient(shared, x, target)
        elif needs[name]:
            found[name] = of_tokens(call, token_sums(shared, target, summed(x, "queries")), x)
    for n, name in enumerate(TABLES):
        if needs[name]:
            table = getattr(call, name)
            like = table.new_empty((), dtype=torch.float32).expand(1, table.shape[1], *shared["sizes"][1:3])
            found[name] = map_gradient(dense_gradient(shared, like, 25 + n, 4), shared["sizes"][14:19], table)
    return found


POSITIONS = ("rel_y", "rel_x", "path_row", "path_col", "slope", "q_xy", "k_xy", "position_q", "position_k")


def position_gradients(shared: dict, call: Call, needs: dict[str, bool]) -> dict[str, Tensor]:
    """Of what positions add to the scores."""
    wanted = [name for name in POSITIONS if needs[name]]
    batch, queries, keys, heads = shared["sizes"][:4]
    if not wanted:
        return {}
    whole, spots = call, (("q_xy", call.cu_q, call.max_q), ("k_xy", call.cu_k, call.max_k))
    if call.cu_q is not None and call.slope is not None:
        whole = call._replace(**{name: of_samples(getattr(call, name), cu, longest) for name, cu, longest in spots})
    some = max(1, MOST // max(1, 4 * heads * queries * keys))
    found: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for first in range(0, batch, some):
        samples = slice(first, min(first + some, batch))
        ds = _maps(shared, first, samples.stop - first)
        for name in wanted:
            found[name].append(_GRADIENTS[name](ds, whole, samples))
    sums = {name: sum(x) if name == "slope" else torch.cat(x) for name, x in found.items()}
    if call.cu_q is not None:
        for name in {*sums} - {"slope"}:
            side = "k" if name == "k_xy" else "q"
            sums[name] = packed(sums[name], getattr(call, f"cu_{side}"), getattr(call, side).shape[1])
    return {name: folded(x, getattr(call, name)) for name, x in sums.items()}


def _maps(shared: dict, first: int, count: int) -> Tensor:
    """dS of `count` samples from `first` on, [count, H, Nq, Nk]."""
    queries, keys, heads = shared["sizes"][1:4]
    ds = torch.empty((count, heads, queries, keys), dtype=torch.float32, device=shared["q_ptr"].device)
    tiles = -(-queries // shared["BLOCK_M"]) * -(-keys // shared["BLOCK_N"])
    _heads_bias[(tiles * count,)](
        **_tile_by_tile(shared), dbias_ptr=ds, members=(count, 1), chunks=1, origin=first, SHARED=False, TARGET=0)
    return ds


def _rel_y(ds: Tensor, call: Call, samples: slice) -> Tensor:
    return ds.unflatten(3, (-1, call.rel_x.shape[3])).sum(4).transpose(1, 2)


def _rel_x(ds: Tensor, call: Call, samples: slice) -> Tensor:
    return ds.unflatten(3, (-1, call.rel_x.shape[3])).sum(3).transpose(1, 2)


def _path(axis: int):
    def gradient(ds: Tensor, call: Call, samples: slice) -> Tensor:
        by_keys = bool(axis) != bool(call.path_transposed)
        x = (ds.mT if by_keys else ds).unflatten(3, (-1, call.path_width)).sum(4 if axis else 3)  # [B, H, N, side]
        return path_gradient(x.transpose(1, 2), axis, (x.shape[2] // call.path_width, call.path_width))

    return gradient


def _steps(call: Call, samples: slice) -> tuple[Tensor, Tensor]:
    """The steps from keys to queries along both axes, [B, 1, Nq, Nk, 2], and their lengths."""
    q, k = (x[samples] if len(x) > 1 else x for x in (call.q_xy.float(), call.k_xy.float()))
    step = (q[:, :, None] - k[:, None])[:, None]
    return step, step.square().sum(-1).sqrt()


def _slope(ds: Tensor, call: Call, samples: slice) -> Tensor:
    return -(ds * _steps(call, samples)[1]).sum((0, 2, 3))


def _xy(axis: int):
    def gradient(ds: Tensor, call: Call, samples: slice) -> Tensor:
        step, length = _steps(call, samples)
        pull = (ds * call.slope.float()[:, None, None]).sum(1, keepdim=True) / length.masked_fill(length == 0.0, 1.0)
        return (pull[..., None] * step).sum((1, 3 - axis)) * (2 * axis - 1)

    return gradient


def _rows(name: str):
    def gradient(ds: Tensor, call: Call, samples: slice) -> Tensor:
        index = call.position_index if len(call.position_index) == 1 else call.position_index[samples]
        return map_rows(ds, index, getattr(call, name).shape[3], name == "position_k")

    return gradient


_GRADIENTS = {
    "rel_y": _rel_y, "rel_x": _rel_x, "path_row": _path(0), "path_col": _path(1), "slope": _slope, "q_xy": _xy(0), "k_xy": _xy(1),
    "position_q": _rows("position_q"), "position_k": _rows("position_k"),
}  # fmt: skip
