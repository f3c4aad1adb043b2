"""attention: every query against every key, with typed biases, masks and modulations.

     1  q, k turned (rope)                                    6  of the visible keys of a row the k largest stay
     2  s_ij = scale q_i.k_j  or cosine scores                7  P = normaliser(s)
     3  modulations of the scores, in their order             8  modulations of the weights, in their order
     4  s_ij += biases (-inf hides)                           9  dropout
     5  masks: what is hidden is removed                     10  o_i = sum_j P_ij v_j

A row without a visible key gives o = 0 and lse = -inf (lse = sink with a sink). A NaN or infinity that a mask hides is seen
by nothing; one that a row sees makes the row NaN.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vitkern.bias import ContextualPosition, ManhattanDecay
from vitkern.modulation import Policy, SoftCausal, TalkingHeads
from vitkern.reference.window_attention import keep_pattern, normalize
from vitkern.stats import Stats


def attention(
    q: Tensor,  # [B, Nq, H, D]
    k: Tensor,  # [B, Nk, Hk, D]
    v: Tensor | None,  # [B, Nk, Hk, Dv]
    biases: tuple[Any, ...] = (),
    masks: tuple[Any, ...] = (),
    modulations: tuple[Any, ...] = (),
    normalizer: str = "softmax",
    cosine: Any = None,
    rope: Any = None,
    scale: float | Tensor = 1.0,  # a float or [] or [H]
    sink: Tensor | None = None,  # [H]
    extra_kv: tuple[Tensor, Tensor | None] | None = None,  # [B|1, E, Hk, D], [B|1, E, Hk, Dv]
    seed: Tensor | None = None,  # [1 to 2 + B Nq] int64: dropout
    dropout_p: float = 0.0,
    topk: int | None = None,
    stats: tuple[str, ...] = (),
    stat_rows: tuple[int, ...] = (),
    query_weight: Tensor | None = None,  # [B, Nq] or [B, Nq, H]
) -> tuple[Tensor | None, Stats]:  # out [B, Nq, H, Dv]
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    acc = torch.promote_types(q.dtype, torch.float32)
    visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    for mask in masks:
        visible = visible & (mask if isinstance(mask, Tensor) else mask.dense(q, k))  # [B|1, H|1, Nq, Nk]
    terms = [
        (b if isinstance(b, Tensor) else b.dense(q, k)).to(acc)
        for b in biases
        if getattr(b, "place", "logit") == "logit"
    ]
    before, after = _factors(q, k, biases, modulations, acc)
    if rope is not None:
        q, k = rope.turn(q, rope.q_range), rope.turn(k, rope.k_range)
    if extra_kv is not None:
        more = extra_kv[0].shape[1]
        k = torch.cat((k, extra_kv[0].expand(batch, -1, -1, -1)), 1)  # [B, Nk + E, Hk, D]
        if v is not None and extra_kv[1] is not None:
            v = torch.cat((v, extra_kv[1].expand(batch, -1, -1, -1)), 1)
        visible = torch.nn.functional.pad(visible, (0, more), value=True)
        terms = [wider(t, keys, more, 0.0) for t in terms]
        before, after = ([wider(f, keys, more, 1.0) for f in each] for each in (before, after))
        keys += more
    for term in terms:
        visible = visible & (term != -math.inf)
    s = _scores(q, k, cosine, scale, acc)  # [B, H, Nq, Nk]
    given = s
    s = torch.where(visible | ~s.isnan(), s, 0.0)  # a NaN that nobody sees meets no factor
    for factor in before:
        s = factor.apply(s, "logit") if isinstance(factor, TalkingHeads) else s * _where_seen(factor, visible)
    for term in terms:
        s = s + term.masked_fill(term == -math.inf, 0.0)
    visible = visible.expand(s.shape)
    if topk is not None:
        order = s.masked_fill(~visible, -math.inf).sort(stable=True, dim=-1, descending=True).indices
        rank = torch.empty_like(order).scatter_(-1, order, torch.arange(keys, device=q.device).expand_as(order))
        visible = visible & (rank < topk)
    policy = next((m for m in modulations if isinstance(m, Policy)), None)
    p, lse, index = _normalize(s, visible, normalizer, sink, policy)
    found = _stats(given, p, lse, index, heads, stats, stat_rows, query_weight)
    if v is None:
        return None, found
    for factor in after:
        p = factor.apply(p, "prob") if isinstance(factor, TalkingHeads) else p * _where_seen(factor, visible)
        p = p.masked_fill(~visible, 0.0)
    if dropout_p > 0.0:
        token = torch.arange(queries, device=q.device)[None]
        p = p * keep_pattern(seed, batch, heads, token, dropout_p, keys)[:, 0].to(acc) / (1.0 - dropout_p)
    values = v.to(acc).transpose(1, 2).repeat_interleave(heads // v.shape[2], 1)  # [B, H, Nk, Dv]
    finite = values.isfinite()
    o = p.to(q.dtype).to(acc) @ values.masked_fill(~finite, 0.0)  # [B, H, Nq, Dv]
    seen = p != 0 if normalizer.startswith("argmax") else visible
    o = o.masked_fill(seen.to(acc) @ (~finite).to(acc) > 0, math.nan)
    for b in biases:
        if isinstance(b, ContextualPosition) and b.v_table is not None:
            o = o + b.value(p[..., : b.index.shape[-1]])
    return o.transpose(1, 2).to(v.dtype), found


def _factors(q: Tensor, k: Tensor, biases: Any, modulations: Any, acc: torch.dtype) -> tuple[list[Any], list[Any]]:
    """What multiplies or mixes the scores, and the weights: dense factors, or modulations that mix heads."""
    before: list[Any] = []
    after: list[Any] = [m.dense(q, k).to(acc) for m in modulations if isinstance(m, SoftCausal)]
    for m in modulations:
        if isinstance(m, TalkingHeads):
            before.append(m)
            after.append(m)
        elif not isinstance(m, (SoftCausal, Policy)):
            (before if m.place == "logit" else after).append(m.dense(q, k).to(acc))
    after += [b.dense(q, k).to(acc).exp() for b in biases if isinstance(b, ManhattanDecay) and b.place == "prob"]
    return before, after


def _where_seen(factor: Tensor, visible: Tensor) -> Tensor:
    """The factor with 1 in place of a NaN that nobody sees: times 0 it would be the gradient of what it multiplies."""
    return factor.masked_fill(~visible & factor.isnan(), 1.0)


def wider(t: Any, keys: int, more: int, value: float) -> Any:
    """A score-shaped tensor with `more` columns of `value` behind the `keys` that it has or broadcasts to."""
    if not isinstance(t, Tensor) or t.shape[-1:] == (keys + more,):
        return t
    return torch.nn.functional.pad(t.expand(*t.shape[:-1], keys), (0, more), value=value)


def _scores(q: Tensor, k: Tensor, cosine: Any, scale: Any, acc: torch.dtype) -> Tensor:
    """[B, H, Nq, Nk]: step 2, NaN for every pair with a query or a key that is not finite."""
    heads = q.shape[2]
    a = q.to(acc).transpose(1, 2)  # [B, H, Nq, D]
    b = k.to(acc).transpose(1, 2).repeat_interleave(heads // k.shape[2], 1)  # [B, H, Nk, D]
    whole = [t.isfinite().all(-1) for t in (a, b)]  # [B, H, N]
    a, b = (t.masked_fill(~ok[..., None], 0.0) for t, ok in zip((a, b), whole, strict=True))
    if cosine is not None:
        a, b = (normalize(t, cosine.eps).to(q.dtype).to(acc) for t in (a, b))
        scale = cosine.logit_scale.reshape(-1).to(acc).clamp(max=cosine.max).exp()  # [H]
    factor = scale.to(acc).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale
    return (a @ b.mT * factor).masked_fill(~(whole[0][..., :, None] & whole[1][..., None, :]), math.nan)


def _normalize(
    s: Tensor, visible: Tensor, normalizer: str, sink: Tensor | None, policy: Policy | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """P [B, H, Nq, Nk], lse [B, Nq, H] of softmax, index [B, Nq, H] of argmax_k."""
    if normalizer == "softmax":
        return _softmax(s, visible, sink, policy)
    if normalizer in ("sigmoid", "relu", "none"):
        f = {"sigmoid": torch.sigmoid, "relu": torch.relu, "none": lambda t: t}[normalizer]
        return f(s.masked_fill(~visible, 0.0)).masked_fill(~visible, 0.0), None, None
    axis = -1 if normalizer == "argmax_k" else -2
    if not s.shape[axis]:
        return torch.zeros_like(s), None, s.new_full((s.shape[0], s.shape[2], s.shape[1]), -1, dtype=torch.int32)
    ranked = s.detach().masked_fill(~visible, -math.inf).sort(stable=True, dim=axis, descending=True).indices
    ranked = ranked.gather(axis, (~visible.gather(axis, ranked)).to(torch.uint8).sort(stable=True, dim=axis).indices)
    best = ranked.narrow(axis, 0, 1)
    p = torch.zeros_like(s).scatter(axis, best, 1.0).masked_fill(~visible, 0.0)
    if normalizer == "argmax_q":
        return p, None, None
    return p, None, best.masked_fill(~visible.any(-1, keepdim=True), -1)[..., 0].transpose(1, 2).to(torch.int32)


def _softmax(
    s: Tensor, visible: Tensor, sink: Tensor | None, policy: Policy | None
) -> tuple[Tensor, Tensor | None, None]:
    s = s.masked_fill(~visible, -math.inf)  # [B, H, Nq, Nk]
    empty = ~visible.any(-1, keepdim=True)  # [B, H, Nq, 1]
    bottom = s.new_full((*s.shape[:-1], 1), -math.inf)
    if sink is not None:
        bottom = sink.to(s.dtype)[:, None, None].expand(bottom.shape)
        empty = torch.zeros_like(empty)
    top = torch.cat((s, bottom), -1).detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)
    e = (s - top).exp()
    if policy is not None:
        return policy.apply(e, visible).masked_fill(~visible, 0.0), None, None
    z = e.sum(-1, keepdim=True) + (bottom - top).exp()
    z = z.masked_fill(empty, 1.0)  # never 0: finite gradients
    lse = (top + z.log()).masked_fill(empty, -math.inf)
    return e / z, lse[..., 0].transpose(1, 2), None


def _stats(
    given: Tensor,
    p: Tensor,
    lse: Tensor | None,
    index: Tensor | None,
    heads: int,
    wanted: tuple[str, ...],
    stat_rows: tuple[int, ...],
    query_weight: Tensor | None,
) -> Stats:
    found: dict[str, Tensor | None] = {"lse": lse, "index": index, "probs": p, "logits": given}
    if "row" in wanted:
        found["row"] = torch.stack([p[:, :, i] for i in stat_rows], 2)  # [B, H, R, Nk]
    if "logits_mean" in wanted:
        found["logits_mean"] = given.mean(1)  # [B, Nq, Nk]
    if "key_mean" in wanted:
        w = p.new_ones(p.shape[0], p.shape[2]) if query_weight is None else query_weight.to(p.dtype)
        w = w[..., None].expand(*w.shape, heads) if w.dim() == 2 else w  # [B, Nq, H]
        total = w.sum(1)[:, None]  # [B, 1, H]
        weighed = torch.einsum("bih,bhij->bjh", w, p)  # [B, Nk, H]
        found["key_mean"] = (weighed / total.masked_fill(total == 0, 1.0)).masked_fill(total == 0, 0.0)
    return Stats(**{name: found[name] for name in wanted})
