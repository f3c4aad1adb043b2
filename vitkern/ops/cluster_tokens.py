"""cluster_tokens: argument checks, the plan and the centres of every method, and the op that assigns tokens."""

from typing import Any

import torch
from torch import Tensor

from vitkern.ops import _call, _checks, _grid, _sharded
from vitkern.ops._op import PlainOp
from vitkern.ops.cluster_kmeans import cluster_kmeans
from vitkern.ops.merge_tokens import merge_tokens
from vitkern.reference.cluster_tokens import cluster_tokens as definition
from vitkern.tokens import MergePlan

NAME = "cluster_tokens"
OWN_GRID = "method='grid' is two matrix products of PyTorch"
METHODS = ("grid", "kmeans", "dpc_knn", "nearest", "agglomerative", "kmedoids")
LINKAGES = ("average", "single", "complete")
OWNERS = {  # option -> the methods that read it
    "grid": ("grid", "kmeans"),
    "centers": ("nearest",),
    "threshold": ("grid", "nearest"),
    "weight": ("kmedoids",),
}


def cluster_tokens(
    x: Tensor,
    k: int | tuple[int, int] | None = None,
    *,
    method: str = "kmeans",
    centers: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    iters: int = 5,
    temperature: float = 0.01,
    window: int = 5,
    k_neighbors: int = 5,
    threshold: float | None = None,
    linkage: str = "average",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, MergePlan, Tensor | None]:
    r"""Groups tokens into clusters: their centres, a plan of who belongs to whom, and the tokens that are centres.

    Distances are :math:`d(a, b) = \max(\|a\|^2 + \|b\|^2 - 2 a \cdot b, 0)`, exactly 0 from a token to itself, in float32
    (float64 for float64); no matrix of distances exists except in ``"agglomerative"``. Ties go to the lowest place.

    * ``"grid"``, k = (h, w): adaptive average pooling of the map; a token's cluster is the cell
      :math:`(\lfloor yh/H \rfloor, \lfloor xw/W \rfloor)`. With ``threshold`` the tokens of a cell merge only where the
      mean cosine of their pairs reaches it (Norouzi et al. 2024); the last token of a merged cell stands for it.
    * ``"kmeans"``, k = (h, w): ``iters`` turns of soft k-means from the pooled grid (Liang et al. 2022),
      :math:`W_{nm} = \mathrm{softmax}_m(-\tau d(x_n, c_m))` over the centres whose cell is at most ``window // 2`` rows
      and columns away, :math:`c_m = \sum_n W_{nm} x_n / \max(\sum_n W_{nm}, 10^{-16})`. Then every token joins the
      nearest centre of all.
    * ``"dpc_knn"``, k clusters: density peaks (Du et al. 2016; Zeng et al. 2022) with :math:`D^2 = d / C`,
      :math:`\rho_i = \exp(-\mathrm{mean}\, D^2)` over the ``k_neighbors`` nearest tokens, itself included,
      :math:`\delta_i = \min D_{ij}` over denser j (the largest D of the sample for the densest); the k largest
      :math:`\rho\delta` are centres, every token joins the nearest.
    * ``"nearest"``: every token joins the nearest of the given ``centers``; one farther than ``threshold`` (Euclidean)
      from all of them keeps a slot of its own.
    * ``"agglomerative"``, k clusters: the pair of clusters with the least distance 1 - cosine merges until k remain;
      ``linkage`` is the size-weighted mean, the least or the largest distance of the members.
    * ``"kmedoids"``, k clusters: from the first token and those farthest from all chosen (or the k largest ``weight``),
      ``iters`` times the member with the least weighted sum of distances becomes the medoid of its cluster.

    Args:
        x: ``[B, N, C]``; any strides. float32, float64, bfloat16 or float16.
        k: how many clusters: an int, or (h, w) of ``"grid"`` and ``"kmeans"``; None with ``"nearest"``.
        method: see above.
        centers: ``[B, k, C]`` or ``[1, k, C]`` in the dtype of x, for ``"nearest"``.
        grid: (H, W) of the map that the N tokens are, row by row; for ``"grid"`` and ``"kmeans"``.
        iters: turns of ``"kmeans"`` and ``"kmedoids"``.
        temperature: :math:`\tau` of ``"kmeans"``, at least 0.
        window: odd side, in cells, of the neighbourhood that a token sees in ``"kmeans"``.
        k_neighbors: tokens of the density, itself included.
        threshold: see ``"grid"`` and ``"nearest"``.
        linkage: ``"average"``, ``"single"`` or ``"complete"``.
        weight: ``[B, N]`` for ``"kmedoids"``, at least 0.
        mask: bool ``[B, N]``, True for a real token. Masked tokens take no part, whatever they hold, and have no slot.
        backend: ``"reference"`` or ``"cpu"``; raises with all reasons if it cannot run.

    Returns:
        ``(centers [B, k, C], plan, index)``: centers in the dtype of x; a :class:`vitkern.MergePlan` whose ``token_map``
        is the assignment; ``index`` int32 ``[B, k]``, the token that stands for each cluster and comes first in its slot,
        None in ``"kmeans"``, ``"nearest"`` and ``"grid"`` without threshold. Clusters stand by position. The plan is
        ragged where samples may use fewer slots: with a mask in ``"dpc_knn"``, ``"agglomerative"`` and ``"kmedoids"``,
        and with ``threshold``, whose slots are N in ``"grid"`` and k + N in ``"nearest"``. Unused slots hold 0.

        Gradients flow to x through the centres: pooled or chosen tokens, means of ``"agglomerative"`` and of cells that
        merge; in ``"kmeans"`` the last W is a constant. The assignment has none.

    Raises:
        ValueError, TypeError: an argument does not fit; the sentence names it, what it got and what it wanted.
    """
    if type(x) not in _sharded.PLAIN and _sharded.met(x):
        return _sharded.call(cluster_tokens, locals())
    count, grids = _check(
        x, k, method, centers, grid, iters, temperature, window, k_neighbors, threshold, linkage, weight, mask
    )
    if method == "grid":
        return _grid_clusters(x, grids, threshold, mask, backend)
    if method == "nearest":
        assert centers is not None
        return _nearest_clusters(x, centers, threshold, mask, backend)
    if method == "kmeans":
        found = _grid.pool(x.detach() if iters else x, mask, grids)
        if iters:
            found = cluster_kmeans(x, found, mask, grids, window, float(temperature), iters, backend=backend)
        found = found.to(x.dtype)
        return found, _nearest_clusters(x, found, None, mask, backend)[1], None
    args = (x.detach(), None, mask, weight, method, count, k_neighbors, iters, linkage)
    label, index, _ = _call.run(OP, args, backend)
    lengths = label.new_full((len(x),), count) if mask is None else mask.sum(1).clamp(max=count).to(torch.int32)
    plan = _headed(label, index, count, lengths, mask is not None)
    if method == "agglomerative":
        return merge_tokens(x, plan, backend=backend)[0], plan, index
    picked = x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[2]))
    unused = plan.key_mask
    return picked if unused is None else picked.masked_fill(~unused[..., None], 0.0), plan, index


