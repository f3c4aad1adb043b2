"""reconstruct_tokens: every token from the outputs of the centres nearest to it (Liang et al. 2022).

d_nm = max(|x_n|^2 + |c_m|^2 - 2 x_n.c_m, 0)         a_nm = -temperature d_nm
kept: the a_nm at least as large as the k-th largest of row n, all ties; a constant for the gradient
w_nm = exp(a_nm - max_m a_nm) where kept, else 0
"l1": p_nm = w_nm / sum_m w_nm          "l2": p_nm = w_nm / sqrt(sum_m w_nm^2)
out_n = sum_m p_nm y_m
"""

import torch
from torch import Tensor

from vitkern.reference.cluster_tokens import squared_distances


def reconstruct_tokens(
    y: Tensor,  # [B, M, C]
    x: Tensor,  # [B, N, E]
    centers: Tensor,  # [B, M, E]
    k: int,
    temperature: float,
    l2: bool,
    gpu: str = "",
) -> Tensor:  # [B, N, C]
    acc = torch.promote_types(x.dtype, torch.float32)  # float32; float64 stays float64
    a = -temperature * squared_distances(x.to(acc), centers.to(acc))  # [B, N, M]
    sorted_a = a.detach().topk(min(k, a.shape[2]), dim=2).values  # [B, N, K]
    top, cut = sorted_a[..., :1], sorted_a[..., -1:]  # [B, N, 1], [B, N, 1]
    w = (a - top).exp() * (a >= cut)  # [B, N, M]
    norm = w.square().sum(2, keepdim=True).sqrt() if l2 else w.sum(2, keepdim=True)  # [B, N, 1]
    return ((w / norm) @ y.to(acc)).to(y.dtype)  # [B, N, C]
