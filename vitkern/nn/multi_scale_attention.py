"""Attention of MViTv2 as one module: pooled queries, keys and values, decomposed positions, residual pooling."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.bias import DecomposedRelativePosition
from vitkern.nn import _checks
from vitkern.ops.attention import attention
from vitkern.ops.merge_lse import merge_lse


class MultiScaleAttention(nn.Module):
    """Pooling attention of MViTv2 (Li et al. 2022, eq. 4 to 6) of the tokens of a map, ``[B, H W, dim]``, or of a class token and
    these; returns tokens ``[B, N', dim_out]`` and the (H', W') of the pooled queries' map.

    q, k and v are pooled head by head by a depthwise convolution and normalised, the class token is not pooled and has no
    position; the scores get ``q . rel_pos_h[dy] + q . rel_pos_w[dx]``, q without its scale, and the pooled q is added to the
    output. Parameters are those of ``MultiScaleAttention`` in facebookresearch/mvit, ``mvit/models/attention.py`` (2022), and
    timm, ``mode="conv"``: ``qkv``, ``proj``, ``pool_q``, ``norm_q`` and likewise k and v (absent where kernel and stride are
    1), ``rel_pos_h``, ``rel_pos_w``. On a map of another size the tables are resized linearly.

    Args:
        dim: channels of x.
        dim_out: channels of the output.
        feat_size: the (H, W) of the tables' map.
        num_heads: heads; divides dim_out.
        qkv_bias: whether ``qkv`` has a bias.
        kernel_q, stride_q: (y, x) of the convolution of q; kernel_kv, stride_kv: of those of k and v.
        has_cls_token: whether a class token stands in front of the map.
        residual_pooling: whether q is added to the output.

    Raises:
        ValueError: num_heads does not divide dim_out, or x is not ``[B, N, dim]`` with the tokens of the map.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        feat_size: tuple[int, int],
        num_heads: int = 8,
        qkv_bias: bool = True,
        kernel_q: tuple[int, int] = (1, 1),
        kernel_kv: tuple[int, int] = (1, 1),
        stride_q: tuple[int, int] = (1, 1),
        stride_kv: tuple[int, int] = (1, 1),
        has_cls_token: bool = True,
        residual_pooling: bool = True,
    ) -> None:
        super().__init__()
        head_dim = _checks.heads(self, dim_out, num_heads)
        self.dim, self.dim_out, self.num_heads, self.scale = dim, dim_out, num_heads, head_dim**-0.5
        self.has_cls_token, self.residual_pooling = has_cls_token, residual_pooling
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        for name, kernel, stride in (
            ("q", kernel_q, stride_q),
            ("k", kernel_kv, stride_kv),
            ("v", kernel_kv, stride_kv),
        ):
            pools = kernel != (1, 1) or stride != (1, 1)
            padding = (kernel[0] // 2, kernel[1] // 2)
            pool = (
                nn.Conv2d(head_dim, head_dim, kernel, stride, padding, groups=head_dim, bias=False) if pools else None
            )
            setattr(self, f"pool_{name}", pool)
            setattr(self, f"norm_{name}", nn.LayerNorm(head_dim) if pools else None)
        for name, side, of_q, of_kv in zip("hw", feat_size, stride_q, stride_kv, strict=True):
            rows = 2 * max(side // of_q, side // of_kv) - 1
            setattr(self, f"rel_pos_{name}", nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, head_dim), std=0.02)))

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """``feat_size``: the (H, W) of x."""
        _checks.shape(self, "x", x, "B", feat_size[0] * feat_size[1] + self.has_cls_token, self.dim)
        return pooled_attention(self, x, feat_size, DecomposedRelativePosition.resized)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"dim={self.dim}, dim_out={self.dim_out}, num_heads={self.num_heads}"


Fitted = Callable[[Tensor, Tensor, tuple[int, int], tuple[int, int]], DecomposedRelativePosition]


def pooled_attention(module: Any, x: Tensor, size: tuple[int, int], fitted: Fitted) -> tuple[Tensor, tuple[int, int]]:
    """What the module computes; ``fitted(rel_pos_h, rel_pos_w, q_size, k_size)`` are its positions on the maps of q and k."""
    first = int(module.has_cls_token)
    qkv = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(2)
    (q, q_size), (k, k_size), (v, _) = (
        _pooled(t, getattr(module, f"pool_{n}"), getattr(module, f"norm_{n}"), size, first)
        for n, t in zip("qkv", qkv, strict=True)
    )
    bias = fitted(module.rel_pos_h, module.rel_pos_w, q_size, k_size)
    out = _beside_class(q, k, v, bias, module.scale) if first else attention(q, k, v, bias=bias, scale=module.scale)
    if module.residual_pooling:
        out = out + q
    return module.proj(out.flatten(2)), q_size


def _pooled(
    t: Tensor, pool: nn.Module | None, norm: nn.Module | None, size: tuple[int, int], first: int
) -> tuple[Tensor, tuple[int, int]]:
    """Tokens [B, N, H, D] of a map, pooled and normalised, and the sides of their map."""
    if pool is not None:
        heads = t.shape[2]
        maps = pool(t[:, first:].permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size))  # [B H, D, h, w]
        size = (maps.shape[2], maps.shape[3])
        tokens = maps.flatten(2).unflatten(0, (-1, heads)).permute(0, 3, 1, 2)  # [B, h w, H, D]
        t = torch.cat((t[:, :first], tokens), 1) if first else tokens
    return (t if norm is None else norm(t)), size


def _beside_class(q: Tensor, k: Tensor, v: Tensor, bias: DecomposedRelativePosition, scale: float) -> Tensor:
    """The class token's key joins the others' by their sums: beside positions it would cost a map of scores."""
    parts = bias.per_query(q[:, 1:])
    rows, columns = (nn.functional.pad(t, (0, 0, 0, 0, 1, 0)) for t in parts)  # its query has no position
    of_grid = DecomposedRelativePosition(rows, columns, None, bias.k_grid)
    out, stats = attention(q, k[:, 1:], v[:, 1:], bias=of_grid, scale=scale, return_stats=("lse",))
    lse: Any = stats.lse
    score = scale * (q.to(lse.dtype) * k[:, :1].to(lse.dtype)).sum(-1)  # [B, N, H]
    return merge_lse([out, v[:, :1].expand_as(out)], [lse, score])[0]
