"""linear_attention: attention whose scores factor through a feature map (Linear Transformers, Katharopoulos et al. 2020).

    a_i = scale phi(q_i)      b_j = w_j m_j phi(k_j)      ~ : after rope, otherwise the same
    S = sum_j b~_j v_j^T      z = sum_j b_j      V = sum_j m_j v_j      n = sum_j m_j
    num_i = S^T a~_i + offset V      den_i = <a_i, z> + offset n      o_i = N(num_i, den_i)

The denominator is not rotated. All of it is float32 (float64 for float64); o is rounded once. A row of q, k, v is a map cut
in windows, [B, Wy, wy, Wx, wx, ...]: each of the Wy Wx windows of wy wx tokens is a sequence of its own. Or, with bounds cu,
sequences stand one behind the other along wx.
"""

import torch
from torch import Tensor

from vitkern.reference import linear_features
from vitkern.reference.feature_rows import features

NORMALIZERS = ("sum", "mean", "none", "max", "abs_max", "subtract")


def linear_attention(
    q: Tensor,  # [B, Wy, wy, Wx, wx, H, D]
    k: Tensor,  # [B, Wy, ky, Wx, kx, Hk, D]
    v: Tensor,  # [B, Wy, ky, Wx, kx, Hk, E]
    key_mask: Tensor | None,  # [B, Wy, ky, Wx, kx] bool
    key_weight: Tensor | None,  # [B, Wy, ky, Wx, kx, Hk]
    cos_q: Tensor | None,  # [S|1, Nq, H|1, R/2]; with cu_q N counts the tokens of a row, and S the rows
    sin_q: Tensor | None,
    cos_k: Tensor | None,  # [S|1, Nk, Hk|1, R/2]
    sin_k: Tensor | None,
    cu_q: Tensor | None,  # [P + 1]
    cu_k: Tensor | None,
    map0: Tensor | None,  # the parameters of the feature map, float32 (float64)
    map1: Tensor | None,
    map2: Tensor | None,
    feature_map: str,
    rate: float,  # of the map "exp", and the number of those of linear_features
    normalizer: str,
    eps: float,
    scale: float,
    offset: float,
    half: bool,  # layout of the rotation: channels i and i + R/2, else 2i and 2i + 1
    detach: bool,  # of "abs_max": the divisor gets no gradient
    pairs: bool,  # num_i = sum_j <a~_i, b~_j> v_j and den_i = sum_j <a_i, b_j>, without S and z
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """``out`` like q of width E; ``state [S, Hk, F + 1, E + 1]``, S z over V n (with `pairs` [S, Hk, 0, 0]); ``kept [S, Hk, K]``,
    what the map rests on of all tokens: of "softmax" for each channel the log of the sum of the exponentials of its keys, of
    "favor" the largest key, of "hash" the spreads of q and of k."""
    acc = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    parameters = tuple(None if t is None else t.to(acc) for t in (map0, map1, map2))
    rest = (parameters, feature_map, rate, normalizer, eps, scale, offset, half, detach, pairs)
    used = torch.ones_like(k[..., 0, 0], dtype=torch.bool) if key_mask is None else key_mask  # [B, Wy, ky, Wx, kx]
    parts = [sequences(t.to(acc)) for t in (q, k, v)]  # [S, N, heads, width]
    valid = sequences(used)  # [S, Nk]
    weight = None if key_weight is None else sequences(key_weight.to(acc))  # [S, Nk, Hk]
    tables = [None if t is None else t.to(acc) for t in (cos_q, sin_q, cos_k, sin_k)]  # [S|1, N, H|1, R/2]
    if cu_q is None or cu_k is None:
        o, state, kept = one(*parts, valid, weight, *tables, *rest)  # [S, Nq, H, E]
    else:
        found = []
        bounds = zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True)
        for q0, q1, k0, k1 in bounds:
            some = [parts[0][:, q0:q1], parts[1][:, k0:k1], parts[2][:, k0:k1]]  # [B, n, heads, width]
            cuts = ((q0, q1), (q0, q1), (k0, k1), (k0, k1))
            turn = [
                None if t is None else t[:, a:b] for t, (a, b) in zip(tables, cuts, strict=True)
            ]  # [B|1, n, H|1, R/2]
            w = None if weight is None else weight[:, k0:k1]  # [B, n, Hk]
            found.append(one(*some, valid[:, k0:k1], w, *turn, *rest))  # [B, n, H, E]
        o = torch.cat([f[0] for f in found], 1)  # [B, T, H, E]
        state, kept = (torch.stack([f[i] for f in found], 1).flatten(0, 1) for i in (1, 2))  # [S, Hk, ...]
    rows, wy, columns, wx = q.shape[1:5]
    o = o.to(v.dtype).unflatten(0, (q.shape[0], rows, columns)).unflatten(3, (wy, wx))  # [B, Wy, Wx, wy, wx, H, E]
    return o.transpose(2, 3).contiguous(), state, kept


