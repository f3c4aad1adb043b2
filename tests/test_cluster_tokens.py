"""cluster_tokens: the methods against other people's code and loops, edges, memory and refusals. What every op must do is
in tests/test_ops.py."""

import math
import subprocess
import sys

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.ops import _call
from vitkern.ops import cluster_tokens as op_file

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
METHODS = {
    "grid": ((3, 4), {"grid": (7, 9)}),
    "kmeans": ((3, 4), {"grid": (7, 9)}),
    "dpc_knn": (5, {}),
    "kmedoids": (5, {}),
    "agglomerative": (5, {}),
    "nearest": (None, {}),
}


def run(x, method, backend=None, **options):
    k, own = METHODS[method]
    if method == "grid":
        backend = None
    if method == "nearest":
        options.setdefault("centers", x[:, :6].clone().nan_to_num())
    return vitkern.cluster_tokens(x, k, method=method, backend=backend, **own, **options)


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
    got, plan, _ = run(x.masked_fill(~mask[..., None], math.nan), "grid", mask=mask)
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
    label, index, distance = _call.run(op_file.OP, args, backend, _call.no_triton)
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


# all methods ------------------------------------------------------------------------------------------------------------


@ON
@pytest.mark.parametrize("method", METHODS)
def test_masked_tokens_take_no_part(backend, method):
    """The result on padded samples is that on the real tokens alone."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 63, 6, generator=generator)
    mask = torch.rand(2, 63, generator=generator) < 0.6
    centers, plan, index = run(x.masked_fill(~mask[..., None], math.nan), method, backend, mask=mask, **(
        {"centers": torch.ones(2, 3, 6).cumsum(1)} if method == "nearest" else {}))  # fmt: skip
    assert torch.equal(plan.token_map == plan.n_out, ~mask) and centers.isfinite().all()
    if method in ("grid", "kmeans"):
        return  # their meaning needs the whole map
    for b in range(2):
        given = {"centers": torch.ones(1, 3, 6).cumsum(1)} if method == "nearest" else {}
        one, own, place = run(x[b, mask[b]][None], method, backend, **given)
        assert plan.token_map[b, mask[b]].tolist() == own.token_map[0].tolist()
        torch.testing.assert_close(centers[b], one[0])
        if index is not None:
            assert index[b].tolist() == mask[b].nonzero()[:, 0][place[0].long()].tolist()


@ON
@pytest.mark.parametrize("method", ["dpc_knn", "kmedoids", "agglomerative"])
def test_a_sample_with_fewer_tokens_than_clusters_leaves_slots_unused(backend, method):
    x = torch.randn(3, 12, 4, requires_grad=True)
    mask = torch.arange(12) < torch.tensor([12, 3, 0])[:, None]
    centers, plan, index = vitkern.cluster_tokens(x, 5, method=method, mask=mask, backend=backend)
    assert plan.lengths.tolist() == [5, 3, 0] and plan.key_mask.sum() == 8
    assert plan.token_map[1, :3].tolist() == [0, 1, 2] and torch.equal(centers[1, :3], x[1, :3])
    assert centers[1, 3:].eq(0).all() and index[1].tolist() == [0, 1, 2, 0, 0]
    (dx,) = torch.autograd.grad(centers.sum(), x)
    assert dx[1, :3].eq(1).all() and dx[1, 3:].eq(0).all() and dx[2].eq(0).all()


@ON
@pytest.mark.parametrize("method", [m for m in METHODS if m != "grid"])
def test_a_sample_does_not_depend_on_its_batch(backend, method):
    if backend == "reference":  # a library product may round differently for another batch
        x = torch.randint(-3, 4, (4, 63, 8)).float()
        x = torch.where(x == 0, 1.0, x) if method == "agglomerative" else x
    else:
        x = torch.randn(4, 63, 8)
    whole = run(x, method, backend)
    for b in range(4):
        one = run(x[b : b + 1], method, backend)
        if backend != "reference" or method not in ("agglomerative", "kmeans"):
            assert torch.equal(one[1].token_map[0], whole[1].token_map[b]) and torch.equal(one[0][0], whole[0][b])


@ON
@pytest.mark.parametrize("method", METHODS)
def test_one_token_and_an_empty_batch(backend, method):
    for shape in ((1, 1, 3), (0, 1, 3)):
        x = torch.randn(shape)
        k, own = METHODS[method]
        own = {"grid": (1, 1)} if own else {}
        k = None if k is None else (1, 1) if own else 1
        given = {"centers": x[:, :1]} if method == "nearest" else {}
        named = None if method == "grid" else backend
        centers, plan, _ = vitkern.cluster_tokens(x, k, method=method, backend=named, **own, **given)
        torch.testing.assert_close(centers, x)
        assert plan.token_map.eq(0).all() and plan.token_map.shape == shape[:2]


@ON
def test_the_plan_merges_unmerges_and_composes(backend):
    x = torch.randn(2, 100, 8)
    _, first, _ = vitkern.cluster_tokens(x, 20, method="dpc_knn", backend=backend)
    y, size = vitkern.merge_tokens(x, first, backend=backend)
    _, second, _ = vitkern.cluster_tokens(y, 4, method="kmedoids", backend=backend)
    whole = first.compose(second)
    assert size.sum() == 200 and torch.equal(whole.token_map, second.token_map.gather(1, first.token_map.long()))
    total, _ = vitkern.merge_tokens(y, second, weight=size, backend=backend)
    torch.testing.assert_close(total, vitkern.merge_tokens(x, whole, backend=backend)[0])
    assert vitkern.unmerge_tokens(total, whole, backend=backend).shape == x.shape


def test_no_gradient_but_that_of_the_centres():
    x = torch.randn(2, 63, 6, dtype=torch.float64, requires_grad=True)
    for method in ("dpc_knn", "kmedoids", "agglomerative"):
        centers, plan, index = run(x, method)
        (dx,) = torch.autograd.grad(centers.sum(), x)
        if method == "agglomerative":
            torch.testing.assert_close(dx.sum(1), torch.full((2, 6), 5.0, dtype=torch.float64))
        else:
            assert dx.sum() == centers.numel() and dx.gather(1, index.long()[..., None].expand(-1, -1, 6)).eq(1).all()


@pytest.mark.compile
@pytest.mark.parametrize("method", METHODS)
def test_every_method_compiles_without_graph_breaks(method):
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: run(t, method)[:2], fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 63, 8, requires_grad=True)
    (a, plan), (b, want) = compiled(x), run(x, method)[:2]
    torch.testing.assert_close(a, b)
    assert torch.equal(plan.token_map, want.token_map) and torch.equal(plan.perm, want.perm)


MEMORY = """
import resource, torch, vitkern

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(side, k):
    n = side * side
    x, own = torch.randn(1, n, 8), {"nearest": {"centers": torch.randn(1, n, 8)}, "kmeans": {"grid": (side, side)}}
    count = {"nearest": None, "kmeans": (side // 2, side // 2)}
    return [vitkern.cluster_tokens(x, count.get(m, k), method=m, iters=1, **own.get(m, {}))[1]
            for m in ("dpc_knn", "nearest", "kmeans", "kmedoids")]

run(16, 20)
before = peak()
assert all(int(p.offsets[0, -1]) == 128 * 128 for p in run(128, 100))
print(peak() - before)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_no_matrix_of_distances_exists():
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 64e6, f"{ran.stdout} bytes; a matrix would take {4 * 16384**2}"


X = torch.randn(2, 12, 4)


@pytest.mark.parametrize(
    "k, options, sentence",
    [
        (3, dict(method="ward"), "method must be one of grid, kmeans, dpc_knn, nearest, agglomerative, kmedoids, got 'ward'"),
        (13, dict(method="dpc_knn"), r"k must be at most the tokens of x \(12\), got 13"),
        (0, dict(method="dpc_knn"), "k must be at least 1, got 0"),
        (2.0, dict(method="kmedoids"), "k must be an int, got 2.0"),
        (3, dict(grid=(3, 4)), "k must be two ints with method='grid' or 'kmeans', got 3"),
        ((1, 2), dict(), "grid must be two ints with method='grid' or 'kmeans', got None"),
        ((1, 2), dict(grid=(3, 3)), r"grid must hold exactly the tokens of x \(12\), got 3 x 3"),
        ((1, 2), dict(grid=(3, 4), window=2), "window must be odd, got 2"),
        ((1, 2), dict(grid=(3, 4), iters=-1), "iters must be at least 0, got -1"),
        ((1, 2), dict(grid=(3, 4), temperature=-0.1), "temperature must be at least 0.0, got -0.1"),
        (3, dict(method="dpc_knn", grid=(3, 4)), "grid must go with method='grid' or 'kmeans', got 'dpc_knn'"),
        (3, dict(method="dpc_knn", threshold=1.0), "threshold must go with method='grid' or 'nearest', got 'dpc_knn'"),
        (3, dict(method="dpc_knn", weight=X[..., 0]), "weight must go with method='kmedoids', got 'dpc_knn'"),
        (3, dict(method="dpc_knn", k_neighbors=0), "k_neighbors must be at least 1, got 0"),
        (3, dict(method="dpc_knn", mask=X[..., 0]), "mask must be bool, got torch.float32"),
        (3, dict(method="dpc_knn", mask=X[:1, :, 0] > 0), r"mask must have shape \[B, N\] = \[2, 12\], got \[1, 12\]"),
        (3, dict(method="kmedoids", weight=X[:1, :, 0]), r"weight must have shape \[B, N\] = \[2, 12\], got \[1, 12\]"),
        (3, dict(method="agglomerative", linkage="ward"), "linkage must be 'average', 'single' or 'complete', got 'ward'"),
        (3, dict(method="nearest", centers=X), "k must be None with method='nearest', got 3"),
        (None, dict(method="nearest"), "centers must be a tensor, got NoneType"),
        (None, dict(method="nearest", centers=X.double()), "centers must have the dtype of x"),
        (None, dict(method="nearest", centers=X[..., :3]), r"centers must have shape \[B or 1, k, C\] with B = 2"),
        (None, dict(method="nearest", centers=X, threshold=-1.0), "threshold must be at least 0.0, got -1.0"),
        ((1, 2), dict(method="grid", grid=(3, 4), backend="cpu"), "method='grid' is two matrix products of PyTorch"),
        (3, dict(method="dpc_knn", backend="cuda"), "cuda: the tensors are on cpu"),
    ],
)  # fmt: skip
def test_refusals_are_sentences(k, options, sentence):
    with pytest.raises((ValueError, TypeError), match=f"cluster_tokens: .*{sentence}|{sentence}"):
        vitkern.cluster_tokens(X, k, **options)


def test_x_must_have_three_axes_and_a_floating_dtype():
    with pytest.raises(ValueError, match=r"cluster_tokens: x must have shape \[B, N, C\], got \[12, 4\]"):
        vitkern.cluster_tokens(X[0], 3, method="dpc_knn")
    with pytest.raises(TypeError, match="cluster_tokens: x must be float32, float64, bfloat16 or float16"):
        vitkern.cluster_tokens(X.long(), 3, method="dpc_knn")


def test_explain_names_the_back_end():
    text = vitkern.explain(vitkern.cluster_tokens, X, 3, method="dpc_knn")
    assert "cluster_tokens runs on" in text and "triton: the tensors are on cpu" in text
    assert "runs on: reference" in vitkern.explain(vitkern.cluster_tokens, X, (1, 2), method="grid", grid=(3, 4))
