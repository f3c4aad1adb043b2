"""selective_scan and selective_scan_2d: a state for every channel, carried along a route (Mamba, Gu and Dao 2023; VMamba, Liu
et al. 2024). Everything is indexed by token; a route only says in which order the tokens are visited.

    d_l = delta_l + delta_bias, softplus of it if asked          h_l = exp(d_l A) h_(l-1) + d_l u_l B_l
    y_l = <C_l, h_l> + D u_l                                     out = the sum (mean, stack) of y silu(z) over the routes

States are float32 (float64 for float64), out is rounded once.
"""

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,  # [N, L, R or 1, C]
    delta: Tensor,  # [N, L, R, C], with delta_weight [N, L, R, K]
    a: Tensor,  # [R, C, S]
    b: Tensor,  # [N, L, R, G, S]
    c: Tensor,  # [N, L, R, G, S]
    d: Tensor | None,  # [R, C]
    z: Tensor | None,  # [N, L, R or 1, C]
    delta_bias: Tensor | None,  # [R, C]
    initial_state: Tensor | None,  # [N, R, W, C, S]
    delta_weight: Tensor | None,  # [R, C, K]
    routes: Tensor,  # [R, L] int32: the token at each step
    cu_seqlens: Tensor | None,  # [W + 1] int32, with N = 1: the steps at which a state starts anew
    softplus: bool,
    reduce: str,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # state [N, R, W, C, S]; out [N, L, C], with "stack" [N, L, R, C]
    acc = torch.promote_types(u.dtype, torch.float32)
    batch, length, _, channels = u.shape
    x, step = u.to(acc).expand(-1, -1, len(a), -1), delta.to(acc)  # [N, L, R, C] twice
    if delta_weight is not None:
        step = torch.einsum("nlrk,rck->nlrc", step, delta_weight.to(acc))  # [N, L, R, C]
    if delta_bias is not None:
        step = step + delta_bias.to(acc)  # [N, L, R, C]
    if softplus:
        step = torch.nn.functional.softplus(step)  # [N, L, R, C]; itself above 20
    share = channels // b.shape[3]
    gain, read = (t.to(acc).repeat_interleave(share, 3) for t in (b, c))  # [N, L, R, C, S]
    visit = torch.arange(length, dtype=torch.int32, device=u.device)  # [L]
    bounds = (
        torch.stack((visit.new_zeros(()), visit.new_full((), length))) if cu_seqlens is None else cu_seqlens
    )  # [W + 1]
    own = torch.searchsorted(bounds[1:], visit, right=True)  # [L]: the sequence of each visit
    anew = bounds[own] == visit  # [L]
    outs, ends = [], []
    for r, rate in enumerate(a.to(acc)):  # [C, S]
        zero = x.new_zeros(batch, len(bounds) - 1, *rate.shape)  # [N, W, C, S]
        start = zero if initial_state is None else initial_state[:, r].to(acc)  # [N, W, C, S]
        order = routes[r].long()  # [L]
        now, given = step[:, order, r, :, None], x[:, order, r, :, None]  # [N, L, C, 1] twice
        decay = (now * rate).exp()  # [N, L, C, S]
        moved = now * given * gain[:, order, r]  # [N, L, C, S]
        entry = start[:, own]  # [N, L, C, S]
        h, kept = x.new_zeros(batch, *rate.shape), []  # [N, C, S]
        for at in range(length):
            h = decay[:, at] * torch.where(anew[at], entry[:, at], h) + moved[:, at]  # [N, C, S]
            kept.append(h)
        states = torch.stack(kept, 1) if kept else moved  # [N, L, C, S]
        y = (states * read[:, order, r]).sum(-1)[:, order.argsort()]  # [N, L, C]
        outs.append(y if d is None else y + d[r].to(acc) * x[:, :, r])  # [N, L, C]
        last = states[:, (bounds[1:].long() - 1).clamp(min=0)] if length else start  # [N, W, C, S]
        ends.append(torch.where((bounds[1:] == bounds[:-1])[:, None, None], start, last))  # [N, W, C, S]
    out = torch.stack(outs, 2)  # [N, L, R, C]
    if z is not None:
        out = out * torch.nn.functional.silu(z.to(acc))  # [N, L, R, C]
    if reduce != "stack":
        out = out.sum(2) / (len(outs) if reduce == "mean" else 1)  # [N, L, C]
    return torch.stack(ends, 1), out.to(u.dtype)  # [N, R, W, C, S], out
