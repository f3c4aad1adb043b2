"""How important tokens are, by published formulas: nothing of size N x N is stored."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _checks
from vitkern.ops.attention import attention

BLOCK = 128  # rows whose similarities exist at one time


def token_energy(metric: Tensor, margin: float, *, alpha: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """How much company every token has (PiToMe, Tran et al. 2024): ``E_i = mean_j ELU(s_ij - margin)``.

    s is the cosine similarity, ``ELU(t) = t`` above 0 and ``alpha (exp(t) - 1)`` below; j runs over all real tokens, i
    among them. PiToMe protects tokens of low energy, takes ``margin = 0.9 - 0.9 layer / layers``, and leaves the class
    token out: pass ``metric[:, 1:]``.

    Args:
        metric: ``[B, N, C]``, or keys ``[B, N, H, C]``, whose mean over the heads is taken: float32, float64, bfloat16 or
            float16. No gradient flows.
        margin: above it a similarity counts as it is.
        alpha: of the ELU.
        mask: bool ``[B, N]``, True for a real token; the others have energy ``-inf`` and are nobody's company.

    Returns:
        ``[B, N]`` float32.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    name = "merging.token_energy"
    _checks.tensor(name, "metric", metric)
    _checks.floating(name, "metric", metric)
    if metric.dim() not in (3, 4):
        raise ValueError(f"{name}: metric must have shape [B, N, C] or [B, N, H, C], got {list(metric.shape)}")
    for label, value in (("margin", margin), ("alpha", alpha)):
        _checks.number(name, label, value)
    m = metric.detach().to(torch.promote_types(metric.dtype, torch.float32))  # [B, N, (H,) C]
    m = m.mean(2) if m.dim() == 4 else m  # [B, N, C]
    m = m / m.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)  # [B, N, C]
    real = None
    if mask is not None:
        _checks.flags(name, "mask", mask, tuple(m.shape[:2]), "metric", m.device)
        m = m.masked_fill(~mask[..., None], 0.0)  # [B, N, C]
        real = mask.to(m.dtype)[:, :, None]  # [B, N, 1]
    count = m.shape[1] if real is None else real.sum(1).clamp(min=1.0)  # [B, 1]
    energy = torch.empty_like(m[..., 0])  # [B, N]
    for rows, total in zip(m.split(BLOCK, 1), energy.split(BLOCK, 1), strict=True):
        near = torch.nn.functional.elu(rows @ m.mT - margin, alpha)  # [B, R, N]
        total.copy_(near.sum(-1) if real is None else (near @ real)[..., 0])  # [B, R]
    energy = energy / count  # [B, N]
    if mask is not None:
        energy = energy.masked_fill(~mask, -torch.inf)
    return energy.float()


def attention_rank(
    q: Tensor,
    k: Tensor,
    *,
    rounds: int = 50,
    scale: float | None = None,
    variance: tuple[float, float] | None = (0.01, 0.7),
) -> Tensor:
    """The weighted page rank of tokens in their attention graph (Zero-TPrune, Wang et al. 2024).

    In every head, from ``s = 1 / N``, `rounds` times ``s_j = sum_i s_i P_ij`` with ``P = softmax(scale q kᵀ)``: the
    attention each key receives, queries weighted by their own importance. Heads are joined by the root of the mean of s²
    over those whose variance of ``N s`` (of mean 1) lies in `variance`; over all, where none does. The paper runs 30 to 50
    rounds in the first layers, 5 to 10 in the middle and 1 in the last, and gives the bounds without their scale.

    Args:
        q, k: ``[B, N, H, D]``, of one shape: float32, float64, bfloat16 or float16. No gradient flows.
        rounds: at least 1.
        scale: of the logits; None for ``D ** -0.5``.
        variance: the bounds; None for all heads.

    Returns:
        ``[B, N]`` float32, for the `score` of :func:`vitkern.select_tokens`.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    name = "merging.attention_rank"
    for label, t in (("q", q), ("k", k)):
        _checks.tensor(name, label, t)
        _checks.floating(name, label, t)
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"{name}: q must have shape [B, N, H, D] with at least one token, got {list(q.shape)}")
    _checks.shape(name, "k", k, tuple(q.shape), "[B, N, H, D] of q")
    _checks.on_device(name, "k", k, "q", q.device)
    _checks.integer(name, "rounds", rounds, 1)
    bounds = _bounds(name, variance)
    tokens = q.shape[1]
    acc = torch.promote_types(q.dtype, k.dtype)
    left, right = q.detach().to(acc), k.detach().to(acc)
    s = left.new_full(q.shape[:3], 1.0 / tokens, dtype=torch.promote_types(acc, torch.float32))  # [B, N, H]
    for _ in range(rounds):
        _, stats = attention(left, right, None, scale=scale, return_stats=("key_mean",), query_weight=s)
        s = stats.key_mean  # [B, N, H]
    s = s.transpose(1, 2)  # [B, H, N]
    return _joined(s, tokens, bounds).float()


def _bounds(name: str, variance: Any) -> tuple[float, float] | None:
    if variance is None:
        return None
    if not isinstance(variance, (tuple, list)) or len(variance) != 2:
        raise ValueError(f"{name}: variance must be a pair (least, most) or None, got {variance!r}")
    return float(variance[0]), float(variance[1])


def _joined(s: Tensor, tokens: int, bounds: tuple[float, float] | None) -> Tensor:
    """The root of the mean square over the heads that pass, [B, N] from [B, H, N]."""
    used = torch.ones_like(s[..., :1])  # [B, H, 1]
    if bounds is not None:
        spread = (s * tokens).var(-1, unbiased=False, keepdim=True)  # [B, H, 1]
        used = ((spread >= bounds[0]) & (spread <= bounds[1])).to(s.dtype)  # [B, H, 1]
        used = torch.where(used.sum(1, keepdim=True) == 0, 1.0, used)  # [B, H, 1]
    return ((s.square() * used).sum(1) / used.sum(1)).sqrt()  # [B, N]
