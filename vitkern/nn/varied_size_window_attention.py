"""Varied-size windows of VSA and RVSA as one module: places predicted per window and head, projection, attention, projection."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkern.bias import DecomposedRelativePosition, RelativePosition, offset_index
from vitkern.nn import _checks
from vitkern.ops.sampled_window_attention import sampled_window_attention


class VariedSizeWindowAttention(nn.Module):
    r"""Attention in windows that move and grow (VSA, Zhang et al. 2022) and turn (RVSA, Wang et al. 2022), of a map ``[B, H, W,
    dim]``; returns ``[B, H, W, out_dim]``.

    Every window and head reads its keys and values at ``centre + (1 + scale) local + offset``, scale and offset from the mean of
    the window (``AvgPool2d -> LeakyReLU -> 1x1 convolution``); places outside the map are zero keys and values that take part.
    RVSA turns the scaled window about its centre by a predicted angle. The predictions begin as zeros: windows that stay where
    they are.

    Parameters are those of ``VSAWindowAttention`` of ViTAE-Transformer/ViTAE-VSA (2022): ``sampling_offsets``, ``sampling_scales``,
    ``qkv``, ``proj``, ``relative_position_bias_table`` and the buffer ``relative_position_index``; with `rotated` those of
    ``RotatedVariedSizeWindowAttention`` of ViTAE-Transformer/Remote-Sensing-RVSA (2022), which also has ``sampling_angles``,
    ``rel_pos_h`` and ``rel_pos_w``. ``qkv`` and ``proj`` are linear layers, as there; weights of 1x1 convolutions, as VSA has
    them, are loaded too. Maps that windows do not divide are padded as the two do it: at the right and bottom, or with `rotated`
    on all sides.

    Args:
        dim: channels of the input.
        num_heads: heads; divides dim and out_dim.
        window_size: side of a window.
        out_dim: channels of the output, default dim.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor of the scores; None means ``(dim / num_heads) ** -0.5``.
        proj_drop: dropout of the output, in training. (The dropout of the weights in the two repositories is never applied.)
        rotated: RVSA: rotation, and ``rel_pos_h``, ``rel_pos_w``, the decomposed positions.
        num_deform: groups of a head's channels with places of their own.
        kv_diff: whether values have places of their own; branches are then called ``sampling_offsets_k``, ``..._v`` and so on.
        relative_position_bias: whether there is ``relative_position_bias_table``.
        compat: ``"code"`` divides the offsets of RVSA as its repository does, those of x by ``H // window`` and those of y by
            ``W // window``, and turns in coordinates of [-1, 1], which shears windows of a map that is not square; ``"paper"``
            divides x by ``W // window`` and y by ``H // window`` and turns in pixels. VSA is the same in both.

    Raises:
        ValueError: num_heads does not divide the channels, num_deform not those of a head, or x is not ``[B, H, W, dim]``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        *,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        rotated: bool = False,
        num_deform: int = 1,
        kv_diff: bool = False,
        relative_position_bias: bool = True,
        compat: str = "code",
    ) -> None:
        super().__init__()
        out_dim = out_dim or dim
        _checks.side(self, "window_size", window_size)
        head_dim = _checks.heads(self, dim, num_heads)
        self.head_dim = _checks.heads(self, out_dim, num_heads)
        _checks.one_of(self, "compat", compat, ("code", "paper"))
        if num_deform < 1 or self.head_dim % num_deform:
            raise ValueError(
                f"{type(self).__name__}: num_deform must divide the channels of a head ({self.head_dim}), got {num_deform}"
            )
        self.dim, self.out_dim, self.num_heads, self.window_size = dim, out_dim, num_heads, window_size
        self.rotated, self.num_deform, self.kv_diff, self.compat = rotated, num_deform, kv_diff, compat
        self.scale = head_dim**-0.5 if qk_scale is None else qk_scale
        groups, kinds = num_heads * num_deform, {"offsets": 2, "scales": 2} | ({"angles": 1} if rotated else {})
        for suffix in ("_k", "_v") if kv_diff else ("",):
            for kind, width in kinds.items():
                predict = nn.Conv2d(dim, groups * width, kernel_size=1)
                nn.init.zeros_(predict.weight)
                nn.init.zeros_(predict.bias)  # type: ignore[arg-type]
                pool = nn.AvgPool2d(window_size, window_size)
                self.add_module(f"sampling_{kind}{suffix}", nn.Sequential(pool, nn.LeakyReLU(), predict))
        self.qkv = nn.Linear(dim, 3 * out_dim, bias=qkv_bias)
        self.proj = nn.Linear(out_dim, out_dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if rotated:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * window_size - 1, self.head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * window_size - 1, self.head_dim))
        self.relative_position_bias_table = None
        if relative_position_bias:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            index = offset_index((window_size, window_size), "query-key", torch.device("cpu")).long()
            self.register_buffer("relative_position_index", index)  # of the checkpoint: the op computes the same

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("qkv", "proj"):  # 1x1 convolutions of VSA
            weight = state_dict.get(f"{prefix}{name}.weight")
            if isinstance(weight, Tensor) and weight.dim() == 4:
                state_dict[f"{prefix}{name}.weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        _checks.shape(self, "x", x, "B", "H", "W", self.dim)
        height, width = x.shape[1:3]
        missing = [-length % self.window_size for length in (height, width)]
        before = [n // 2 if self.rotated else 0 for n in missing]
        after = [n - b for n, b in zip(missing, before, strict=True)]
        padding = (before[1], after[1], before[0], after[0])
        means = F.avg_pool2d(F.pad(x.movedim(-1, 1), padding), self.window_size)  # [B, C, nH, nW]
        places = [
            self._places(means, suffix, height, width, before) for suffix in (("_k", "_v") if self.kv_diff else ("",))
        ]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)  # [B, H, W, heads, head_dim]
        if any(before):
            q = F.pad(q, (0, 0, 0, 0, before[1], 0, before[0], 0))  # the first window begins in front of the map
        out = sampled_window_attention(
            q,
            k,
            v,
            self.window_size,
            places[0],
            bias=self._bias(),
            scale=self.scale,
            coords_v=places[1] if self.kv_diff else None,
        )
        out = out[:, before[0] :, before[1] :].flatten(-2)  # [B, H, W, out_dim]
        return self.proj_drop(self.proj(out))

    if TYPE_CHECKING:
        __call__ = forward

    def _bias(self) -> Any:
        side = (self.window_size, self.window_size)
        biases: list[Any] = []
        if self.rotated:
            biases.append(DecomposedRelativePosition(self.rel_pos_h, self.rel_pos_w, side, side))
        if self.relative_position_bias_table is not None:
            biases.append(RelativePosition(self.relative_position_bias_table))
        return biases or None

    def _places(self, means: Tensor, suffix: str, height: int, width: int, before: list[int]) -> Tensor:
        """Places in pixels of the map, [B, nH, nW, w w, heads num_deform, 2]."""
        w, groups = self.window_size, self.num_heads * self.num_deform
        rows, columns = means.shape[2:]

        def predicted(kind: str) -> Tensor:
            found = getattr(self, f"sampling_{kind}{suffix}")[1:](means)  # [B, groups n, nH, nW]
            return (
                found.to(torch.promote_types(found.dtype, torch.float32))
                .unflatten(1, (groups, -1))
                .permute(0, 3, 4, 1, 2)
            )

        offset, scale = predicted("offsets"), predicted("scales")  # [B, nH, nW, groups, 2]: x, y
        spans = [max(n * w - 1, 1) for n in (columns, rows)]  # pixels from -1 to 1, x first
        counts = [max(1, width // w), max(1, height // w)]
        if self.rotated and self.compat == "code":
            counts.reverse()
        steps = torch.stack([offset.new_full((), span / 2 / count) for span, count in zip(spans, counts, strict=True)])
        along = torch.arange(w, dtype=offset.dtype, device=offset.device) - (w - 1) / 2
        local = torch.stack((along.repeat(w), along.repeat_interleave(w)), -1)  # [w w, 2]
        moved = local[:, None] * (1 + scale)[:, :, :, None]  # [B, nH, nW, w w, groups, 2]
        if self.rotated:
            angle = predicted("angles")[:, :, :, None, :, 0]  # [B, nH, nW, 1, groups]
            shear = offset.new_full((), spans[0]) / offset.new_full((), spans[1]) if self.compat == "code" else 1.0
            x, y = moved.unbind(-1)
            moved = torch.stack(
                (x * angle.cos() - y * shear * angle.sin(), y * angle.cos() + x / shear * angle.sin()), -1
            )
        centres = [torch.arange(n, dtype=offset.dtype, device=offset.device) * w + (w - 1) / 2 for n in (rows, columns)]
        centre = torch.stack(
            (centres[1].expand(rows, -1) - before[1], centres[0][:, None].expand(-1, columns) - before[0]), -1
        )
        return centre[:, :, None, None] + moved + (offset * steps)[:, :, :, None]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}, rotated={self.rotated}"
