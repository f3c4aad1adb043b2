"""The methods of cluster_tokens against other people's code and loops. What they share is in test_cluster_tokens.py."""

import math

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.ops import _call
from vitkern.ops import cluster_tokens as op_file

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


def partition(labels):
    """The assignment with clusters renumbered by first appearance."""
    seen = {}
    return [seen.setdefault(int(label), len(seen)) for label in labels]


# grid -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid, k", [((7, 9), (3, 4)), ((8, 8), (4, 2)), ((5, 6), (5, 6)), ((3, 2), (5, 3))])
def test_the_grid_is_adaptive_average_pooling(grid, k):
    x = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64, requires_grad=True)
    centers, plan, index = vitkern.cluster_tokens(x, k, method="grid", grid=grid)
    want = torch.nn.functional.adaptive_avg_pool2d(x.mT.unflatten(2, grid), k).flatten(2).mT
    torch.testing.assert_close(centers, want)
    weight = torch.randn_like(want)
    (a,), (b,) = (torch.autograd.grad((t * weight).sum(), x) for t in (centers, want))
    torch.testing.assert_close(a, b)
    cell = [(y * k[0] // grid[0]) * k[1] + z * k[1] // grid[1] for y in range(grid[0]) for z in range(grid[1])]
    assert plan.token_map[1].tolist() == cell and index is None and plan.n_out == k[0] * k[1]


def test_a_masked_grid_pools_the_real_tokens():
    x, mask = torch.randn(1, 63, 4), torch.rand(1, 63) < 0.5
    mask.view(7, 9)[:3, :3] = False
    got, plan, _ = vitkern.cluster_tokens(
        x.masked_fill(~mask[..., None], math.nan), (3, 4), method="grid", grid=(7, 9), mask=mask
    )
    maps = [t.mT.unflatten(2, (7, 9)) for t in (x * mask[..., None], mask[..., None].float())]
    total, part = (torch.nn.functional.adaptive_avg_pool2d(t, (3, 4)).flatten(2).mT for t in maps)
    torch.testing.assert_close(got, torch.where(part > 0, total / part, 0.0))
    assert got[0, 0].eq(0).all() and torch.equal(plan.token_map == 12, ~mask)


@pytest.mark.parametrize("threshold", [0.2, -math.inf, math.inf, math.nan])
def test_cells_merge_where_their_mean_cosine_reaches_the_threshold(threshold):
    x = torch.randn(2, 16, 6) + torch.tensor([1.0, 0.0] * 8)[:, None]
    centers, plan, index = vitkern.cluster_tokens(x, (2, 2), method="grid", grid=(4, 4), threshold=threshold)
    for b in range(2):
        slots = []
        for cell in ([0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]):
            u = torch.nn.functional.normalize(x[b, cell].double(), dim=-1)
            pairs = [float(u[i] @ u[j]) for i in range(4) for j in range(4) if i != j]
            slots += [cell] if sum(pairs) / 12 >= threshold else [[i] for i in cell]
        slots.sort(key=lambda members: members[-1])
        assert int(plan.lengths[b]) == len(slots)
        for slot, members in enumerate(slots):
            assert plan.token_map[b, members].eq(slot).all() and index[b, slot] == members[-1]
            assert plan.perm[b, plan.offsets[b, slot]] == members[-1]  # the last token stands for the cell
            torch.testing.assert_close(centers[b, slot], x[b, members].mean(0))
        assert centers[b, len(slots) :].eq(0).all() and index[b, len(slots) :].eq(0).all()


# dpc_knn ----------------------------------------------------------------------------------------------------------------


def density_peaks(x, k, neighbors):
    """Zeng et al. 2022 in plain PyTorch, without their noise: centres and assignment of [N, C]."""
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distance.topk(neighbors, largest=False).values.square().mean(-1)).exp()
    denser = density[None, :] > density[:, None]
    delta = torch.where(denser, distance, distance.max()).amin(-1)
    centre = (density * delta).topk(k).indices.sort().values
    label = distance[:, centre].argmin(1)
    label[centre] = torch.arange(k)
    return centre, label


@ON
@pytest.mark.parametrize("tokens, width, k, neighbors", [(197, 64, 49, 5), (60, 7, 4, 11), (33, 3, 33, 1 + 32)])
def test_density_peaks_are_the_published_ones(backend, tokens, width, k, neighbors):
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    centers, plan, index = vitkern.cluster_tokens(x, k, method="dpc_knn", k_neighbors=neighbors, backend=backend)
    for b in range(2):
        centre, label = density_peaks(x[b], k, neighbors)
        assert index[b].tolist() == centre.tolist() and plan.token_map[b].tolist() == label.tolist()
        assert plan.perm[b, plan.offsets[b, :-1].long()].tolist() == centre.tolist()  # a centre is its slot's first
        assert torch.equal(centers[b], x[b, centre])


def peaks_by_hand(x, k, neighbors):
    """The definition with strict ranks, one token at a time, on a list of integer rows."""
    tokens, width = len(x), len(x[0])
    d = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    spread = [sum(sorted(row)[:neighbors]) / min(neighbors, tokens) / width for row in d]
    order = sorted(range(tokens), key=lambda i: (spread[i], i))
    score = []
    for i in range(tokens):
        before = order[: order.index(i)]
        delta = min((d[i][j] for j in before), default=max(map(max, d))) / width
        score.append((-spread[i] + math.log(delta) / 2) if delta else -math.inf)
    centre = sorted(sorted(range(tokens), key=lambda i: (-score[i], i))[:k])
    label = [
        centre.index(i) if i in centre else min(range(k), key=lambda c: (d[i][centre[c]], c)) for i in range(tokens)
    ]
    return centre, label


@ON
@pytest.mark.parametrize("neighbors", [1, 3, 5, 40])
def test_ties_and_duplicates_of_density_peaks_follow_the_positions(backend, neighbors):
    x = torch.randint(-2, 3, (1, 30, 3), generator=torch.Generator().manual_seed(neighbors)).float()
    x[0, 15:22] = x[0, :7]
    centre, label = peaks_by_hand([[int(v) for v in row] for row in x[0]], 9, neighbors)
    _, plan, index = vitkern.cluster_tokens(x, 9, method="dpc_knn", k_neighbors=neighbors, backend=backend)
    assert index[0].tolist() == centre and plan.token_map[0].tolist() == label


@ON
def test_identical_tokens_in_half_precision_give_the_same_clusters_in_every_run(backend):
    x = torch.randn(1, 40, 256).bfloat16().repeat(1, 3, 1)
    first = vitkern.cluster_tokens(x, 30, method="dpc_knn", backend=backend)
    again = vitkern.cluster_tokens(x, 30, method="dpc_knn", backend=backend)
    assert torch.equal(first[2], again[2]) and torch.equal(first[1].token_map, again[1].token_map)
    label = first[1].token_map[0].view(3, 40)
    plain = [i for i in range(40) if not torch.isin(torch.tensor([i, i + 40, i + 80]), first[2][0]).any()]
    assert plain and torch.equal(label[0, plain], label[1, plain]) and torch.equal(label[0, plain], label[2, plain])


@ON
@pytest.mark.parametrize("method", ["dpc_knn", "kmedoids"])
def test_the_distance_of_a_token_to_itself_is_exactly_zero(backend, method):
    x = torch.randn(1, 1024, 64) * 3 + 5  # where |x|^2 + |x|^2 - 2 x.x is not
    assert (x[0].square().sum(-1) * 2 - 2 * (x[0] @ x[0].T).diagonal()).abs().max() > 0
    args = (x, None, None, None, method, 40, 1, 1, "average")
    label, index, distance = _call.run(op_file.OP, args, backend)
    assert distance[0, index[0].long()].eq(0).all()
    if method == "dpc_knn":  # each token is its own only neighbour: all equally dense, so the first one is a centre
        assert index[0, 0] == 0


# nearest, kmedoids, agglomerative ---------------------------------------------------------------------------------------


@ON
def test_nearest_centres_against_scikit_learn_and_ties_to_the_lowest(backend):
    metrics = pytest.importorskip("sklearn.metrics")
    x, centers = torch.randn(2, 300, 20), torch.randn(2, 37, 20)
    found, plan, _ = vitkern.cluster_tokens(x, method="nearest", centers=centers, backend=backend)
    for b in range(2):
        assert plan.token_map[b].tolist() == metrics.pairwise_distances_argmin(x[b], centers[b]).tolist()
    assert torch.equal(found, centers)
    again = vitkern.cluster_tokens(x, method="nearest", centers=centers.repeat(1, 3, 1), backend=backend)[1]
    assert torch.equal(again.token_map, plan.token_map) and again.offsets[:, 37:].eq(300).all()


@ON
def test_far_tokens_keep_slots_of_their_own(backend):
    x = torch.randn(2, 50, 4, requires_grad=True)
    centers = torch.randn(1, 3, 4, requires_grad=True)
    found, plan, _ = vitkern.cluster_tokens(x, method="nearest", centers=centers, threshold=1.5, backend=backend)
    distance = torch.cdist(x, centers.expand(2, -1, -1))
    for b in range(2):
        alone = [i for i in range(50) if distance[b, i].min() > 1.5]
        assert 0 < len(alone) < 50 and int(plan.lengths[b]) == 3 + len(alone)
        assert plan.token_map[b, alone].tolist() == list(range(3, 3 + len(alone)))
        near = [i for i in range(50) if i not in alone]
        assert plan.token_map[b, near].tolist() == distance[b, near].argmin(1).tolist()
        assert torch.equal(found[b, 3 : 3 + len(alone)], x[b, alone]) and found[b, 3 + len(alone) :].eq(0).all()
    dx, dc = torch.autograd.grad(found.sum(), (x, centers))
    assert dc.eq(2).all() and dx.sum() == 4 * sum(int(n) - 3 for n in plan.lengths)


@ON
@pytest.mark.parametrize("linkage", ["average", "single", "complete"])
def test_agglomerative_clusters_are_those_of_scipy(backend, linkage):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    x = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(1))
    centers, plan, index = vitkern.cluster_tokens(x, 9, method="agglomerative", linkage=linkage, backend=backend)
    for b in range(2):
        tree = hierarchy.linkage(x[b].double().numpy(), linkage, "cosine")
        want = partition(hierarchy.fcluster(tree, 9, "maxclust"))
        assert plan.token_map[b].tolist() == want  # clusters stand by their first token
        assert index[b].tolist() == [want.index(c) for c in range(9)]
        means = torch.stack([x[b][torch.tensor(want) == c].mean(0) for c in range(9)])
        torch.testing.assert_close(centers[b], means)


