"""Backward of attention on a GPU.

Up to three kernels: queries (delta, dq, row sums of dS), keys (dk, dv, column sums) and, where a bias has an axis of queries
and one of keys, one tile of its gradient at a time, which walks the samples and heads that share the bias. Where the tiles
of the first two are too few programs, several share out the visits of one. Tables of offsets and contextual positions have
kernels of their own (_attention_bwd_tables.py, _attention_position_sums.py). Every sum has an order that the sizes fix: no
atomics, the same bits on every run. Nothing of size [B, H, Nq, Nk] exists but the gradient of a bias of that shape. What a
mask hides has no gradient whatever it holds; values that are not finite count as 0 where they are seen.
"""

import torch
from torch import Tensor

from . import _attention_hard, attention_heads_bwd
from ._attention_bwd_relative import _backward_relative, _backward_relative_keys, path_gradient
from ._attention_bwd_sums import _backward_sums
from ._attention_bwd_tables import table_gradient
from ._attention_bwd_tiles import _backward_bias, _backward_keys, _backward_queries
from ._attention_host import (
    DIFFERENTIABLE,
    HARD,
    MIXTURES,
    TABLES,
    Call,
    arguments,
    folded,
    mixes,
    of_tokens,
    programs,
    row,
    row_strides,
    shares,
    summed,
    tuned,
)
from ._attention_policy import policy_rows
from ._attention_position_sums import position_sums, values_gradient, with_given
from ._attention_topk import surviving
from ._attention_visits import lists, seen_tiles, shared_strides
from ._host import power
from ._reduce import add_parts


