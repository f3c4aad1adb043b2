"""Rotary position embedding."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern._export import exportable

LAYOUTS = ("interleaved", "half")


@exportable
@dataclass(frozen=True, eq=False)
class Rope:
    """Pairs (a, b) of channels become ``(a c - b s, b c + a s)`` (RoFormer, Su et al. 2021), in float32, rounded once.

    ``cos, sin [B|1, n, H|1, R/2]``, R at most D: the channels from R on stay. ``layout="interleaved"`` (timm, SAM 2) pairs
    channels 2i and 2i + 1, ``"half"`` (Qwen, DINOv3) i and i + R/2. ``q_range``, ``k_range``: the tokens (first, last + 1) that
    turn; None is all. Their number is a multiple of n: the angles repeat.
    """

    cos: Tensor
    sin: Tensor
    layout: str = "interleaved"
    q_range: tuple[int, int] | None = None
    k_range: tuple[int, int] | None = None

    def turn(self, x: Tensor, among: tuple[int, int] | None) -> Tensor:
        """``x [B, N, H, D]`` with the tokens of the range turned."""
        first, last = among or (0, x.shape[1])
        acc = torch.promote_types(x.dtype, torch.float32)
        half = self.cos.shape[-1]
        repeats = (last - first) // max(self.cos.shape[1], 1)
        cos, sin = (t.to(acc).repeat(1, repeats, 1, 1) for t in (self.cos, self.sin))
        inside = x[:, first:last, :, : 2 * half].to(acc)
        if self.layout == "interleaved":
            a, b = inside[..., 0::2], inside[..., 1::2]
        else:
            a, b = inside[..., :half], inside[..., half:]
        lost = None
        if cos.requires_grad or sin.requires_grad:  # 0 times a NaN that a mask hides would be their gradient
            lost = ~(a.isfinite() & b.isfinite())
            a, b = a.masked_fill(lost, 0.0), b.masked_fill(lost, 0.0)
        pair = (a * cos - b * sin, b * cos + a * sin)  # [B, n, H, R/2]
        if lost is not None:
            pair = (pair[0].masked_fill(lost, math.nan), pair[1].masked_fill(lost, math.nan))
        turned = torch.stack(pair, -1).flatten(-2) if self.layout == "interleaved" else torch.cat(pair, -1)
        turned = torch.cat((turned.to(x.dtype), x[:, first:last, :, 2 * half :]), -1)
        return torch.cat((x[:, :first], turned, x[:, last:]), 1)