@ON
def test_agglomerative_ties_merge_the_first_pair(backend):
    x = torch.eye(8)[None]  # every distance is 1
    for linkage in ("single", "complete"):
        _, plan, _ = vitkern.cluster_tokens(x, 5, method="agglomerative", linkage=linkage, backend=backend)
        assert plan.token_map[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    x = torch.eye(4).repeat(2, 1)[None]
    _, plan, _ = vitkern.cluster_tokens(x, 4, method="agglomerative", backend=backend)
    assert plan.token_map[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def joined_by_hand(x, k, linkage):
    """Integer rows of one norm: the closest pair, found by looking at all pairs, joins; ties go to the first."""
    d = [[-sum(a * b for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    groups = {i: [i] for i in range(len(x))}
    for _ in range(len(x) - k):
        pick = {"single": min, "complete": max}[linkage]
        pairs = [(i, j) for i in groups for j in groups if i < j]
        i, j = min(pairs, key=lambda p: (pick(d[a][b] for a in groups[p[0]] for b in groups[p[1]]), p))
        groups[i] += groups.pop(j)
    label = {token: place for place, head in enumerate(sorted(groups)) for token in groups[head]}
    return [label[i] for i in range(len(x))]


@ON
@pytest.mark.parametrize("linkage", ["single", "complete"])
def test_agglomerative_ties_against_a_loop(backend, linkage):
    x = torch.randint(0, 2, (12, 14, 16), generator=torch.Generator().manual_seed(5)).float() * 2 - 1
    for k in (3, 5, 7, 9, 11):
        _, plan, _ = vitkern.cluster_tokens(x, k, method="agglomerative", linkage=linkage, backend=backend)
        for b in range(12):
            rows = [[int(v) for v in row] for row in x[b]]
            assert plan.token_map[b].tolist() == joined_by_hand(rows, k, linkage), (b, k)


def medoids_by_hand(x, w, k, iters, weighted):
    tokens = range(len(x))
    d = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    if weighted:
        chosen = sorted(tokens, key=lambda i: (-w[i], i))[:k]
    else:
        chosen = [0]
        while len(chosen) < k:
            free = [i for i in tokens if i not in chosen]
            chosen.append(max(free, key=lambda i: (min(d[i][m] for m in chosen), -i)))
    chosen.sort()

    def assign():
        return [chosen.index(i) if i in chosen else min(range(k), key=lambda c: (d[i][chosen[c]], c)) for i in tokens]

    for _ in range(iters):
        label = assign()
        groups = [[i for i in tokens if label[i] == c] for c in range(k)]
        chosen = sorted(min(g, key=lambda i: (sum(w[j] * d[i][j] for j in g), i)) for g in groups)
    return chosen, assign()


@ON
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("iters", [0, 1, 5])
def test_kmedoids_against_a_loop(backend, weighted, iters):
    g = torch.Generator().manual_seed(iters)
    x, w = torch.randint(-3, 4, (1, 40, 3), generator=g).float(), torch.randint(1, 4, (1, 40), generator=g).float()
    weight = w if weighted else None
    _, plan, index = vitkern.cluster_tokens(x, 6, method="kmedoids", iters=iters, weight=weight, backend=backend)
    rows = [[int(v) for v in row] for row in x[0]]
    chosen, label = medoids_by_hand(rows, w[0].tolist() if weighted else [1] * 40, 6, iters, weighted)
    assert index[0].tolist() == chosen and plan.token_map[0].tolist() == label