def _headed(label: Tensor, index: Tensor, count: int, lengths: Tensor, ragged: bool) -> MergePlan:
    """The plan in which the tokens at `index` come first in their slots; index is 0 in slots that are not in use."""
    slot = torch.arange(count, device=label.device)
    head = label.gather(1, index.long()) == slot  # [B, count]; a slot not in use names a token of another
    later = torch.ones_like(label).scatter_add(1, index.long(), -head.to(label.dtype))
    return MergePlan._listed(label, count, lengths, ragged, later)


def _nearest_clusters(
    x: Tensor, centers: Tensor, threshold: float | None, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, MergePlan, None]:
    batch, tokens, _ = x.shape
    centers = centers.expand(batch, -1, -1)
    k = centers.shape[1]
    args = (x.detach(), centers.detach(), mask, None, "nearest", k, 1, 0, "average")
    label, _, distance = _call.run(OP, args, backend)
    if threshold is None:
        return centers, MergePlan._listed(label, k, label.new_full((batch,), k), False), None
    far = (label < k) & (distance > threshold * threshold)
    order = far.cumsum(1, dtype=torch.int32)
    n_out = k + tokens
    label = torch.where(far, k + order - 1, label.masked_fill(label == k, n_out))
    lengths = k + far.sum(1, dtype=torch.int32)
    alone = torch.where(far, label - k, tokens).long()[..., None].expand(x.shape)
    own = x.new_zeros(batch, tokens + 1, x.shape[2]).scatter(1, alone, x)[:, :tokens]
    return torch.cat((centers, own), 1), MergePlan._listed(label, n_out, lengths, True), None


def _grid_clusters(
    x: Tensor, grids: list[int], threshold: float | None, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, MergePlan, Tensor | None]:
    _call.torch_only(NAME, OWN_GRID, backend)
    batch, tokens, _ = x.shape
    count = grids[2] * grids[3]
    cell = _grid.labels(grids, batch, mask, x.device)
    if threshold is None:
        plan = MergePlan._listed(cell, count, cell.new_full((batch,), count), False)
        return _grid.pool(x, mask, grids).to(x.dtype), plan, None
    merged = _grid.alike(x if mask is None else x.masked_fill(~mask[..., None], 0.0), cell, count, threshold)
    position = torch.arange(tokens, dtype=torch.int32, device=x.device).expand(batch, -1)
    last = torch.zeros(batch, count + 1, dtype=torch.int32, device=x.device)
    last = last.scatter_reduce(1, cell.long(), position, "amax")  # the last token of each cell
    together = torch.nn.functional.pad(merged, (0, 1)).gather(1, cell.long())
    head = torch.where(together, last.gather(1, cell.long()), position)  # [B, N] the token that stands for each
    real = cell < count
    heads = (head == position) & real
    place = heads.cumsum(1, dtype=torch.int32) - 1
    label = torch.where(real, place.gather(1, head.long()), tokens)
    to = torch.where(heads, place, tokens).long()
    index = torch.zeros(batch, tokens + 1, dtype=torch.int32, device=x.device).scatter(1, to, position)[:, :tokens]
    plan = _headed(label, index, tokens, heads.sum(1, dtype=torch.int32), True)
    return merge_tokens(x, plan)[0], plan, index


