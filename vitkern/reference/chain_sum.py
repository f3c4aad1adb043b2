"""chain_sum: what linear attention with decay sums along a chain of tokens, a state for every head (retention, Sun et al. 2023;
gated linear attention, Yang et al. 2024).

    S <- exp(log_decay) S + b_t c_t^T      out_t = S^T a_t

in the order of the visits; strict: out_t is read before b_t c_t^T is added. In reverse the chain is walked from its end, and the link
between two tokens is still that of the later one. A sequence is cut into blocks of `block` visits, whose first visit starts from 0.
All of it is float32 (float64 for float64).
"""

import torch
from torch import Tensor


def chain_sum(
    a: Tensor,  # [B, N, H, F]
    b: Tensor,  # [B, N, H, F]
    c: Tensor,  # [B, N, H, C]
    log_decay: Tensor
    | None,  # [B, N, H, 1], [B, N, H, F] for the rows of S, or [B, N, H, C] for its columns: of the link to a token
    state: Tensor | None,  # [S, H, F, C]: S before the first visit
    order: Tensor | None,  # [N] int32: the token of each visit
    cu_seqlens: Tensor | None,  # [S + 1] int32 with B = 1: the visits that begin a sequence
    columns: bool,  # whether log_decay is one of columns
    reverse: bool,
    strict: bool,
    block: int,  # 0: no blocks
    gpu: str = "",
) -> tuple[Tensor, Tensor]:
    """``out [B, N, H, C]``; ``last [S, H, F, C]``: S behind the last visit, in reverse times the decay of the first link."""
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    batch, tokens, heads = a.shape[:3]
    visits = slice(None) if order is None else order.long()  # [N]
    x, y, z = (t.to(acc)[:, visits] for t in (a, b, c))  # [B, N, H, .], visit by visit
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    decay = None
    if log_decay is not None:
        decay = log_decay.to(acc)[:, visits].exp()  # [B, N, H, 1|F|C]
        decay = decay[..., None, :] if columns else decay[..., None]  # [B, N, H, 1, 1|C] or [B, N, H, 1|F, 1]
    kept, ends = [], []
    for w, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        zero = x.new_zeros(batch, heads, a.shape[3], c.shape[3])  # [B, H, F, C]
        first = slice(None) if cu_seqlens is None else slice(w, w + 1)
        s = zero if state is None else state[first].to(acc)  # [B, H, F, C]
        moved: list[Tensor] = []
        steps = range(end - 1, begin - 1, -1) if reverse else range(begin, end)
        for step in steps:
            link = step + 1 if reverse else step  # the visit whose link is crossed
            if block and link < end and (link - begin) % block == 0 and link > begin:
                s = zero
            if decay is not None and link < end:
                s = decay[:, link] * s  # [B, H, F, C]
            before = s
            s = s + y[:, step, :, :, None] * z[:, step, :, None]  # [B, H, F, C]
            moved.append((x[:, step, :, None] @ (before if strict else s))[:, :, 0])  # [B, H, C]
        if reverse and decay is not None and end > begin:
            s = decay[:, begin] * s  # [B, H, F, C]
        kept += reversed(moved) if reverse else moved
        ends.append(s)
    out = torch.stack(kept, 1) if kept else x.new_zeros(batch, 0, heads, c.shape[3])  # [B, N, H, C], visit by visit
    last = torch.cat(ends) if ends else x.new_zeros(0, heads, a.shape[3], c.shape[3])  # [S, H, F, C]
    return out if order is None else out[:, torch.argsort(visits)], last


def chain_links(
    dout: Tensor,  # [B, N, H, C]
    a: Tensor,  # [B, N, H, F]
    b: Tensor,  # [B, N, H, F]
    c: Tensor,  # [B, N, H, C]
    log_decay: Tensor,  # [B, N, H, 1|F|C]
    state: Tensor | None,  # [S, H, F, C]
    dlast: Tensor | None,  # [S, H, F, C]
    order: Tensor | None,  # [N] int32
    cu_seqlens: Tensor | None,  # [S + 1] int32
    columns: bool,
    reverse: bool,
    block: int,
    gpu: str = "",
) -> Tensor:
    """The gradient of log_decay, where dout and dlast are those of chain_sum: of each link ``<decayed S, its gradient>``."""
    acc = torch.promote_types(torch.promote_types(a.dtype, c.dtype), torch.float32)
    visits = slice(None) if order is None else order.long()  # [N]
    x, y, z, g, rate = (t.to(acc)[:, visits] for t in (a, b, c, dout, log_decay))  # [B, N, H, .], visit by visit
    decay = rate.exp()[..., None, :] if columns else rate.exp()[..., None]  # [B, N, H, 1, 1|C] or [B, N, H, 1|F, 1]
    bounds = [0, a.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    found = torch.zeros_like(rate)  # [B, N, H, 1|F|C]
    for w, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = slice(None) if cu_seqlens is None else slice(w, w + 1)
        zero = x.new_zeros(a.shape[0], a.shape[2], a.shape[3], c.shape[3])  # [B, H, F, C]
        s = zero if state is None else state[own].to(acc)  # [B, H, F, C]
        steps = list(range(end - 1, begin - 1, -1) if reverse else range(begin, end))
        links = [step + 1 if reverse else step for step in steps]
        anew = [bool(block) and begin < i < end and (i - begin) % block == 0 for i in links]
        into = []  # S decayed, into every step
        for step, link, cut in zip(steps, links, anew, strict=True):
            s = zero if cut else s
            s = s * decay[:, link] if link < end else s  # [B, H, F, C]
            into.append(s)
            s = s + y[:, step, :, :, None] * z[:, step, :, None]  # [B, H, F, C]
        back = zero if dlast is None else dlast[own].to(acc)  # [B, H, F, C]
        if reverse and steps:
            back = back * decay[:, begin]  # [B, H, F, C]
            found[:, begin] += _product(back, s, rate, columns)
        for i in range(len(steps) - 1, -1, -1):
            back = back + x[:, steps[i], :, :, None] * g[:, steps[i], :, None]  # [B, H, F, C]
            if links[i] < end:
                found[:, links[i]] += _product(back, into[i], rate, columns)
                back = zero if anew[i] else back * decay[:, links[i]]  # [B, H, F, C]
    return found if order is None else found[:, torch.argsort(visits)]


def _product(back: Tensor, s: Tensor, rate: Tensor, columns: bool) -> Tensor:
    """``[B, H, 1|F|C]``."""
    both = (back * s).sum(-2 if columns else -1)  # [B, H, F|C]
    return both.sum(-1, keepdim=True) if rate.shape[-1] == 1 else both
