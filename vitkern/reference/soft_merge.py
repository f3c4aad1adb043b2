"""soft_merge: every slot a weighted sum of all tokens (TokenLearner, Ryoo et al. 2021; PatchMerger, Renggli et al. 2022).

    s_nm = scale l_nm         y_m = sum_n W_nm x_n, with `renormalize` over max(sum_n W_nm, renormalize)
    "softmax": exp(s + ln weight) over its sum, over the tokens or over the slots      "sigmoid": 1 / (1 + exp(-s))
    "none": s      "l2": s_nm / max(|s_.m|, 1e-12)
    "sinkhorn": Z = s / eps, v = 0; iters times u_m = -LSE_n(Z + v), v_n = -LSE_m(Z + u); exp(Z + u + v)

Tokens that are masked or have weight 0 take no part; a slot without tokens gives 0. All of it is float32 (float64 for
float64), y too: who rounds it to the dtype of x rounds once.
"""

import torch
from torch import Tensor


def soft_merge(
    x: Tensor,  # [B, N, C]
    logits: Tensor,  # [B, N, M]
    weight: Tensor | None,  # [B, N]
    mask: Tensor | None,  # [B, N] bool
    axis: str,
    normalize: str,
    scale: float,
    renormalize: float,  # 0: not
    eps: float,
    iters: int,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # total [B, M]: the sum of the weights of each slot; y [B, M, C]
    acc = torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)  # float32 or float64
    used = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask  # [B, N]
    if weight is not None:
        used = used & (weight > 0)  # [B, N]
    hidden = ~used[..., None]  # [B, N, 1]
    s = logits.to(acc) * scale  # [B, N, M]
    s = s.masked_fill(hidden, -torch.inf if normalize in ("softmax", "sinkhorn") else 0.0)  # [B, N, M]
    if weight is not None:
        s = s + weight.to(acc).where(used, 1.0).log()[..., None]  # [B, N, M]
    if normalize == "softmax":
        dim = 1 if axis == "token" else 2
        w = (s - largest(s, dim)).exp()  # [B, N, M]
        mass = w.sum(dim, keepdim=True)  # [B, 1, M] or [B, N, 1]
        w = w / mass.masked_fill(mass == 0, 1.0)  # [B, N, M]
    elif normalize == "sinkhorn":
        z = s / eps  # [B, N, M]
        v = torch.zeros_like(z[..., :1])  # [B, N, 1]
        for _ in range(iters):
            u = -log_sum_exp(z + v, 1)  # [B, 1, M]
            v = -log_sum_exp(z + u, 2)  # [B, N, 1]
        w = (z + u + v).exp()  # [B, N, M]
    elif normalize == "sigmoid":
        w = s.sigmoid().masked_fill(hidden, 0.0)  # [B, N, M]
    elif normalize == "l2":
        w = s / torch.linalg.vector_norm(s, dim=1, keepdim=True).clamp(min=1e-12)  # [B, N, M]
    else:
        w = s  # [B, N, M]
    total = w.sum(1)  # [B, M]
    y = w.mT @ x.to(acc).masked_fill(hidden, 0.0)  # [B, M, C]
    if renormalize:
        y = y / total.clamp(min=renormalize)[..., None]  # [B, M, C]
    return total, y  # [B, M], [B, M, C]


def log_sum_exp(s: Tensor, dim: int) -> Tensor:
    """ln sum exp along one axis, kept; 0 where every term is -inf: what is hidden stays hidden whatever is subtracted."""
    top = largest(s, dim)  # [B, 1, M] or [B, N, 1]
    total = (s - top).exp().sum(dim, keepdim=True)  # the same
    empty = total == 0  # the same
    return (total.masked_fill(empty, 1.0).log() + top).masked_fill(empty, 0.0)  # the same


def largest(s: Tensor, dim: int) -> Tensor:
    """The maximum along one axis, kept, without gradient; 0 where every term is -inf."""
    top = s.detach().amax(dim, keepdim=True)  # [B, 1, M] or [B, N, 1]
    return top.masked_fill(top == -torch.inf, 0.0)  # the same
