"""neighborhood_attention: softmax attention of every token of a map over the window around it, and its two halves.

Per axis of length L with kernel K, dilation d and stride t, tokens of equal i mod d form a group of L' tokens; i' = i div d:

    lead  = min((i' div t) t + t div 2, L' - 1)          causal: min((i' div t) t + t - 1, L' - 1)
    start = clamp(lead - K div 2, 0, L' - K)             causal: max(lead - K + 1, 0);   border "zero": lead - K div 2
    slots = start .. start + K - 1, of which a causal axis shows those up to i'

The window of a token is the product over the axes, its n slots are numbered row-major. With nbr(i, s) the key in slot s

    A_is = scale q_i.k_nbr + rpb[h, nbr' - i' + K - 1]    an entry of rpb per axis, in steps of the group
    P_is = exp(A_is - lse_i),  lse_i = log sum_s exp(A_is)      over the visible slots and the extra keys, which have no rpb
    o_i  = sum_s P_is v_nbr

Under border "zero" slots outside the map are keys and values of zeros. A row that sees no key gives o = 0 and lse = -inf. A NaN or
infinity in a key makes the rows that see it NaN, one in a value makes them NaN in that channel; no other row knows of it.
"""

import math

import torch
from torch import Tensor


def neighborhood_attention(
    q: Tensor,  # [B, L0, L1, L2, H, D]
    k: Tensor,  # [B, L0, L1, L2, Hk, D]
    v: Tensor,  # [B, L0, L1, L2, Hk, Dv]
    rpb: Tensor | None,  # [H, 2 K0 - 1, 2 K1 - 1, 2 K2 - 1]
    key_mask: Tensor | None,  # [B, L0, L1, L2] bool
    k_extra: Tensor | None,  # [B|1, E, Hk, D]
    v_extra: Tensor | None,  # [B|1, E, Hk, Dv]
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    causal: list[int],
    zero: bool,  # border="zero"
    scale: float,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # out [B, L0, L1, L2, H, Dv], lse [B, L0, L1, L2, H]
    acc = torch.promote_types(q.dtype, torch.float32)  # float32; float64 stays float64
    group = q.shape[-2] // k.shape[-2]
    token, seen, row = neighbors(q.shape[1:4], kernel, dilation, stride, causal, zero, q.device)  # [T, n] each
    s, hidden = scores(q, k, rpb, token, seen, row, scale)  # [B, T, H, n], [T, 1, n]
    hidden = hidden[None]  # [1, T, 1, n]
    if key_mask is not None:
        real = gather(key_mask[..., None, None], token, True)[..., 0, 0]  # [B, T, n] outside the map is no key
        hidden = hidden | ~real[:, :, None]  # [B, T, 1, n]
    s = s.masked_fill(hidden, -math.inf)  # [B, T, H, n]
    near = gather(v, token, 0.0).to(acc).repeat_interleave(group, 3)  # [B, T, n, H, Dv]
    if k_extra is not None:
        more, far = extras(q, k_extra, v_extra, scale)  # [B, T, H, E], [B, 1, E, H, Dv]
        s = torch.cat((s, more), -1)  # [B, T, H, n + E]
        near = torch.cat((near, far.expand(-1, near.shape[1], -1, -1, -1)), 2)  # [B, T, n + E, H, Dv]
    unseen = s == -math.inf  # [B, T, H, n + E]
    empty = unseen.all(-1, keepdim=True)  # [B, T, H, 1]
    top = s.detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)  # [B, T, H, 1] the result does not depend on it
    e = (s - top).exp()  # [B, T, H, n + E]
    z = e.sum(-1, keepdim=True).masked_fill(empty, 1.0)  # [B, T, H, 1] never 0: finite gradients
    lse = (top + z.log()).masked_fill(empty, -math.inf)[..., 0]  # [B, T, H]
    p = (e / z).to(q.dtype).to(acc)  # [B, T, H, n + E]
    out = weighed(p, near, unseen).to(v.dtype)  # [B, T, H, Dv]
    return out.unflatten(1, q.shape[1:4]), lse.unflatten(1, q.shape[1:4])  # [B, L0, L1, L2, H, Dv], [B, L0, L1, L2, H]


def neighborhood_qk(
    q: Tensor,  # [B, L0, L1, L2, H, D]
    k: Tensor,  # [B, L0, L1, L2, Hk, D]
    rpb: Tensor | None,  # [H, 2 K0 - 1, 2 K1 - 1, 2 K2 - 1]
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    causal: list[int],
    zero: bool,
    scale: float,
    gpu: str = "",
) -> Tensor:  # [B, L0, L1, L2, H, n], -inf where a slot is not visible
    token, seen, row = neighbors(q.shape[1:4], kernel, dilation, stride, causal, zero, q.device)  # [T, n] each
    s, hidden = scores(q, k, rpb, token, seen, row, scale)  # [B, T, H, n], [T, 1, n]
    return s.masked_fill(hidden, -math.inf).to(q.dtype).unflatten(1, q.shape[1:4])  # [B, L0, L1, L2, H, n]


