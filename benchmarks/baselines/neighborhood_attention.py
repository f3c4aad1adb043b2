"""What people run today instead of neighbourhood attention: windows unfolded and gathered, torch's attention with a mask."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.neighborhood_attention import Case


class Eager:
    """Unfolded windows of every group of equal coordinate mod dilation, moved inwards at the border."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        length = case.side // case.dilation
        self.start = (torch.arange(length, device=device) - case.kernel // 2).clamp(0, length - case.kernel)
        place = self.start[:, None] + torch.arange(case.kernel, device=device)
        self.offset = place - torch.arange(length, device=device)[:, None] + case.kernel - 1  # [L, K]

    def grouped(self, x: Tensor) -> Tensor:
        """[B, side, side, H, D] as [B groups, L, L, H, D]."""
        d = self.case.dilation
        x = x.unflatten(2, (-1, d)).unflatten(1, (-1, d))  # [B, L, d, L, d, H, D]
        return x.permute(0, 2, 4, 1, 3, 5, 6).flatten(0, 2)

    def windows(self, x: Tensor) -> Tensor:
        k = self.case.kernel
        return self.grouped(x).unfold(1, k, 1).unfold(2, k, 1)[:, self.start][:, :, self.start]  # [B, L, L, H, D, K, K]

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = inputs["qkv"].unbind(-3)
        d, side = self.case.dilation, self.case.side
        q = self.grouped(q) * self.case.d**-0.5
        s = torch.einsum("byxhd,byxhdij->byxhij", q, self.windows(k))
        if "rpb" in inputs:
            bias = inputs["rpb"][:, self.offset[:, None, :, None], self.offset[None, :, None, :]]  # [H, L, L, K, K]
            s = s + bias.permute(1, 2, 0, 3, 4).to(q.dtype)
        p = s.flatten(-2).softmax(-1).unflatten(-1, (self.case.kernel,) * 2)
        out = torch.einsum("byxhij,byxhdij->byxhd", p, self.windows(v))
        out = out.unflatten(0, (-1, d, d)).permute(0, 3, 1, 4, 2, 5, 6)  # [B, L, d, L, d, H, D]
        return out.reshape(-1, side, side, *out.shape[-2:])


class Masked:
    """What attention over all tokens needs: which keys a query sees, and the place of their offset in rpb."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        i = torch.arange(case.side, device=device)
        length = case.side // case.dilation
        start = (i // case.dilation - case.kernel // 2).clamp(0, length - case.kernel)
        away = i[None] // case.dilation - start[:, None]  # [query, key]
        same = i[:, None] % case.dilation == i[None] % case.dilation
        self.seen = same & (away >= 0) & (away < case.kernel)  # of one axis
        self.offset = ((i[None] - i[:, None]) // case.dilation + case.kernel - 1).clamp(0, 2 * case.kernel - 2)

    def parts(self, inputs: dict[str, Any]) -> list[Tensor]:
        return [t.flatten(1, 2).transpose(1, 2) for t in inputs["qkv"].unbind(-3)]  # [B, H, T, D]

    def finished(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(1, (self.case.side, self.case.side))


class Sdpa(Masked):
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = self.parts(inputs)
        mask = self.seen[:, None, :, None] & self.seen[None, :, None, :]  # [y, x, y, x]
        if "rpb" in inputs:
            bias = inputs["rpb"][:, self.offset[:, None, :, None], self.offset[None, :, None, :]]  # [H, y, x, y, x]
            mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
        mask = mask.flatten(-2).flatten(-3, -2)  # [H|, T, T]
        return self.finished(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Flex(Masked):
    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        self.flex = torch.compile(flex_attention, dynamic=False)
        n, tokens, seen = case.side, case.side**2, self.seen

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return seen[i // n, j // n] & seen[i % n, j % n]

        self.blocks = torch.compile(create_block_mask, dynamic=False)(
            mask_mod, None, None, tokens, tokens, device=device
        )

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = self.parts(inputs)
        rpb, offset, n = inputs.get("rpb"), self.offset, self.case.side

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + rpb[h, offset[i // n, j // n], offset[i % n, j % n]]

        return self.finished(self.flex(q, k, v, score_mod=None if rpb is None else score_mod, block_mask=self.blocks))


class Natten:
    """NATTEN's fused kernels, which take no positions."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        from natten import na2d

        q, k, v = inputs["qkv"].unbind(-3)
        return na2d(q, k, v, kernel_size=self.case.kernel, dilation=self.case.dilation)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    if name == "compiled":
        return torch.compile(Eager(case, device).__call__, dynamic=False)
    return {"eager": Eager, "sdpa": Sdpa, "flex": Flex, "natten": Natten}[name](case, device)


def supports(name: str, case: Case, device: str, backward: bool) -> bool:
    """FlexAttention has no backward on the CPU, and compiled windows of groups write past their memory in theirs (torch 2.13).
    NATTEN has neither positions nor kernels for CPUs."""
    if name == "natten":
        return device != "cpu" and not case.bias and find_spec("natten") is not None
    broken = {"flex": True, "compiled": case.dilation > 1}
    return not (device == "cpu" and backward and broken.get(name, False))
