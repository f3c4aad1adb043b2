"""Backward of attention whose heads mix.

The weights are made again from lse. One walk over the keys makes the rows' sums and the gradient of the second mixture, the next
dq and the gradient of the first, two walks over the queries dk and dv, a few columns to a program, and one program for each tile
of a bias or factor with queries and keys walks the samples that share it; the gradients of positions are sums of dS of a few
samples at a time (_attention_heads_maps.py). Every sum has an order that the sizes fix.
"""

import torch
from torch import Tensor

from ._attention_heads_bwd_tiles import _head_deltas, _heads_keys, _heads_queries, _heads_values
from ._attention_heads_maps import dense_gradient, factor_gradients, position_gradients
from ._attention_host import DIFFERENTIABLE, HARD, Call, folded, of_tokens, row_strides, summed
from ._attention_visits import lists
from ._reduce import add_parts
from .attention_heads import columns, head_rows, heads_arguments, programs, without

DELTAS = ("delta_ptr", "drow_ptr", "dsink_ptr", "dgiven_ptr", "dweight_ptr", "dpost_ptr")
QUERIES = ("dq_ptr", "drow_ptr", "doffset_ptr", "dfactor_ptr", "dpre_ptr")
KEYS = ("dk_ptr", "dcolumn_ptr")
OF_WEIGHTS = ("v", "weight", "weight_table", "early_weight", "post_weight", "post_bias", "query_weight")  # not of the choice


def backward(dout: Tensor, dlse: Tensor | None, dkey_mean: Tensor | None, lse: Tensor, call: Call, wanted: list[bool]) -> tuple:
    """The gradients of DIFFERENTIABLE."""
    q, k, v, bias, key_bias = call[:5]
    batch, queries, heads, depth = q.shape
    keys, width = v.shape[1], v.shape[3]
    hard, asked = call.normalizer in HARD, dict(zip(DIFFERENTIABLE, wanted, strict=True))
    needs = {name: w and (not hard or name in OF_WEIGHTS) for name, w in asked.items()}
    softmax = call.normalizer == "softmax"
    shared = heads_arguments(call, [dout], dkey_mean)
    found, low = lse.contiguous() if softmax else None, None
    if hard or (softmax and q.dtype == torch.float32):
        found, low = head_rows(call, shared)
    shared |= {"dout_ptr": dout, "dout_strides": row_strides(dout), "lse_ptr": found, "low_ptr": low}
    shared["d_strides"] = (*shared["d_strides"], dout.stride(-1))
    column, columns_v = columns(depth, q.element_size()), columns(width, q.element_size())
    if "maxnreg" in shared:
        columns_v = 16, -(-width // 16)
        shared["CHUNK"] = 16
    if call.early_gain is not None and q.dtype == torch.float32:  # each product of it is held beside its factor
        column = 8, -(-depth // 8)
    shared |= {"WIDTH_V": width, "CHUNK_V": columns_v[0]}

    make = torch.empty if call.cu_q is None else torch.zeros  # tokens of no sequence add nothing to sums over all

    def new(condition, *shape, dtype=torch.float32):
        return make(shape, dtype=dtype, device=q.device) if condition else None

    gained = call.gain is not None or call.gain_table is not None  # then the mixed scores have a gradient of their own
    rows = needs["bias"] and summed(bias, "keys") or (needs["pre_bias"] and not gained)
    of_rows, of_keys = (batch, queries, heads), (batch, keys, heads)
    delta, drow, doffset, dfactor = (
        new(x, *of_rows) for x in (softmax, rows, needs["pre_bias"] and gained, needs["factor"]))
    dsink, dgiven = (new(needs[x], *of_rows) for x in ("sink", "post_bias"))
    dweight = new(needs["query_weight"] and dkey_mean is not None, *of_rows)
    dpost, dpre = (new(needs[x], programs(shared, 1), heads, heads) for x in ("post_weight", "pre_weight"))
    dq = new(needs["q"], *q.shape, dtype=q.dtype)

    def walk(kernel, names, side, count, more, **made):
        """One walk makes some of what a kernel can make: all at once would want more registers than there are."""
        if any(x is not None for x in made.values()):
            kernel[(programs(shared, side), count)](**shared | more, **dict.fromkeys(names) | made)

    of_dlse = {"dlse_ptr": dlse, "dlse_strides": row_strides(dlse)}
    walk(_head_deltas, DELTAS, 1, 1, of_dlse, delta_ptr=delta, drow_ptr=drow if softmax else None, dsink_ptr=dsink,
         dgiven_ptr=dgiven, dweight_ptr=dweight)
    walk(_head_deltas, DELTAS, 1, 1, of_dlse, dpost_ptr=dpost)
    shared["delta_ptr"], block = delta, {"BLOCK_D": column[0]}
    walk(_heads_queries, QUERIES, 1, column[1], block, dq_ptr=dq)
    walk(_heads_queries, QUERIES, 1, 1, block, drow_ptr=None if softmax else drow, doffset_ptr=doffset, dfactor_ptr=dfactor)
    walk(_heads_queries, QUERIES, 1, 1, block, dpre_ptr=dpre)
    shared |= lists(shared, shared, of_keys=True, together=True)

    def of_each_head(like, condition):
        """What every head gives to its keys: the gradient itself where each has its own."""
        group = heads // like.shape[2]
        return new(condition, *of_keys, like.shape[3], dtype=like.dtype if group == 1 else torch.float32)

    dk, dv = of_each_head(k, needs["k"]), of_each_head(v, needs["v"])
    dcolumn = new((needs["bias"] and summed(bias, "queries")) or needs["key_bias"], *of_keys)
    walk(_heads_keys, KEYS, 2, column[1], block, dk_ptr=dk)
    walk(_heads_keys, KEYS, 2, 1, block, dcolumn_ptr=dcolumn)
    if dv is not None:
        _heads_values[(programs(shared, 2), columns_v[1])](**without(shared, "v_ptr", "v_strides", "delta_ptr"), dv_ptr=dv)
    grads: dict[str, Tensor | None] = dict.fromkeys(DIFFERENTIABLE) | {"q": dq}
    for name, x, like in (("k", dk, k), ("v", dv, v)):
        if x is not None:
            grads[name] = x if x.shape == like.shape else x.unflatten(2, (like.shape[2], -1)).sum(3).to(like.dtype)
    if needs["bias"]:
        of_bias = dcolumn if summed(bias, "queries") else drow
        grads["bias"] = dense_gradient(shared, bias, 0) if summed(bias, None) else of_tokens(call, of_bias, bias)
    if needs["key_bias"]:
        grads["key_bias"] = folded(dcolumn.transpose(1, 2)[:, :, None], key_bias)
    for name, x in (("factor", dfactor), ("sink", dsink), ("pre_bias", doffset if gained else drow), ("post_bias", dgiven)):
        if needs[name]:
            grads[name] = x.sum((0, 1)).to(getattr(call, name).dtype)
    for name, x in (("pre_weight", dpre), ("post_weight", dpost)):
        if needs[name]:
            grads[name] = add_parts(x, getattr(call, name).dtype)
    if needs["query_weight"]:
        grads["query_weight"] = torch.zeros_like(call.query_weight) if dweight is None else dweight.to(call.query_weight.dtype)
    grads |= factor_gradients(shared, call, needs) | position_gradients(shared, call, needs)
    grads |= {name: torch.zeros_like(getattr(call, name)) for name, w in asked.items() if w and not needs[name]}
    return tuple(grads.values())
