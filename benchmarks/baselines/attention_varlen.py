"""What people run today instead of attention_varlen: a loop of fused calls (transformers), or padding and a mask."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.attention_varlen import Case


class Loop:
    """One fused call for every sequence."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        parts = [inputs[n].transpose(0, 1)[None].split(self.case.lengths, 2) for n in ("q", "k", "v")]
        outs = [F.scaled_dot_product_attention(*each) for each in zip(*parts, strict=True)]
        return torch.cat(outs, 2)[0].transpose(0, 1)


class Padded(Loop):
    """A batch of padded sequences with a mask of keys."""

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        lengths = torch.tensor(self.case.lengths)
        real = torch.arange(int(lengths.max())) < lengths[:, None]  # [S, N]
        place = torch.where(real, (real.flatten().cumsum(0) - 1).view_as(real), 0)
        q, k, v = (inputs[n][place].transpose(1, 2) for n in ("q", "k", "v"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        return out.transpose(1, 2)[real]


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    return {"loop of sdpa": Loop, "padded sdpa": Padded}[name](case)
