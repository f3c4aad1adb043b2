"""selective_scan and selective_scan_2d: a state for every channel, carried along a route (Mamba, Gu and Dao 2023; VMamba, Liu
et al. 2024). Everything is indexed by token; a route only says in which order the tokens are visited.

    d_l = delta_l + delta_bias, softplus of it if asked          h_l = exp(d_l A) h_(l-1) + d_l u_l B_l
    y_l = <C_l, h_l> + D u_l                                     out = the sum (mean, stack) of y over the routes, times silu(z)

States are float32 (float64 for float64), out is rounded once.
"""

import torch
from torch import Tensor


def selective_scan(
    u: Tensor,  # [N, L, C]
    delta: Tensor,  # [N, L, R, C]
    a: Tensor,  # [R, C, S]
    b: Tensor,  # [N, L, R, G, S]
    c: Tensor,  # [N, L, R, G, S]
    d: Tensor | None,  # [R, C]
    z: Tensor | None,  # [N, L, C]
    delta_bias: Tensor | None,  # [R, C]
    initial_state: Tensor | None,  # [N, R, W, C, S]
    routes: Tensor,  # [R, L] int32: the token at each step
    cu_seqlens: Tensor | None,  # [W + 1] int32, with N = 1: the steps at which a state starts anew
    softplus: bool,
    reduce: str,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # state [N, R, W, C, S]; out [N, L, C], with "stack" [N, L, R, C]
    acc = torch.promote_types(u.dtype, torch.float32)
    batch, length, channels = u.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    x, step = u.to(acc), delta.to(acc)  # [N, L, C], [N, L, R, C]
    if delta_bias is not None:
        step = step + delta_bias.to(acc)  # [N, L, R, C]
    if softplus:
        step = torch.nn.functional.softplus(step)  # [N, L, R, C]; itself above 20
    share = channels // b.shape[3]
    gain, read = (t.to(acc).repeat_interleave(share, 3) for t in (b, c))  # [N, L, R, C, S]
    outs, ends = [], []
    for r, rate in enumerate(a.to(acc)):  # [C, S]
        visited, finals = [], []
        order = routes[r].tolist()
        for w, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
            h = (
                x.new_zeros(batch, *rate.shape) if initial_state is None else initial_state[:, r, w].to(acc)
            )  # [N, C, S]
            for token in order[first:last]:
                now = step[:, token, r, :, None]  # [N, C, 1]
                h = (now * rate).exp() * h + now * x[:, token, :, None] * gain[:, token, r]  # [N, C, S]
                visited.append((h * read[:, token, r]).sum(-1))  # [N, C]
            finals.append(h)
        ends.append(torch.stack(finals, 1) if finals else x.new_zeros(batch, 0, *rate.shape))  # [N, W, C, S]
        y = torch.stack(visited, 1)[:, routes[r].long().argsort()] if visited else x  # [N, L, C]
        outs.append(y if d is None else y + d[r].to(acc) * x)  # [N, L, C]
    out = torch.stack(outs, 2)  # [N, L, R, C]
    if reduce != "stack":
        out = out.sum(2, keepdim=True) / (len(outs) if reduce == "mean" else 1)  # [N, L, 1, C]
    if z is not None:
        out = out * torch.nn.functional.silu(z.to(acc))[:, :, None]  # [N, L, R or 1, C]
    out = out if reduce == "stack" else out[:, :, 0]  # [N, L, C]
    return torch.stack(ends, 1), out.to(u.dtype)  # [N, R, W, C, S], out