# checks -----------------------------------------------------------------------------------------------------------------


def _check(
    x: Any,
    k: Any = None,
    method: Any = "kmeans",
    centers: Any = None,
    grid: Any = None,
    iters: Any = 5,
    temperature: Any = 0.01,
    window: Any = 5,
    k_neighbors: Any = 5,
    threshold: Any = None,
    linkage: Any = "average",
    weight: Any = None,
    mask: Any = None,
) -> tuple[Any, list[int]]:
    """The number of clusters, and H, W, h, w of the methods on a grid ([] for others)."""
    _checks.tensor(NAME, "x", x)
    _checks.floating(NAME, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{NAME}: x must have shape [B, N, C], got {list(x.shape)}")
    if method not in METHODS:
        raise ValueError(f"{NAME}: method must be one of {', '.join(METHODS)}, got {method!r}")
    given = {"grid": grid, "centers": centers, "threshold": threshold, "weight": weight}
    for option, owners in OWNERS.items():
        if given[option] is not None and method not in owners:
            raise ValueError(f"{NAME}: {option} must go with method={' or '.join(map(repr, owners))}, got {method!r}")
    for option, value, least in (("iters", iters, 0), ("window", window, 1), ("k_neighbors", k_neighbors, 1)):
        _checks.integer(NAME, option, value, least)
    if window % 2 == 0:
        raise ValueError(f"{NAME}: window must be odd, got {window}")
    if linkage not in LINKAGES:
        raise ValueError(f"{NAME}: linkage must be 'average', 'single' or 'complete', got {linkage!r}")
    _checks.number(NAME, "temperature", temperature, 0)
    if threshold is not None:
        _checks.number(NAME, "threshold", threshold, 0 if method == "nearest" else None)
    if mask is not None:
        _checks.flags(NAME, "mask", mask, tuple(x.shape[:2]), "x", x.device)
    if weight is not None:
        _checks.parameter(NAME, "weight", weight, x.device, "x")
        _checks.shape(NAME, "weight", weight, tuple(x.shape[:2]), "[B, N]")
    if method in ("grid", "kmeans"):
        grids = _grids(x, k, grid)
        return grids[2] * grids[3], grids
    if method == "nearest":
        if k is not None:
            raise ValueError(f"{NAME}: k must be None with method='nearest', got {k!r}")
        _check_centers(x, centers)
        return centers.shape[1], []
    _checks.integer(NAME, "k", k, 1)
    if k > x.shape[1]:
        raise ValueError(f"{NAME}: k must be at most the tokens of x ({x.shape[1]}), got {k}")
    return k, []


def _grids(x: Tensor, k: Any, grid: Any) -> list[int]:
    for name, value in (("k", k), ("grid", grid)):
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise TypeError(f"{NAME}: {name} must be two ints with method='grid' or 'kmeans', got {value!r}")
        for side in value:
            _checks.integer(NAME, name, side, 1)
    if grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f"{NAME}: grid must hold exactly the tokens of x ({x.shape[1]}), got {grid[0]} x {grid[1]}")
    return [*grid, *k]


def _check_centers(x: Tensor, centers: Any) -> None:
    _checks.tensor(NAME, "centers", centers)
    if centers.dtype != x.dtype:
        raise TypeError(f"{NAME}: centers must have the dtype of x ({x.dtype}), got {centers.dtype}")
    _checks.on_device(NAME, "centers", centers, "x", x.device)
    batch, _, width = x.shape
    fits = (
        centers.dim() == 3
        and _checks.fits(centers.shape[0], batch)
        and centers.shape[1] >= 1
        and centers.shape[2] == width
    )
    if not fits:
        raise ValueError(
            f"{NAME}: centers must have shape [B or 1, k, C] with B = {batch}, k >= 1, C = {width}, got {list(centers.shape)}"
        )


# the op -----------------------------------------------------------------------------------------------------------------


def _fake(x: Tensor, centers: Any, mask: Any, weight: Any, method: str, k: int, *rest: Any) -> tuple[Tensor, ...]:
    batch, tokens, _ = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    integers = (x.new_empty(shape, dtype=torch.int32) for shape in ((batch, tokens), (batch, k)))
    return (*integers, x.new_empty((batch, tokens), dtype=acc))


def _explain(x: Any, *args: Any, backend: str | None = None, **options: Any) -> _call.Found:
    _check(x, *args, **options)
    method = options.get("method", "kmeans")
    return _call.torch_only(NAME, OWN_GRID, backend) if method == "grid" else _call.explanation(NAME, OP, (x,), backend)


OP = PlainOp(
    NAME,
    ("Tensor x", "Tensor? centers", "Tensor? mask", "Tensor? weight"),
    "str method, SymInt k, SymInt neighbors, SymInt iters, str linkage, str gpu",
    outputs=3,
    batched=4,
    definition=definition,
    fake=_fake,
)
OP.register()
cluster_tokens.explain = _explain  # type: ignore[attr-defined]
