"""channel_attention: D x D attention between channels (XCiT, El-Nouby et al. 2021; Restormer, Zamir et al. 2022).

    S_c = sum_n q_nc^2, T_e = sum_n k_ne^2         a = max(sqrt S, eps), b = max(sqrt T, eps), 1 without `normalize`
    L_ce = t s sum_n q_nc k_ne / (a_c b_e)         P = softmax (relu, none, plus1) of L over e        o_nc = sum_e P_ce v_ne

`topk`: of each row all but the k largest (ties by channel) get weight 0; of several, P = sum_t w_t P_t. Sums run over the
tokens of one window or one packed sequence, in `order` if there is one; masked tokens take no part and give 0. All of it is
float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor


def channel_attention(
    q: Tensor,  # [B, Y, X, H, D]
    k: Tensor,  # [B, Y, X, H, E]
    v: Tensor,  # [B, Y, X, H, E]
    temperature: Tensor | None,  # [H G]: one for each D / G rows of a matrix
    topk_weight: Tensor | None,  # [T]
    key_mask: Tensor | None,  # [B, Y, X] bool
    cu_seqlens: Tensor | None,  # [W + 1] int32, with Y = 1
    order: Tensor | None,  # [B, X] int32, with Y = 1: the token at each place
    normalize: bool,
    normalizer: str,
    topk: list[int],  # [T], [] for all
    window: list[int],  # its sides, [] for all tokens
    scale: float,
    eps: float,
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # out [B, Y, X, H, D], gram [B, W, H, D, E], squares [B, W, H, D + E]
    acc = torch.promote_types(q.dtype, torch.float32)
    batch, tokens = q.shape[0], q.shape[1] * q.shape[2]
    place = places(q, cu_seqlens, order, window)  # [B, W, L], N where a window has no token
    rows = []
    for t in (q, k, v):
        t = t.flatten(1, 2)  # [B, N, H, D]
        if key_mask is not None:
            t = t.masked_fill(~key_mask.flatten(1)[..., None, None], 0.0)  # [B, N, H, D]
        if place is None:
            rows.append(t[:, None].to(acc))  # [B, 1, N, H, D]
            continue
        t = torch.cat((t, t.new_zeros(batch, 1, *t.shape[2:])), 1)  # [B, N + 1, H, D]
        sample = torch.arange(batch, device=q.device)[:, None, None]  # [B, 1, 1]
        rows.append(t[sample, place].to(acc))  # [B, W, L, H, D]
    queries, keys, values = rows
    gram = torch.einsum("bwnhd,bwnhe->bwhde", queries, keys)  # [B, W, H, D, E]
    squares = torch.cat((queries.square().sum(2), keys.square().sum(2)), -1)  # [B, W, H, D + E]
    base = gram * scale  # [B, W, H, D, E]
    if normalize:
        safe = squares.where(squares > 0, 1.0).sqrt().where(squares > 0, 0.0).clamp(min=eps)  # [B, W, H, D + E]
        a, b = safe.split((q.shape[4], k.shape[4]), -1)  # [B, W, H, D], [B, W, H, E]
        base = base / (a[..., None] * b[..., None, :])  # [B, W, H, D, E]
    logits = base  # [B, W, H, D, E]
    if temperature is not None and q.shape[3]:
        own = temperature.to(acc).unflatten(0, (q.shape[3], -1))  # [H, G]
        logits = base * own.repeat_interleave(q.shape[4] // own.shape[1], 1)[..., None]  # [B, W, H, D, E]
    p = weights(logits, topk, topk_weight, normalizer)  # [B, W, H, D, E]
    out = torch.einsum("bwhde,bwnhe->bwnhd", p, values)  # [B, W, L, H, D]
    if place is None:
        flat = out[:, 0]  # [B, N, H, D]
    else:
        flat = out.new_zeros(batch, tokens + 1, *out.shape[3:])  # [B, N + 1, H, D]
        flat = flat.index_put((sample, place), out)[:, :tokens]  # [B, N, H, D]
    if key_mask is not None:
        flat = flat.masked_fill(~key_mask.flatten(1)[..., None, None], 0.0)  # [B, N, H, D]
    out = flat.to(q.dtype).reshape(q.shape)  # [B, Y, X, H, D]
    return laid_out_like(q, out), gram, squares


def weights(logits: Tensor, topk: list[int], topk_weight: Tensor | None, normalizer: str) -> Tensor:
    """P from L, both [B, W, H, D, E]."""
    if not topk:
        return normalized(logits, None, normalizer)
    rank = logits.argsort(dim=-1, descending=True, stable=True).argsort(-1)  # [B, W, H, D, E]
    parts = [normalized(logits, rank < k, normalizer) for k in topk]  # of [B, W, H, D, E]
    if topk_weight is None:
        return parts[0]
    return sum(part * w.to(part.dtype) for part, w in zip(parts, topk_weight, strict=True))  # type: ignore[return-value]


def normalized(logits: Tensor, kept: Tensor | None, normalizer: str) -> Tensor:
    """The weights of the kept channels of each row, 0 for the others, [B, W, H, D, E]."""
    if normalizer in ("relu", "none"):
        p = logits.relu() if normalizer == "relu" else logits  # [B, W, H, D, E]
        return p if kept is None else p.masked_fill(~kept, 0.0)  # [B, W, H, D, E]
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)  # [B, W, H, D, E]
    top = logits.detach().amax(-1, keepdim=True)  # [B, W, H, D, 1]
    if normalizer == "plus1":
        top = top.clamp(min=0.0)  # [B, W, H, D, 1]
    e = (logits - top).exp()  # [B, W, H, D, E]
    total = e.sum(-1, keepdim=True)  # [B, W, H, D, 1]
    return e / (total + (-top).exp() if normalizer == "plus1" else total)  # [B, W, H, D, E]


def places(q: Tensor, cu_seqlens: Tensor | None, order: Tensor | None, window: list[int]) -> Tensor | None:
    """The tokens of every window, int64 [B, W, L]; None where all tokens are one window in their own order."""
    batch, high, wide = q.shape[:3]
    tokens = high * wide
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()  # [W]
        longest = int(lengths.max()) if len(lengths) else 0
        step = torch.arange(longest, device=q.device)  # [L]
        place = torch.where(step < lengths[:, None], cu_seqlens[:-1, None].long() + step, tokens)  # [W, L]
    elif window:
        grid = torch.arange(tokens, device=q.device).view(high, wide)  # [Y, X]
        pad = (0, -wide % window[1], 0, -high % window[0])
        grid = torch.nn.functional.pad(grid, pad, value=tokens)  # [Y', X']
        grid = grid.view(grid.shape[0] // window[0], window[0], grid.shape[1] // window[1], window[1])  # in windows
        place = grid.transpose(1, 2).reshape(-1, window[0] * window[1])  # [W, L]
    else:
        return None  # an order of tokens that are summed anyway
    place = place.expand(batch, -1, -1)  # [B, W, L]
    if order is not None:
        last = order.new_full((batch, 1), tokens)  # [B, 1]
        place = torch.cat((order, last), 1).long().gather(1, place.flatten(1)).view_as(place)  # [B, W, L]
    return place


def channels_first(q: Tensor) -> bool:
    """Whether tokens lie side by side in [B, Y, X, H, D], as in a map of a convolution."""
    return q.stride(2) == 1 and q.stride(4) != 1


def laid_out_like(q: Tensor, x: Tensor) -> Tensor:
    """x [B, Y, X, H, D] with tokens side by side where they are so in q, else contiguous."""
    if channels_first(q):
        return x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    return x.contiguous()
