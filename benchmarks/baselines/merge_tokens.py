"""What people run today instead of merge_tokens: the meaning of the published weighted merge, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..cases.merge_tokens import Case, plan_of


class Eager:
    """Even and odd tokens apart, the merged ones scattered into their partners, twice: tokens times size, and sizes."""

    def __init__(self, case: Case, device: str) -> None:
        plan = plan_of(case.batch, case.tokens, case.r, device)
        first = plan.perm.gather(1, plan.offsets[:, :-1].long())
        kept = first % 2 == 0
        count = int(kept[0].sum())
        self.left = first[:, :count, None].long() // 2
        even = torch.arange(0, case.tokens, 2, device=device).expand(case.batch, -1)
        gone = (plan.token_map[:, ::2] >= count).nonzero()[:, 1].view(case.batch, case.r)
        self.gone = gone[..., None]
        self.to = (plan.token_map.gather(1, even.gather(1, gone)) - count)[..., None].long()

    def merge(self, x: Tensor) -> Tensor:
        a, b = x[:, ::2], x[:, 1::2]
        n, _, c = x.shape
        left = a.gather(1, self.left.expand(n, -1, c))
        gone = a.gather(1, self.gone.expand(n, -1, c))
        return torch.cat((left, b.scatter_reduce(1, self.to.expand(n, -1, c), gone, "sum")), 1)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        x, size = inputs["x"], inputs["size"][..., None].to(inputs["x"].dtype)
        return self.merge(x * size) / self.merge(size)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return torch.compile(Eager(case, device).__call__, dynamic=False) if name == "compiled" else Eager(case, device)
