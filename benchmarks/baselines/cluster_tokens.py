"""What people run today instead of cluster_tokens: the meaning of the published code, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.cluster_tokens import Case


class Eager:
    """All distances at once."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        x = inputs["x"].float() if inputs["x"].dtype == torch.float16 else inputs["x"]
        return getattr(self, self.case.method)(x, inputs)

    def nearest(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        return distances(x, inputs["centers"]).argmin(-1)

    def dpc_knn(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        distance = distances(x, x).sqrt() / x.shape[2] ** 0.5
        density = (-distance.topk(5, dim=-1, largest=False).values.square().mean(-1)).exp()
        denser = density[:, None, :] > density[:, :, None]
        delta = torch.where(denser, distance, distance.flatten(1).amax(1)[:, None, None]).amin(-1)
        centre = (density * delta).topk(self.case.k, dim=-1).indices
        picked = distance.gather(1, centre[..., None].expand(-1, -1, x.shape[1]))
        return picked.argmin(1)

    def kmeans(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        case = self.case
        maps = x.mT.unflatten(2, case.grid)
        c = torch.nn.functional.adaptive_avg_pool2d(maps, case.cells).flatten(2).mT
        row, column = (
            torch.arange(n)[:, None] * m // n - torch.arange(m) for n, m in zip(case.grid, case.cells, strict=True)
        )  # [H, h], [W, w]
        near = (row.abs() <= 2)[:, None, :, None] & (column.abs() <= 2)[None, :, None, :]
        near = near.reshape(x.shape[1], -1)
        for _ in range(5):
            weights = (-0.01 * distances(x, c)).masked_fill(~near, -torch.inf).softmax(-1)
            c = (weights.mT @ x) / weights.sum(1)[..., None]
        return distances(x, c).argmin(-1)

    def agglomerative(self, x: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Through scikit-learn, one sample at a time."""
        from sklearn.cluster import AgglomerativeClustering

        own = AgglomerativeClustering(self.case.k, metric="cosine", linkage="average")
        return torch.stack([torch.from_numpy(own.fit_predict(t.float().numpy())) for t in x])


def distances(a: Tensor, b: Tensor) -> Tensor:
    d = a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * a @ b.mT
    return d.clamp(min=0)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    if name == "compiled" and case.method != "agglomerative":
        return torch.compile(Eager(case).__call__, dynamic=False)
    return Eager(case)