def sequences(x: Tensor) -> Tensor:
    """``[B, Wy, wy, Wx, wx, ...]`` as ``[B Wy Wx, wy wx, ...]``."""
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def one(
    q: Tensor,  # [S, Nq, H, D]
    k: Tensor,  # [S, Nk, Hk, D]
    v: Tensor,  # [S, Nk, Hk, E]
    valid: Tensor,  # [S, Nk]
    weight: Tensor | None,  # [S, Nk, Hk]
    cos_q: Tensor | None,
    sin_q: Tensor | None,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    feature_map: str,
    rate: float,
    normalizer: str,
    eps: float,
    scale: float,
    offset: float,
    half: bool,
    detach: bool,
    pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, v, kept = mapped(q, k, v, valid, weight, feature_map, rate, scale, parameters)
    turned_a, turned_b = turn(a, cos_q, sin_q, half), turn(b, cos_k, sin_k, half)  # [S, N, heads, F]
    total, n = v.sum(1), valid.sum(1).to(k.dtype)  # [S, Hk, E], [S]
    group = q.shape[2] // k.shape[2]
    values = total.repeat_interleave(group, 1)[:, None]  # [S, 1, H, E]
    count = n[:, None, None, None]  # [S, 1, 1, 1]
    if pairs:
        scores = _scores(a, b)  # [S, H, Nq, Nk]
        weights = scores if cos_q is None else _scores(turned_a, turned_b)  # [S, H, Nq, Nk]
        num = torch.einsum("shnm,smhe->snhe", weights, v.repeat_interleave(group, 2))  # [S, Nq, H, E]
        den = scores.sum(3).mT[..., None]  # [S, Nq, H, 1]
        out = normalize(num + offset * values, den + offset * count, values, count, normalizer, eps, detach)
        return out, a.new_empty((*total.shape[:2], 0, 0)), kept
    s = torch.einsum("snhf,snhe->shfe", turned_b, v)  # [S, Hk, F, E]
    z = b.sum(1)  # [S, Hk, F]
    sums, each = s.repeat_interleave(group, 1), z.repeat_interleave(group, 1)  # [S, H, F, E], [S, H, F]
    num = torch.einsum("snhf,shfe->snhe", turned_a, sums)  # [S, Nq, H, E]
    den = torch.einsum("snhf,shf->snh", a, each)[..., None]  # [S, Nq, H, 1]
    if feature_map == "polar":  # the second half of the channels of v takes the halves of q's features exchanged
        half_e, half_f = v.shape[3] // 2, a.shape[3] // 2
        turned_a = turn(a.roll(half_f, 3), cos_q, sin_q, half)  # [S, Nq, H, F]
        num_b = torch.einsum("snhf,shfe->snhe", turned_a, sums[..., half_e:])  # [S, Nq, H, E - E // 2]
        den_b = torch.einsum("snhf,shf->snh", a.roll(half_f, 3), each)[..., None]  # [S, Nq, H, 1]
        num = torch.cat((num[..., :half_e], num_b), 3)  # [S, Nq, H, E]
        den = torch.cat((den.expand_as(num[..., :half_e]), den_b.expand_as(num_b)), 3)  # [S, Nq, H, E]
    out = normalize(num + offset * values, den + offset * count, values, count, normalizer, eps, detach)
    last = torch.cat((total, n[:, None, None].expand(-1, k.shape[2], 1)), -1)  # [S, Hk, E + 1]
    state = torch.cat((torch.cat((s, z[..., None]), -1), last[:, :, None]), 2)  # [S, Hk, F + 1, E + 1]
    return out, state, kept


def _scores(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("snhf,smhf->shnm", a, b.repeat_interleave(a.shape[2] // b.shape[2], 2))  # [S, H, Nq, Nk]


def mapped(
    q: Tensor,  # [S, Nq, H, D]
    k: Tensor,  # [S, Nk, Hk, D]
    v: Tensor,  # [S, Nk, Hk, E]
    valid: Tensor | None,  # [S, Nk]; None: all
    weight: Tensor | None,  # [S, Nk, Hk]
    feature_map: str,
    rate: float,
    scale: float,
    parameters: tuple[Tensor | None, ...] = (None,) * 3,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a [S, Nq, H, F], b [S, Nk, Hk, F], v with zeros where no key is, and what the map rests on of all tokens, [S, Hk, K]."""
    hidden = None if valid is None else ~valid[..., None, None]  # [S, Nk, 1, 1]
    if hidden is not None:
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)  # [S, Nk, Hk, .]
    kept = k.new_empty((k.shape[0], k.shape[2], 0))  # [S, Hk, 0]
    if feature_map in linear_features.NAMES:
        a, of_q = linear_features.features(q, "q", None, feature_map, rate, *parameters)  # [S, Nq, H, F], [S, H, .]
        b, of_k = linear_features.features(k, "k", valid, feature_map, rate, *parameters)  # [S, Nk, Hk, F], [S, Hk, .]
        kept = torch.cat((of_q, of_k), 2) if feature_map == "hash" else of_k  # [S, Hk, K]
    else:
        a = features(q, feature_map, rate)  # [S, Nq, H, F]
        if feature_map == "softmax":
            b, kept = softmax_of_keys(k, valid)  # [S, Nk, Hk, F], [S, Hk, F]
        else:
            b = features(k, feature_map, rate)  # [S, Nk, Hk, F]
    a = a * scale  # [S, Nq, H, F]
    if weight is not None:
        b = b * (weight if hidden is None else weight.masked_fill(hidden[..., 0], 0.0))[..., None]  # [S, Nk, Hk, F]
    if hidden is not None:
        b = b.masked_fill(hidden, 0.0)  # [S, Nk, Hk, F]
    return a, b, v, kept


def weighted(
    a: Tensor,  # [B, N, H, F]
    b: Tensor,  # [B, N, H, F]
    c: Tensor,  # [B, N, H, C]
    m: Tensor,  # [B|1, H|1, N, N] or [B, H, N, N, F]: the decays from key j to query i, 0 where it must not be seen
    start: Tensor | None,  # [B, H, F, C]: a state before the first token
    reach: Tensor,  # [B|1, H|1, N, 1|F]: what is left of it at each token
    end: int,  # the token that comes last
) -> tuple[Tensor, Tensor]:
    """The sums under decays by their definition: ``out [B, N, H, C]`` and the state ``[B, H, F, C]`` behind the last token."""
    products = "bihf,bjhf,bhijf->bhij" if m.dim() == 5 else "bihf,bjhf,bhij->bhij"
    out = torch.einsum("bhij,bjhc->bihc", torch.einsum(products, a, b, m.expand(len(a), a.shape[2], *m.shape[2:])), c)
    if not a.shape[1]:
        return out, c.new_zeros(len(a), *a.shape[2:], c.shape[3]) if start is None else start
    left = m[:, :, end].expand(len(a), a.shape[2], *m.shape[3:])  # [B, H, N] or [B, H, N, F]
    left = left if left.dim() == 4 else left[..., None].expand(*left.shape, a.shape[3])  # [B, H, N, F]
    last = torch.einsum("bhjf,bjhf,bjhc->bhfc", left, b, c)  # [B, H, F, C]
    if start is not None:
        out = out + torch.einsum("bihf,bhfc->bihc", a * reach.transpose(1, 2), start)  # [B, N, H, C]
        last = last + reach[:, :, end, :, None] * start  # [B, H, F, C]
    return out, last


def softmax_of_keys(k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax of k [S, Nk, Hk, F] over the valid tokens [S, Nk] of each channel, and the log of its sum [S, Hk, F]."""
    logits = k if valid is None else k.masked_fill(~valid[..., None, None], -torch.inf)  # [S, Nk, Hk, F]
    top = logits.detach().amax(1, keepdim=True) if k.shape[1] else k.sum(1, keepdim=True)  # [S, 1, Hk, F]
    top = top.masked_fill(top.isneginf(), 0.0)  # [S, 1, Hk, F]
    e = (logits - top).exp()  # [S, Nk, Hk, F]
    mass = e.sum(1, keepdim=True)  # [S, 1, Hk, F]
    return e / mass.masked_fill(mass == 0, 1.0), (top + mass.log())[:, 0]


def normalize(
    num: Tensor,  # [..., E]
    den: Tensor,  # [..., 1]
    values: Tensor,  # [..., E]: the sum of the values
    count: Tensor,  # [..., 1]: of valid keys
    normalizer: str,
    eps: float,
    detach: bool,
) -> Tensor:
    """The output. Where the divisor is exactly 0 it is 0, and so are its gradients."""
    if normalizer == "none":
        return num
    if normalizer == "subtract":
        n = count.clamp(min=1)
        return num / n + (1 - den / n) * (values / n)
    if normalizer == "sum":
        divisor = den + eps
    elif normalizer == "mean":
        divisor = den + count * eps
    elif normalizer == "max":
        divisor = torch.where(den > eps, den, eps)
    else:
        divisor = torch.where(den.abs() > eps, den.abs(), eps)
    if detach:
        divisor = divisor.detach()
    zero = divisor == 0
    return (num / divisor.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def turn(x: Tensor, cos: Tensor | None, sin: Tensor | None, half: bool) -> Tensor:
    """x [S, N, H, F] with its first R channels rotated by tables [S|1, N, H|1, R/2]."""
    if cos is None or sin is None:
        return x
    pairs = cos.shape[-1]
    if half:
        a, b = x[..., :pairs], x[..., pairs : 2 * pairs]  # [S, N, H, R/2]
    else:
        a, b = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]  # [S, N, H, R/2]
    pair = (a * cos - b * sin, b * cos + a * sin)  # [S, N, H, R/2]
    turned = torch.cat(pair, -1) if half else torch.stack(pair, -1).flatten(-2)  # [S, N, H, R]
    return torch.cat((turned, x[..., 2 * pairs :]), -1)  # [S, N, H, F]
