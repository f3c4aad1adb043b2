"""cluster_tokens: which cluster every token joins, and the tokens that are centres.

    d_ij = max(|x_i|^2 + |x_j|^2 - 2 x_i.x_j, 0), d_ii = 0; a NaN counts as infinity
    nearest         label_i = the centre of least d, ties to the lowest
    dpc_knn         density peaks (Rodriguez and Laio 2014; Du et al. 2016; in vision transformers Zeng et al. 2022):
                    s_i = mean of d / C over the nearest tokens, itself among them        density_i = exp(-s_i)
                    delta_i^2 = min of d_ij / C over denser j (ties by position); for the densest the largest of the sample
                    centres: the k largest of density_i delta_i, compared as -s_i + log(delta_i^2) / 2, ties by position
    kmedoids        farthest-point start, or the k largest weights; then in turn every token joins its nearest medoid, and
                    the member with the least sum of w_j d_ij becomes the medoid, ties by position
    agglomerative   distance 1 - cosine; the closest pair, ties by positions, merges until k clusters remain; the distance
                    to a merged cluster is the size-weighted mean, the least or the largest of both

Centres stand by position, and so do the clusters of `agglomerative`, whose centre is their first token. A token that is a
centre joins itself. Masked tokens take no part; a sample with fewer than k real tokens leaves the last clusters unused.
"""

import math

import torch
from torch import Tensor

BLOCK = 1024  # tokens whose distances to all others exist at one time


def cluster_tokens(
    x: Tensor,  # [B, N, C]
    centers: Tensor | None,  # [B, k, C], for "nearest"
    mask: Tensor | None,  # [B, N] bool, True for a real token
    weight: Tensor | None,  # [B, N], for "kmedoids"
    method: str,  # "nearest", "dpc_knn", "kmedoids", "agglomerative"
    k: int,
    neighbors: int,
    iters: int,
    linkage: str,  # "average", "single", "complete"
    gpu: str = "",
) -> tuple[Tensor, Tensor, Tensor]:  # label [B, N] int32, index [B, k] int32, distance [B, N]
    acc = torch.promote_types(x.dtype, torch.float32)  # float32; float64 stays float64
    batch, tokens, _ = x.shape
    real = torch.ones(batch, tokens, dtype=torch.bool, device=x.device) if mask is None else mask  # [B, N]
    v = x.detach().to(acc).masked_fill(~real[..., None], 0.0)  # [B, N, C]
    used = real.sum(1, keepdim=True) > torch.arange(k, device=x.device)  # [B, k]
    index = torch.zeros(batch, k, dtype=torch.int64, device=x.device)  # [B, k]
    if method == "nearest":
        assert centers is not None
        label, distance = nearest(v, centers.detach().to(acc))  # [B, N], [B, N]
    elif method == "agglomerative":
        label, index = agglomerative(v, real, k, linkage)  # [B, N], [B, k]
        distance = v.new_zeros(batch, tokens)  # [B, N]
    else:
        if method == "dpc_knn":
            index = density_peaks(v, real, k, neighbors)  # [B, k]
        else:
            w = torch.ones_like(v[..., 0]) if weight is None else weight.detach().to(acc)  # [B, N]
            first = farthest(v, real, k) if weight is None else largest(w, real, k)  # [B, k]
            index = medoids(v, real, w, by_position(first, used, tokens), used, iters)  # [B, k]
        index = by_position(index, used, tokens)  # [B, k]
        label, distance = join(v, index, used)  # [B, N], [B, N]
    label = label.masked_fill(~real, k)  # [B, N]
    index = index.masked_fill(~used, 0)  # [B, k]
    return label.to(torch.int32), index.to(torch.int32), distance.masked_fill(~real, 0.0)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """d of every row of a [B, R, C] to every row of b [B, M, C]: [B, R, M]."""
    d = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None, :] - 2 * (a @ b.mT)  # [B, R, M]
    return d.masked_fill(d.isnan(), math.inf).clamp(min=0.0)  # [B, R, M]