def neighborhood_av(
    a: Tensor,  # [B, L0, L1, L2, H, n]
    v: Tensor,  # [B, L0, L1, L2, Hk, Dv]
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    causal: list[int],
    zero: bool,
    gpu: str = "",
) -> Tensor:  # [B, L0, L1, L2, H, Dv]
    acc = torch.promote_types(v.dtype, torch.float32)
    token, seen, _ = neighbors(v.shape[1:4], kernel, dilation, stride, causal, zero, v.device)  # [T, n] each
    near = gather(v, token, 0.0).to(acc).repeat_interleave(a.shape[-2] // v.shape[-2], 3)  # [B, T, n, H, Dv]
    hidden = ~seen[:, None]  # [T, 1, n]
    p = a.flatten(1, 3).to(acc).masked_fill(hidden, 0.0)  # [B, T, H, n]
    return weighed(p, near, hidden).to(v.dtype).unflatten(1, v.shape[1:4])  # [B, L0, L1, L2, H, Dv]


def axis(length, kernel, dilation, stride, causal, zero, device):
    """Of one axis: the key in each slot (-1 outside the map), whether it is visible, its entry of rpb; [L, K] each."""
    i = torch.arange(length, device=device)  # [L]
    first, within = i % dilation, i // dilation  # [L]
    size = (length - first + dilation - 1) // dilation  # [L] tokens of the group
    lead = within // stride * stride + (stride - 1 if causal else stride // 2)  # [L]
    lead = torch.minimum(lead, size - 1)  # [L]
    if causal:
        start = (lead - kernel + 1).clamp(min=0)  # [L]
    elif zero:
        start = lead - kernel // 2  # [L]
    else:
        start = torch.minimum((lead - kernel // 2).clamp(min=0), size - kernel)  # [L]
    slot = start[:, None] + torch.arange(kernel, device=device)  # [L, K]
    inside = (slot >= 0) & (slot < size[:, None])  # [L, K]
    seen = slot <= within[:, None] if causal else torch.ones_like(inside)  # [L, K]
    row = (slot - within[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)  # [L, K]
    return torch.where(inside, slot * dilation + first[:, None], -1), seen, row


def neighbors(lengths, kernel, dilation, stride, causal, zero, device):
    """The token in every slot of every query (-1 outside the map), whether it is visible, its row of rpb; [T, n] each."""
    token = row = torch.zeros((1, 1), dtype=torch.int64, device=device)  # [T so far, n so far]
    seen = torch.ones((1, 1), dtype=torch.bool, device=device)
    for length, size, *how in zip(lengths, kernel, dilation, stride, causal, strict=True):
        key, visible, entry = axis(length, size, *how, zero, device)  # [L, K] each
        at, inside = token[:, None, :, None], key[None, :, None, :] >= 0  # [T, 1, n, 1], [1, L, 1, K]
        token = torch.where((at >= 0) & inside, at * length + key[None, :, None, :], -1).flatten(2).flatten(0, 1)
        seen = (seen[:, None, :, None] & visible[None, :, None, :]).flatten(2).flatten(0, 1)
        row = (row[:, None, :, None] * (2 * size - 1) + entry[None, :, None, :]).flatten(2).flatten(0, 1)
    return token, seen, row


def gather(x: Tensor, token: Tensor, outside) -> Tensor:
    """The keys of a map x [B, L0, L1, L2, H, D] in every slot: [B, T, n, H, D], `outside` where token is -1."""
    near = x.flatten(1, 3)[:, token.clamp(min=0)]  # [B, T, n, H, D]
    return near.masked_fill((token < 0)[:, :, None, None], outside)


def products(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """scale q.k of queries [B, T, H, D] and keys [B, T|1, n, H, D]: [B, T, H, n]; NaN for a key that is not finite."""
    broken = ~keys.isfinite().all(-1)  # [B, T|1, n, H]
    keys = keys.masked_fill(~keys.isfinite(), 0.0)  # [B, T|1, n, H, D]
    s = torch.einsum("bthd,btnhd->bthn", q, keys.expand(-1, q.shape[1], -1, -1, -1)) * scale  # [B, T, H, n]
    return s.masked_fill(broken.transpose(2, 3), math.nan)


def scores(q: Tensor, k: Tensor, rpb: Tensor | None, token: Tensor, seen: Tensor, row: Tensor, scale: float):
    """A [B, T, H, n] of all slots, and which of them are hidden, [T, 1, n]."""
    acc = torch.promote_types(q.dtype, torch.float32)
    near = gather(k, token, 0.0).to(acc).repeat_interleave(q.shape[-2] // k.shape[-2], 3)  # [B, T, n, H, D]
    s = products(q.flatten(1, 3).to(acc), near, scale)  # [B, T, H, n]
    hidden = ~seen[:, None]  # [T, 1, n]
    if rpb is not None:
        bias = rpb.flatten(1).to(acc)[:, row].transpose(0, 1)  # [T, H, n]
        s = (s + bias).masked_fill(bias == -math.inf, -math.inf)  # [B, T, H, n]
    return s, hidden


def extras(q: Tensor, k: Tensor, v: Tensor, scale: float):
    """The scores [B, T, H, E] and values [B, 1, E, H, Dv] of keys [B|1, E, Hk, D] that every query sees."""
    acc, group = torch.promote_types(q.dtype, torch.float32), q.shape[-2] // k.shape[-2]
    k, v = (x.to(acc).repeat_interleave(group, 2).expand(q.shape[0], -1, -1, -1)[:, None] for x in (k, v))
    return products(q.flatten(1, 3).to(acc), k, scale), v


def weighed(p: Tensor, values: Tensor, unseen: Tensor) -> Tensor:
    """sum p v of weights [B, T, H, n] and values [B, T, n, H, Dv]: [B, T, H, Dv]; unseen ones count for nothing."""
    finite = values.isfinite()  # [B, T, n, H, Dv]
    o = torch.einsum("bthn,btnhd->bthd", p, values.masked_fill(~finite, 0.0))  # [B, T, H, Dv]
    seen = (~unseen).to(p.dtype).expand_as(p)  # [B, T, H, n]
    return o.masked_fill(torch.einsum("bthn,btnhd->bthd", seen, (~finite).to(p.dtype)) > 0, math.nan)
