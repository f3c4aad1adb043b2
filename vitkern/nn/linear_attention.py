"""Linear attention on a grid of tokens: MLLA's, FLatten's and SLAB's."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vitkern.feature_map import Focused
from vitkern.nn import _checks
from vitkern.ops.linear_attention import linear_attention
from vitkern.rope import Rope
from vitkern.value import DepthwiseValue


class LinearAttention(nn.Module):
    """Linear attention of MLLA (Han et al. 2024) on tokens ``[B, H W, C]``: the block's input is its own values, the numerator
    turns with the place on the grid, and a depthwise convolution of the values is added.

    Parameters are those of ``LinearAttention`` in LeapLabTHU/MLLA, ``models/mlla.py`` (2024): ``qk``, ``lepe``.

    Args:
        dim: channels C, a multiple of 4.
        input_resolution: the grid (H, W).
        num_heads: heads.
        qkv_bias: whether ``qk`` has a bias.

    Raises:
        ValueError: x is not ``[B, H W, C]``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, dim: int, input_resolution: tuple[int, int], num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        _checks.heads(self, dim, num_heads)
        if dim % 4:
            raise ValueError(f"LinearAttention: dim must be a multiple of 4, got {dim}")
        self.dim, self.input_resolution, self.num_heads = dim, tuple(input_resolution), num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        theta = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
        places = torch.meshgrid(*(torch.arange(float(n)) for n in input_resolution), indexing="ij")
        angles = torch.cat([p[..., None] * theta for p in places], -1).reshape(1, -1, num_heads, dim // num_heads // 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.input_resolution
        _checks.shape(self, "x", x, "B", rows * columns, self.dim)
        q, k = self.qk(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        lepe = DepthwiseValue(self.lepe.weight, self.lepe.bias, (rows, columns))
        v = x.to(q.dtype).unflatten(-1, (self.num_heads, -1))
        return linear_attention(q, k, v, preset="mlla", rope=Rope(self.cos, self.sin), lepe=lepe).flatten(2)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}"


class SimplifiedLinearAttention(nn.Module):
    """Linear attention of SLAB (Guo et al. 2024) on tokens ``[B, H W, C]``: ReLU features, a learned position added to the keys, a
    depthwise convolution of the values that all heads share.

    Parameters are those of ``SimplifiedLinearAttention`` in xinghaochen/SLAB and of ``FocusedLinearAttention`` in
    LeapLabTHU/FLatten-Transformer but its scale (2023 to 2024): ``qkv``, ``proj``, ``positional_encoding``, ``dwc``.

    Args:
        dim: channels C.
        input_resolution: the grid (H, W), or the window.
        num_heads: heads.
        qkv_bias: whether ``qkv`` has a bias.
        kernel_size: side of the depthwise kernel.

    Raises:
        ValueError: x is not ``[B, H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        kernel_size: int = 5,
    ) -> None:
        super().__init__()
        width = _checks.heads(self, dim, num_heads)
        self.dim, self.input_resolution, self.num_heads = dim, tuple(input_resolution), num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.positional_encoding = nn.Parameter(torch.zeros(1, input_resolution[0] * input_resolution[1], dim))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.input_resolution
        _checks.shape(self, "x", x, "B", rows * columns, self.dim)
        q, k, v = self.qkv(x).chunk(3, -1)
        k = k + self.positional_encoding.to(k.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        lepe = DepthwiseValue(self.dwc.weight, self.dwc.bias, (rows, columns))
        return self.proj(self._attend(q, k, v, lepe).flatten(2))

    if TYPE_CHECKING:
        __call__ = forward

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lepe: DepthwiseValue) -> Tensor:
        return linear_attention(q, k, v, preset="slab", lepe=lepe)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}"


class FocusedLinearAttention(SimplifiedLinearAttention):
    """Linear attention of FLatten (Han et al. 2023) on tokens ``[B, H W, C]``: focused features whose norms run over all channels,
    else as SLAB's. Parameters are those of ``FocusedLinearAttention`` in LeapLabTHU/FLatten-Transformer (2023 to 2024): SLAB's
    and ``scale [1, 1, C]``.

    Args:
        focusing_factor: the power of the features.
        dim, input_resolution, num_heads, qkv_bias, kernel_size: as in `SimplifiedLinearAttention`.

    Raises:
        ValueError: x is not ``[B, H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        focusing_factor: float = 3.0,
    ) -> None:
        super().__init__(dim, input_resolution, num_heads, qkv_bias, kernel_size)
        self.focusing_factor = focusing_factor
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lepe: DepthwiseValue) -> Tensor:
        return linear_attention(
            q, k, v, preset="flatten", feature_map=Focused(self.scale, self.focusing_factor), lepe=lepe
        )
