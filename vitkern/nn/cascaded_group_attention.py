"""Cascaded group attention of EfficientViT (MSRA) as one module."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition
from vitkern.nn import _checks
from vitkern.ops.window_attention import window_attention


class _ConvNorm(nn.Module):
    """A convolution without bias, normalised over the batch."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, groups: int = 1, weight: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.constant_(self.bn.weight, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class CascadedGroupAttention(nn.Module):
    r"""Cascaded group attention (EfficientViT, Liu et al. 2023, eq. 3 and 4) of a map ``[B, C, H, W]``; returns such a map.

    Head j sees its share of the channels plus what head j - 1 gave: ``x_j + o_{j-1}``, projects them to q, k and v, sends q through
    a depthwise convolution, and attends inside windows with a bias for every pair of absolute offsets. The convolution has zeros
    around each window. A map that windows do not divide is padded with zeros before all that, and the pads take part, as in timm.
    Parameters are those of ``CascadedGroupAttention`` in timm, ``models/efficientvit_msra.py`` (2023 to 2026): ``qkvs.j.conv``,
    ``qkvs.j.bn``, ``dws.j.conv``, ``dws.j.bn``, ``proj.1.conv``, ``proj.1.bn``, ``attention_biases [heads, resolution ** 2]``.

    Args:
        dim: channels C.
        key_dim: channels of a head of queries and keys.
        num_heads: heads; divides dim.
        attn_ratio: channels of a head of values over key_dim; they must be ``dim / num_heads``, which the next head adds.
        resolution: side of a window.
        kernels: side of the convolution of each head's queries.

    Raises:
        ValueError: num_heads does not divide dim, the values have other channels, a head has no kernel, or x
            is not ``[B, C, H, W]``.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4.0,
        resolution: int = 14,
        kernels: Sequence[int] = (5, 5, 5, 5),
    ) -> None:
        super().__init__()
        share = _checks.heads(self, dim, num_heads)
        self.dim, self.num_heads, self.key_dim, self.val_dim = dim, num_heads, key_dim, int(attn_ratio * key_dim)
        self.resolution, self.scale = resolution, key_dim**-0.5
        if self.val_dim != share:
            raise ValueError(
                f"CascadedGroupAttention: attn_ratio * key_dim must be dim / num_heads ({share}), got {self.val_dim}"
            )
        if len(kernels) < num_heads:
            raise ValueError(f"CascadedGroupAttention: kernels must have {num_heads} sides, got {list(kernels)}")
        self.qkvs = nn.ModuleList(_ConvNorm(share, 2 * key_dim + self.val_dim) for _ in range(num_heads))
        self.dws = nn.ModuleList(_ConvNorm(key_dim, key_dim, side, key_dim) for side in kernels[:num_heads])
        self.proj = nn.Sequential(nn.ReLU(), _ConvNorm(dim, dim, weight=0.0))
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, resolution**2))

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", self.dim, "H", "W")
        height, width = x.shape[2:]
        side = self.resolution
        if (height, width) == (side, side):
            return cascade(self, x)
        x = nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % side, 0, -height % side))
        grid = (-1, x.shape[1] // side, x.shape[2] // side)
        windows = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)  # [B nW, s, s, C]
        out = cascade(self, windows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, grid)
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width].permute(0, 3, 1, 2)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, key_dim={self.key_dim}, num_heads={self.num_heads}, resolution={self.resolution}"


def cascade(module: Any, windows: Tensor) -> Tensor:
    """The heads of windows ``[B nW, C, s, s]`` one after another, and the output projection. Partitioned before, not by the op: the
    convolution of q must not see beyond a window."""
    side, sizes = (module.resolution,) * 2, [module.key_dim, module.key_dim, module.val_dim]
    found: list[Tensor] = []
    for head, part in enumerate(windows.chunk(module.num_heads, 1)):
        q, k, v = module.qkvs[head](part if head == 0 else part + found[-1]).split(sizes, 1)
        q, k, v = (t.permute(0, 2, 3, 1)[..., None, :] for t in (module.dws[head](q), k, v))  # [B nW, s, s, 1, D]
        bias = RelativePosition(module.attention_biases[head, :, None], sign="abs")
        out = window_attention(q, k, v, side, bias=bias, scale=module.scale)
        found.append(out[..., 0, :].permute(0, 3, 1, 2))  # type: ignore[union-attr]
    return module.proj(torch.cat(found, 1))