def first_of(d: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The least of every row of d [..., M] among the allowed entries, and the smallest place it stands at: [...] each."""
    allowed = torch.ones_like(d, dtype=torch.bool) if allowed is None else allowed  # [..., M]
    least = torch.where(allowed, d, math.inf).amin(-1)  # [...]
    place = torch.arange(d.shape[-1], device=d.device)  # [M]
    here = allowed & (d <= least[..., None])  # [..., M]
    return least, torch.where(here, place, d.shape[-1] - 1).amin(-1)  # [...], [...]


def blocks(tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """The positions, some at a time."""
    return torch.arange(tokens, device=device).split(tokens if torch.compiler.is_compiling() else BLOCK)  # [R] each


def nearest(v: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the centers [B, k, C] and its distance: [B, N], [B, N]."""
    if v.shape[1] == 0:
        return v.new_zeros(v.shape[:2], dtype=torch.int64), v.new_zeros(v.shape[:2])  # [B, 0], [B, 0]
    found = [first_of(squared_distances(v[:, i], centers)) for i in blocks(v.shape[1], v.device)]  # [B, R] each
    return torch.cat([label for _, label in found], 1), torch.cat([d for d, _ in found], 1)  # [B, N], [B, N]


def join(v: Tensor, index: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the tokens at index [B, k], of those in use; a centre joins itself: [B, N], [B, N]."""
    picked = rows_at(v, index)  # [B, k, C]
    picked = picked.masked_fill(~used[..., None], math.inf)  # [B, k, C]
    label, distance = nearest(v, picked)  # [B, N], [B, N]
    slot = torch.arange(index.shape[1], device=v.device).expand(index.shape)  # [B, k]
    spare = v.shape[1]
    to = torch.where(used, index, spare)  # [B, k] an unused centre writes beside the tokens
    label = torch.nn.functional.pad(label, (0, 1)).scatter(1, to, slot)[:, :spare]  # [B, N]
    zero = torch.zeros_like(slot, dtype=distance.dtype)  # [B, k]
    distance = torch.nn.functional.pad(distance, (0, 1)).scatter(1, to, zero)[:, :spare]  # [B, N]
    return label, distance


def rows_at(v: Tensor, index: Tensor) -> Tensor:
    """The rows of v [B, N, C] at index [B, k]: [B, k, C]."""
    return v.gather(1, index[..., None].expand(-1, -1, v.shape[2]))  # [B, k, C]


def by_position(index: Tensor, used: Tensor, tokens: int) -> Tensor:
    """index [B, k] ascending, the unused ones last (as 0)."""
    ordered = torch.where(used, index, tokens).sort(1).values  # [B, k]
    return ordered.masked_fill(~used, 0)  # [B, k]


def largest(score: Tensor, real: Tensor, k: int) -> Tensor:
    """The positions of the k largest scores [B, N] of real tokens, ties by position; NaN counts as -inf: [B, k]."""
    order = score.masked_fill(score.isnan(), -math.inf).argsort(dim=1, descending=True, stable=True)  # [B, N]
    behind = (~real).gather(1, order).to(torch.int8).argsort(dim=1, stable=True)  # [B, N] real tokens first
    return order.gather(1, behind)[:, :k]  # [B, k]


def density_peaks(v: Tensor, real: Tensor, k: int, neighbors: int) -> Tensor:
    """The k density peaks, [B, k]."""
    batch, tokens, width = v.shape
    count = real.sum(1, keepdim=True).clamp(max=neighbors)  # [B, 1]
    nearer = torch.arange(min(neighbors, tokens), device=v.device) < count[..., None]  # [B, 1, K]
    spread, widest = [], []
    for i in blocks(tokens, v.device):
        d = distances_of(v, real, i)  # [B, R, N]
        near = d.topk(min(neighbors, tokens), dim=-1, largest=False).values  # [B, R, K]
        spread.append(near.masked_fill(~nearer, 0.0).sum(-1) / (count * width))  # [B, R]
        seen = real[:, i, None] & real[:, None, :]  # [B, R, N]
        widest.append(d.masked_fill(~seen, 0.0).amax((1, 2)))  # [B]
    s = torch.cat(spread, 1).masked_fill(~real, math.inf)  # [B, N]
    rank = s.argsort(dim=1, stable=True).argsort(1)  # [B, N]
    delta = []
    for i in blocks(tokens, v.device):
        denser = (rank[:, None, :] < rank[:, i, None]) & real[:, None, :]  # [B, R, N]
        delta.append(distances_of(v, real, i).masked_fill(~denser, math.inf).amin(-1))  # [B, R]
    top = torch.stack(widest).amax(0)[:, None]  # [B, 1]
    delta_squared = torch.where(rank == 0, top, torch.cat(delta, 1)) / width  # [B, N]
    return largest(delta_squared.log() / 2 - s, real, k)  # [B, k]


def distances_of(v: Tensor, real: Tensor, i: Tensor) -> Tensor:
    """d of the tokens at i [R] to all tokens, 0 to themselves, infinite to masked ones: [B, R, N]."""
    itself = i[:, None] == torch.arange(v.shape[1], device=v.device)  # [R, N]
    d = squared_distances(v[:, i], v).masked_fill(itself, 0.0)  # [B, R, N]
    return d.masked_fill(~real[:, None, :], math.inf)  # [B, R, N]


def farthest(v: Tensor, real: Tensor, k: int) -> Tensor:
    """The first real token, then k - 1 times the token farthest from those chosen, ties by position: [B, k]."""
    chosen: list[Tensor] = []
    gap = torch.full_like(v[..., 0], math.inf)  # [B, N]
    for _ in range(k):
        free = real  # [B, N]
        for earlier in chosen:
            free = free & (torch.arange(v.shape[1], device=v.device) != earlier)  # [B, N]
        _, place = first_of(-gap, free)  # [B]
        chosen.append(place[:, None])  # [B, 1]
        d = squared_distances(v, rows_at(v, place[:, None]))[..., 0]  # [B, N]
        gap = torch.minimum(gap, d)  # [B, N]
    return torch.cat(chosen, 1)  # [B, k]


def medoids(v: Tensor, real: Tensor, w: Tensor, index: Tensor, used: Tensor, iters: int) -> Tensor:
    """The medoids after `iters` turns from index [B, k], by position: [B, k]."""
    tokens = v.shape[1]
    slot = torch.arange(index.shape[1], device=v.device)  # [k]
    for _ in range(iters):
        label, _ = join(v, index, used)  # [B, N]
        costs = []
        for i in blocks(tokens, v.device):
            together = (label[:, i, None] == label[:, None, :]) & real[:, None, :]  # [B, R, N]
            counts = together & (w[:, None, :] > 0)  # [B, R, N]
            costs.append(torch.where(counts, w[:, None, :] * distances_of(v, real, i), 0.0).sum(-1))  # [B, R]
        cost = torch.cat(costs, 1)  # [B, N]
        member = (label[:, None, :] == slot[:, None]) & real[:, None, :]  # [B, k, N]
        _, place = first_of(cost[:, None, :].expand(member.shape), member)  # [B, k]
        index = by_position(place, used, tokens)  # [B, k]
    return index


def agglomerative(v: Tensor, real: Tensor, k: int, linkage: str) -> tuple[Tensor, Tensor]:
    """label [B, N] and the first token of every cluster [B, k]."""
    batch, tokens, _ = v.shape
    position = torch.arange(tokens, device=v.device)  # [N]
    unit = v / v.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)  # [B, N, C]
    d = 1 - unit @ unit.mT  # [B, N, N]
    d = d.masked_fill(d.isnan(), math.inf)  # [B, N, N]
    root = position.repeat(batch, 1)  # [B, N] the first token of every token's cluster
    size = torch.ones_like(v[..., 0])  # [B, N]
    alive = real.clone()  # [B, N]
    for _ in range(max(0, tokens - k)):
        more = alive.sum(1) > k  # [B]
        pair = alive[:, :, None] & alive[:, None, :] & (position[:, None] < position)  # [B, N, N]
        _, place = first_of(d.flatten(1), pair.flatten(1))  # [B]
        i, j = (place // tokens)[:, None], (place % tokens)[:, None]  # [B, 1], [B, 1]
        di, dj = rows_at(d, i)[:, 0], rows_at(d, j)[:, 0]  # [B, N], [B, N]
        ni, nj = size.gather(1, i), size.gather(1, j)  # [B, 1], [B, 1]
        if linkage == "average":
            joined = (ni * di + nj * dj) / (ni + nj)  # [B, N]
        else:
            joined = torch.minimum(di, dj) if linkage == "single" else torch.maximum(di, dj)  # [B, N]
        at_i, at_j = (position == i) & more[:, None], (position == j) & more[:, None]  # [B, N], [B, N]
        d = torch.where(at_i[:, :, None], joined[:, None, :], d)  # [B, N, N]
        d = torch.where(at_i[:, None, :], joined[:, :, None], d)  # [B, N, N]
        size = torch.where(at_i, ni + nj, size)  # [B, N]
        alive = alive & ~at_j  # [B, N]
        root = torch.where((root == j) & more[:, None], i, root)  # [B, N]
    index = largest(torch.zeros_like(size), alive, k)  # [B, k]
    slot = alive.cumsum(1) - 1  # [B, N] the cluster that a first token heads
    return slot.gather(1, root), index  # [B, N], [B, k]
