"""cluster_tokens: masks, edges, memory and refusals of every method. What the methods do is in
test_cluster_tokens_methods.py, what every op must do in test_ops.py."""

import math

import pytest
import torch
from memory import grown

import vitkern
from vitkern import testing

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


CLUSTERED = """
def run(side, k):
    n = side * side
    x, own = torch.randn(1, n, 8), {"nearest": {"centers": torch.randn(1, n, 8)}, "kmeans": {"grid": (side, side)}}
    count = {"nearest": None, "kmeans": (side // 2, side // 2)}
    return [vitkern.cluster_tokens(x, count.get(m, k), method=m, iters=1, **own.get(m, {}))[1]
            for m in ("dpc_knn", "nearest", "kmeans", "kmedoids")]

run(16, 20)
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_no_matrix_of_distances_exists():
    more = grown(CLUSTERED, "assert all(int(p.offsets[0, -1]) == 128 * 128 for p in run(128, 100))")
    assert more < 64e6, f"{more} bytes; a matrix would take {4 * 16384**2}"


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
        ((1, 2), dict(grid=(3, 4), temperature=-0.1), "temperature must be at least 0, got -0.1"),
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
        (None, dict(method="nearest", centers=X, threshold=-1.0), "threshold must be at least 0, got -1.0"),
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
