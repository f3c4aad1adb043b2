"""Attention whose scores are multiplied by a mixture of Gaussians of the distance, as one module."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.modulation import GaussianMixture
from vitkern.nn import _checks
from vitkern.ops.attention import attention


class GaussianMixtureAttention(nn.Module):
    """Attention of the Gaussian mixture mask (GMM, 2024) of the patches of a grid, ``[B, H W, C]``; returns tokens of the same
    shape.

    ``softmax(G scale q k^T) v`` with ``G = sum_k alpha_kh exp(-d^2 / (2 (sigma_kh^2 + 1e-5)))``, d the distance of two patches.
    Parameters are those of ``Attention`` in CatworldLee/Gaussian-Mixture-Mask-Attention, ``models/vit.py`` (2023): ``to_qkv``
    without bias, ``to_out.0`` (none for one head of dim channels), ``mask.sigma`` and ``mask.alpha`` ``[kernels, heads, 1,
    1]``. The constant ``mask.mask`` of its checkpoints is passed over: the op computes it.

    Args:
        dim: channels C.
        grid: patches (H, W); the code takes square ones only.
        num_heads: heads.
        head_dim: channels of a head.
        num_kernels: Gaussians per head.
        proj_drop: dropout of the output, in training.
        compat: ``"paper"``: G as above. ``"code"``: that file raises exp(-d^2) to a power in float32, so that a term is 0 from
            d^2 = 104 on.

    Raises:
        ValueError: compat is unknown, or x is not ``[B, H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        num_heads: int = 8,
        head_dim: int = 64,
        num_kernels: int = 3,
        proj_drop: float = 0.0,
        compat: str = "paper",
    ) -> None:
        super().__init__()
        _checks.one_of(self, "compat", compat, ("paper", "code"))
        self.dim, self.grid, self.num_heads = dim, (grid[0], grid[1]), num_heads
        self.mode = "exact" if compat == "paper" else "published"
        self.to_qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        plain = num_heads == 1 and head_dim == dim  # the code then has no projection
        project = nn.Sequential(nn.Linear(num_heads * head_dim, dim), nn.Dropout(proj_drop))
        self.to_out: nn.Module = nn.Identity() if plain else project
        self.mask: Any = nn.Module()
        self.mask.sigma = nn.Parameter(torch.randn(num_kernels, num_heads, 1, 1) * 10 + 10)
        self.mask.alpha = nn.Parameter(torch.randn(num_kernels, num_heads, 1, 1) * 2)
        self.register_load_state_dict_pre_hook(_without_constant)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", self.grid[0] * self.grid[1], self.dim)
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        sigma, alpha = (t.flatten(1) for t in (self.mask.sigma, self.mask.alpha))  # [kernels, heads]
        mixture = GaussianMixture(sigma, alpha, self.grid, mode=self.mode)
        return self.to_out(attention(q, k, v, modulation=mixture).flatten(-2))

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}, num_heads={self.num_heads}"


def _without_constant(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}mask.mask", None)
