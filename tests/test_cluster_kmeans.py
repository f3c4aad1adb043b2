"""cluster_tokens(method="kmeans"): Lloyd's algorithm, the published turn as a loop, edges. What every op must do is in
tests/test_ops.py."""

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.ops.cluster_kmeans import cluster_kmeans

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


@ON
def test_cold_kmeans_without_a_window_is_lloyds(backend):
    cluster = pytest.importorskip("sklearn.cluster")
    x = torch.randn(1, 48, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = vitkern.cluster_tokens(x, (2, 2), method="grid", grid=(6, 8))[0]
    for iters in (1, 3):
        own = cluster.KMeans(4, init=start[0].numpy(), n_init=1, max_iter=iters, tol=0.0, algorithm="lloyd").fit(x[0])
        found = vitkern.cluster_tokens(
            x, (2, 2), method="kmeans", grid=(6, 8), window=9, temperature=1e7, iters=iters, backend=backend
        )
        torch.testing.assert_close(found[0][0], torch.from_numpy(own.cluster_centers_))
        assert found[1].token_map[0].tolist() == own.predict(x[0]).tolist()


def superpixels(x, c, grid, k, window, temperature):
    """One turn of Liang et al. 2022, token by token: W and the new centres."""
    weights = torch.zeros(x.shape[0], c.shape[0], dtype=x.dtype)
    for n in range(x.shape[0]):
        row, column = (n // grid[1]) * k[0] // grid[0], (n % grid[1]) * k[1] // grid[1]
        seen = [
            m for m in range(len(c)) if abs(m // k[1] - row) <= window // 2 and abs(m % k[1] - column) <= window // 2
        ]
        weights[n, seen] = torch.softmax(-temperature * torch.cdist(x[n : n + 1], c[seen])[0] ** 2, 0)
    return weights, weights.mT @ x / weights.sum(0)[:, None]


@ON
def test_windowed_kmeans_and_its_gradient_against_a_loop(backend):
    x = torch.randn(1, 63, 5, dtype=torch.float64, requires_grad=True)
    c = vitkern.cluster_tokens(x, (3, 4), method="grid", grid=(7, 9))[0][0].detach()
    for _ in range(3):
        weights, c = superpixels(x.detach()[0], c, (7, 9), (3, 4), 3, 0.3)
    got, plan, index = vitkern.cluster_tokens(
        x, (3, 4), method="kmeans", grid=(7, 9), iters=3, window=3, temperature=0.3, backend=backend
    )
    torch.testing.assert_close(got[0], c)
    assert torch.equal(plan.token_map[0].long(), torch.cdist(x.detach()[0], c).argmin(1)) and index is None
    up = torch.randn_like(got)
    (dx,) = torch.autograd.grad(got, x, up)
    torch.testing.assert_close(dx[0], (weights / weights.sum(0)) @ up[0])


@ON
def test_kmeans_without_turns_is_the_grid_and_its_gradient(backend):
    x = torch.randn(2, 63, 5, requires_grad=True)
    found, pooled = (
        vitkern.cluster_tokens(x, (3, 4), method=m, grid=(7, 9), iters=0, backend=b)[0]
        for m, b in (("kmeans", backend), ("grid", None))
    )
    assert torch.equal(found, pooled)
    (a,), (b,) = (torch.autograd.grad(t.square().sum(), x) for t in (found, pooled))
    assert torch.equal(a, b)


@ON
def test_a_centre_that_nobody_sees_is_zero(backend):
    x = torch.randn(1, 16, 3, requires_grad=True)
    start, mask = torch.randn(1, 16, 3), torch.arange(16)[None] < 4
    got = cluster_kmeans(x, start, mask, [4, 4, 4, 4], 1, 0.1, 2, backend=backend)
    assert torch.equal(got[0, 4:], torch.zeros(12, 3))
    torch.testing.assert_close(got[0, :4], x[0, :4])
    assert torch.autograd.grad(got.sum(), x)[0].tolist() == [[[1.0] * 3] * 4 + [[0.0] * 3] * 12]