def bwd(dout, dlse, dkey_mean, lse, key_mean, *args) -> tuple[Tensor | None, ...]:
    """The gradients of DIFFERENTIABLE; the last argument is `need`, whose bit n asks for the n-th."""
    *given, need = args
    call = Call(*given)
    q, k, v, bias, key_bias, _, factor, sink = call[:8]
    softmax = call.normalizer == "softmax" and call.policy is None
    if not softmax:
        dlse = None
    inputs = [getattr(call, name) for name in DIFFERENTIABLE]
    wanted = [x is not None and bool(need >> bit & 1) for bit, x in enumerate(inputs)]
    if call.query_weight is None:
        dkey_mean = None
    if (dout is None and dlse is None and dkey_mean is None) or min(q.numel(), k.numel(), v.numel()) == 0:
        grads = [torch.zeros_like(x) if w else None for x, w in zip(inputs, wanted, strict=True)]
        if wanted[6] and dlse is not None:                  # a sink is all that rows without keys see
            grads[6] = dlse.sum((0, 1)).to(sink.dtype)
        return tuple(grads)
    dout = (v.new_zeros(()).expand(*q.shape[:3], v.shape[3]) if dout is None else dout).to(v.dtype)
    if mixes(call):
        return attention_heads_bwd.backward(dout, dlse, dkey_mean, lse, call, wanted)
    if call.normalizer in HARD:
        needs = dict(zip(DIFFERENTIABLE, wanted, strict=True))
        found = _attention_hard.backward(dout, dkey_mean, call, needs)
        return tuple(found.get(n, torch.zeros_like(x) if w else None) for (n, w), x in zip(needs.items(), inputs, strict=True))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if w else None
                  for x, w in zip((q, k, v), wanted, strict=False))
    shared = arguments(call, [dout, *(x for x in (dq, dk, dv) if x is not None)], dkey_mean)
    shared = surviving(call, shared)
    shared |= {"dout_ptr": dout, "dout_strides": row_strides(dout), "lse_ptr": lse.contiguous() if softmax else None}
    shared["d_strides"] = (*shared["d_strides"], dout.stride(-1))
    shared = with_given(shared, dout, call.position_v)
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]

    def new(condition, *shape):
        return torch.empty(shape, dtype=torch.float32, device=q.device) if condition else None

    def sums_of(name, over, *shape):
        return new(needs[name] and summed(getattr(call, name), over), *shape, heads)

    needs = dict(zip(DIFFERENTIABLE, wanted, strict=True))
    delta = new(call.normalizer == "softmax", batch, queries, heads)
    low = new(softmax, batch, queries, heads)
    if call.policy is not None:
        shared["lse_ptr"], low = policy_rows(shared, call.policy_eps)
    blocks = tuned("backward_queries", shared)
    count = programs(shared, -(-shared["sizes"][1] // blocks["BLOCK_M"]))
    parts = shares(shared, count, -(-shared["sizes"][2] // blocks["BLOCK_N"]))
    several = (parts,) if parts > 1 else ()
    drow = sums_of("bias", "keys", *(() if softmax else several), batch, queries)
    dgain, dshare = (sums_of(name, "keys", *several, batch, queries) for name in ("gain", "weight"))
    dweight = new(wanted[16] and dkey_mean is not None, *several, batch, queries, heads)
    dq_xy = new(wanted[14], *several, batch, queries, heads, 2)
    dfactor, dsink, dslope, dratio = (
        new(needs[n], m * count // heads, heads)
        for n, m in (("factor", parts), ("sink", 1), ("slope", parts), ("later_ratio", parts)))
    some = new(dq is not None, *several, *q.shape) if several else dq
    if delta is not None or any(x is not None for x in (dq, drow, dfactor, dweight, dslope, dq_xy, dratio, dgain, dshare)):
        run, of_rows = lists(shared, blocks), None
        if several and delta is not None:
            of_rows = new(True, parts, 2, batch, queries, heads)
            _backward_sums[(count, parts)](
                **shared, **blocks, **run, parts=parts, low_ptr=None if softmax else low, sum_ptr=of_rows)
            of_rows = add_parts(of_rows, torch.float32)
        _backward_queries[(count, parts)](
            **shared, **blocks, **run, parts=parts, sum_ptr=of_rows, dlse_ptr=dlse, dlse_strides=row_strides(dlse), delta_ptr=delta,
            low_ptr=low, dq_ptr=some, dq_strides=row_strides(dq), drow_ptr=drow, dfactor_ptr=dfactor, dsink_ptr=dsink,
            dweight_ptr=dweight, dslope_ptr=dslope, dxy_ptr=dq_xy, dratio_ptr=dratio, dgain_ptr=dgain, dshare_ptr=dshare)
    if several:
        drow = drow if softmax else _whole(drow)
        dq, dweight, dq_xy, dgain, dshare = map(_whole, (some, dweight, dq_xy, dgain, dshare), (q.dtype, *[torch.float32] * 4))
    sums = {"bias": drow, "gain": dgain, "weight": dshare}
    shared |= {"delta_ptr": delta, "low_ptr": low}
    blocks = tuned("backward_keys", shared)
    count = programs(shared, -(-shared["sizes"][2] // blocks["BLOCK_N"])) // shared["GROUP"]
    parts = shares(shared, count, -(-shared["sizes"][1] // blocks["BLOCK_M"]))
    several = (parts,) if parts > 1 else ()
    dcolumn = new((wanted[3] and summed(bias, "queries")) or wanted[4], *several, batch, keys, heads)
    dgain, dshare = (sums_of(name, "queries", *several, batch, keys) for name in ("gain", "weight"))
    dk_xy, dpolicy = new(wanted[15], *several, batch, keys, heads, 2), new(wanted[21], *several, batch, keys, heads)
    some = [new(x is not None, *several, *like.shape) if several else x for x, like in ((dk, k), (dv, v))]
    if any(x is not None for x in (dk, dv, dcolumn, dk_xy, dpolicy, dgain, dshare)):
        _backward_keys[(count, parts)](
            **shared, **blocks, **lists(shared, blocks, of_keys=True), parts=parts,
            dk_ptr=some[0], dk_strides=row_strides(dk), dv_ptr=some[1], dv_strides=row_strides(dv),
            dcolumn_ptr=dcolumn, dxy_ptr=dk_xy, dpolicy_ptr=dpolicy, dgain_ptr=dgain, dshare_ptr=dshare)
    if several:
        dk, dv, dcolumn, dk_xy, dpolicy, dgain, dshare = map(
            _whole, (*some, dcolumn, dk_xy, dpolicy, dgain, dshare), (k.dtype, v.dtype, *[torch.float32] * 5))
    by_keys = {"bias": dcolumn, "gain": dgain, "weight": dshare}
    sums |= {name: x for name, x in by_keys.items() if summed(getattr(call, name), "queries")}

    def gradient(name, target):
        """Of a bias or factor, whose place in `terms` is `target`."""
        x = getattr(call, name)
        if not needs[name]:
            return None
        return _dense_gradient(shared, x, target) if summed(x, None) else of_tokens(call, sums[name], x)

    if wanted[16] and dweight is None:
        dweight = torch.zeros_like(call.query_weight)
    return (
        dq, dk, dv, gradient("bias", 0), folded(dcolumn.transpose(1, 2)[:, :, None], key_bias) if wanted[4] else None,
        add_parts(dfactor, factor.dtype) if wanted[5] else None, add_parts(dsink, sink.dtype) if wanted[6] else None,
        gradient("gain", 6), gradient("weight", 7),
        *_relative_gradients(shared, inputs[9:11], wanted[9:11]), *_path_gradients(shared, inputs[11:13], wanted[11:13]),
        add_parts(dslope, call.slope.dtype) if wanted[13] else None,
        *(None if x is None else folded(x.sum(2), at) for x, at in ((dq_xy, call.q_xy), (dk_xy, call.k_xy))),
        dweight.to(call.query_weight.dtype) if wanted[16] else None, *[None] * len(MIXTURES),
        None if dpolicy is None else folded(dpolicy.sum(2), call.policy),
        *(table_gradient(shared, getattr(call, name), 25 + n) if needs[name] else None for n, name in enumerate(TABLES)),
        folded(add_parts(dratio, torch.float32).sum(), call.later_ratio) if needs["later_ratio"] else None,
        *_position_gradients(shared, dout, call, needs), *[None] * 2,
    )  # fmt: skip


def _whole(parts: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if parts is None else add_parts(parts, dtype)


def _dense_gradient(shared: dict, bias: Tensor, target: int) -> Tensor:
    """The gradient of a bias, gain or weight with queries and keys, whose place in `terms` is `target`: in chunks of what shares it
    where its tiles are too few programs."""
    batch, queries, keys, heads = shared["sizes"][:4]
    blocks = tuned("backward_bias", shared)
    members = (bias.shape[1], batch // bias.shape[0], heads // bias.shape[1])
    fans = bias.shape[0] * bias.shape[1] * -(-queries // blocks["BLOCK_M"]) * -(-keys // blocks["BLOCK_N"])
    chunks = max(1, min(members[1] * members[2], row("backward_bias", shared)["programs"] // fans))
    dtype = bias.dtype if chunks == 1 else torch.float32
    parts = torch.empty((chunks, *bias.shape), dtype=dtype, device=bias.device)
    seen = seen_tiles(shared, blocks)
    _backward_bias[(fans * chunks,)](
        **shared, **blocks, seen_ptr=seen, seen_strides=shared_strides(seen), dbias_ptr=parts, members=members, chunks=chunks,
        TARGET=target)
    return parts[0] if chunks == 1 else add_parts(parts, bias.dtype)


def _position_gradients(shared: dict, dout: Tensor, call: Call, needs: dict[str, bool]) -> list[Tensor | None]:
    """The gradients of position_q, position_k and position_v."""
    found: list[Tensor | None] = [
        folded(position_sums(shared, by_keys), like) if needs[name] else None
        for name, like, by_keys in (("position_q", call.position_q, False), ("position_k", call.position_k, True))]
    weigh = needs["position_v"]
    return [*found, values_gradient(position_sums(shared, weigh=True), dout, call.position_v) if weigh else None]


def _relative_gradients(shared: dict, inputs: list, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of rel_y and rel_x."""
    if not any(wanted):
        return [None, None]
    sums = _grid_sums(shared, tuple(x.shape[3] for x in inputs), wanted)
    return [None if x is None else folded(x, like) for x, like in zip(sums, inputs, strict=True)]


def _path_gradients(shared: dict, inputs: list, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of path_row and path_col. The step along a row depends on a query and the column of a key, that along a
    column on a key and the row of a query; transposed, the other way round."""
    width, transposed = shared["sizes"][10:12]
    sides = shared["sizes"][2] // max(width, 1), width
    found: list[Tensor | None] = [None, None]
    for axis, like in enumerate(inputs):
        if wanted[axis]:
            by_keys = bool(axis) != bool(transposed)
            steps = _grid_sums(shared, sides, [axis == 1, axis == 0], by_keys)[1 - axis]
            found[axis] = folded(path_gradient(steps, axis, sides), like)
    return found


def _grid_sums(shared: dict, sides: tuple[int, int], wanted: list[bool], by_keys: bool = False) -> list[Tensor | None]:
    """For every query the sums of dS over the columns and over the rows of the grid of keys, [B, Nq, H, rows] and
    [B, Nq, H, columns]; `by_keys` for every key those over the grid of queries."""
    heads, rows = shared["sizes"][3], shared["k_ptr" if by_keys else "q_ptr"].shape[:2]
    blocks = tuned("backward_bias", shared)
    own, along = ("BLOCK_N", "BLOCK_M") if by_keys else ("BLOCK_M", "BLOCK_N")
    blocks[along] = min(row("backward_bias", shared)[along.lower()], power(sides[1]))
    if not by_keys:
        del blocks["CLIP"]
    parts = -(-sides[1] // blocks[along])
    shapes = (parts, *rows, heads, sides[0]), (*rows, heads, sides[1])
    dy, dx = (torch.empty(s, dtype=torch.float32, device=shared["q_ptr"].device) if w else None
              for s, w in zip(shapes, wanted, strict=True))
    tiles = -(-shared["sizes"][2 if by_keys else 1] // blocks[own])
    kernel = _backward_relative_keys if by_keys else _backward_relative
    kernel[(programs(shared, tiles) * parts,)](**shared, **blocks, dy_ptr=dy, dx_ptr=dx, sides=sides)
    return [None if dy is None else dy.sum(0), dx]
