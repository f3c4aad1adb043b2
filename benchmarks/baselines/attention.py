"""What people run today instead of attention: the meaning of BEiT's, SAM's, CaiT's and Mask2Former's blocks, in plain
PyTorch."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..cases.attention import Case


class Eager:
    """Scores, bias, mask, softmax, product."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        s = (q * self.case.d**-0.5) @ k.transpose(-2, -1)
        if self.case.mixed:
            s = mixed(s, inputs["pre_weight"], inputs["pre_bias"])
        added = self.added(inputs, q)
        if added is not None:
            s = s + added
        if self.case.masks:
            s = s.masked_fill(~self.seen(inputs), -torch.inf)
        p = s.softmax(-1)
        if self.case.mixed:
            p = mixed(p, inputs["post_weight"], inputs["post_bias"])
        return (p @ v).transpose(1, 2)

    def added(self, inputs: dict[str, Any], q: Tensor) -> Tensor | None:
        if not self.case.grid:
            return inputs.get("bias")
        rows, columns = self.relative(inputs, q)
        return (rows[..., :, None] + columns[..., None, :]).flatten(3)

    def relative(self, inputs: dict[str, Any], q: Tensor) -> tuple[Tensor, Tensor]:
        """What each query adds to the rows and to the columns of the grid of keys, [B, H, N, n]."""
        n = self.case.grid
        place = torch.arange(n, device=q.device)[:, None] - torch.arange(n, device=q.device) + n - 1
        grid = q.unflatten(2, (n, n))
        rows = torch.einsum("bhyxd,yud->bhyxu", grid, inputs["rel_h"][place])
        columns = torch.einsum("bhyxd,xwd->bhyxw", grid, inputs["rel_w"][place])
        return rows.flatten(2, 3), columns.flatten(2, 3)

    def seen(self, inputs: dict[str, Any]) -> Tensor:
        """True where a resized probability is at least a half; all of a row without such a cell."""
        side = (self.case.side, self.case.side)
        resized = F.interpolate(inputs["logits"], size=side, mode="bilinear", align_corners=False)
        hidden = resized.sigmoid().flatten(2)[:, None] < 0.5
        return ~hidden | hidden.all(-1, keepdim=True)


def mixed(s: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(s.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


class Sdpa(Eager):
    """By the kernel that torch chooses, or by one of its kernels."""

    def __init__(self, case: Case, kernel: SDPBackend | None = None) -> None:
        super().__init__(case)
        self.kernel = kernel

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        mask = self.seen(inputs) if self.case.masks else self.added(inputs, q)
        if mask is not None and mask.dim() == 3:
            mask = mask[None]
        with nullcontext() if self.kernel is None else sdpa_kernel(self.kernel):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Flex(Eager):
    def __init__(self, case: Case) -> None:
        super().__init__(case)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.flex = torch.compile(flex_attention, dynamic=False)
        self.block_mask = torch.compile(create_block_mask, dynamic=False)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (inputs[n].transpose(1, 2) for n in ("q", "k", "v"))
        bias, n, blocks = inputs.get("bias"), self.case.grid, None
        rows, columns = self.relative(inputs, q) if n else (q, q)

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if n:
                return score + rows[b, h, i, j // n] + columns[b, h, i, j % n]
            return score if bias is None else score + bias[h, i, j]

        if self.case.masks:
            seen = self.seen(inputs)
            shape = (self.case.batch, None, self.case.queries, self.case.keys)
            blocks = self.block_mask(lambda b, h, i, j: seen[b, 0, i, j], *shape, device=q.device)
        return self.flex(q, k, v, score_mod=score_mod, block_mask=blocks).transpose(1, 2)


KERNELS = {
    "sdpa_math": SDPBackend.MATH,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs; talking heads have no fused form, so that eager stands for sdpa and flex there."""
    if name == "compiled":
        return torch.compile(Eager(case).__call__, dynamic=False)
    of_torch = {of: partial(Sdpa, kernel=kernel) for of, kernel in KERNELS.items()}
    fused = {"eager": Eager, "sdpa": Sdpa, "flex": Flex, **of_torch}[name]
    return (Eager if case.mixed else fused)(case)


def supports(name: str, case: Case, device: str, backward: bool) -> bool:
    """FlexAttention has no backward on the CPU, where torch has two kernels, of which it chooses that for flash attention or, for
    the gradient of a bias, the plain one; flash attention takes no mask on a GPU, and no kernel mixes heads."""
    if name in KERNELS:
        masked = case.bias or case.masks or case.grid
        takes = name == "sdpa_math" or (device != "cpu" and not (name == "sdpa_flash" and masked))
        return takes and not case.mixed
    return not (name == "flex" and device == "cpu" and backward)
