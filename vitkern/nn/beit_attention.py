"""Attention of BEiT as one module: a table of offsets with three rows for the class token."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitkern.bias import RelativePosition, offset_index, table_rows
from vitkern.nn import _checks
from vitkern.nn.attention import Attention


class BeitAttention(Attention):
    """Attention of BEiT (Bao et al. 2022) of a class token and the patches of a grid, ``[B, 1 + H W, C]``; returns tokens of
    the same shape.

    Parameters are those of ``Attention`` in microsoft/unilm, ``beit/modeling_finetune.py`` (2021 to 2024), and
    timm: ``qkv`` without bias, ``q_bias``, ``v_bias``, ``relative_position_bias_table [(2 H - 1)(2 W - 1) + 3, heads]``, zero at
    first, whose last rows are class to patch, patch to class, class to class, ``proj``. The constant
    ``relative_position_index`` of checkpoints of the former is passed over.

    Args:
        dim: channels C.
        window_size: the (H, W) of the grid; None: no table.
        num_heads: heads; divides dim.
        qkv_bias: whether there are ``q_bias`` and ``v_bias``.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.

    Raises:
        ValueError: num_heads does not divide dim, or x is not ``[B, 1 + H W, C]``.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int] | None,
        num_heads: int = 8,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, False, False, attn_drop, proj_drop)
        self.window_size = None if window_size is None else (window_size[0], window_size[1])
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        if self.window_size is not None:
            rows = table_rows(self.window_size, "query-key", prefix_tokens=1)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))
            index = offset_index(self.window_size, "query-key", torch.device("cpu"), prefix_tokens=1).long()
            self.register_buffer("relative_position_index", index, persistent=False)  # the op computes the same
            self.register_load_state_dict_pre_hook(_without_index)

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``rel_pos_bias``: a bias ``[1, heads, N, N]`` that the blocks of a model share; it is added to the module's own."""
        window = self.window_size
        _checks.shape(self, "x", x, "B", "N" if window is None else 1 + window[0] * window[1], self.dim)
        bias: list[Any] = [] if rel_pos_bias is None else [rel_pos_bias]
        if window is not None:
            bias.append(RelativePosition(self.relative_position_bias_table, grid=window, prefix_tokens=1))
        return self._attend(x, bias=bias)

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return nn.functional.linear(x, self.qkv.weight, bias)


def _without_index(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}relative_position_index", None)
