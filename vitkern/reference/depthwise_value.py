"""depthwise_value: a depthwise convolution of values on their map (CSWin, Dong et al. 2022, eq. 7; conditional positions, Chu et al.
2021), zeros around it:

    out_(y,x),c = b_c + sum_(i,j) w_c,(i,j) v_(y + i - kh div 2, x + j - kw div 2),c

All of it is float32 (float64 for float64), rounded once.
"""

import torch
from torch import Tensor


def depthwise_value(
    v: Tensor,  # [B, N, H, D], N = h w
    weight: Tensor,  # [H D|D, 1, kh, kw], odd sides
    bias: Tensor | None,  # [H D|D]
    grid: tuple[int, int],  # h, w
    gpu: str = "",
) -> Tensor:
    """``out [B, N, H, D]`` in v's dtype, contiguous."""
    heads, width = v.shape[2:]
    if v.shape[1] == 0:
        return v.clone()
    acc = torch.promote_types(v.dtype, torch.float32)
    weight, bias = weight.to(acc), None if bias is None else bias.to(acc)
    if len(weight) == width:
        weight, bias = (
            weight.repeat(heads, 1, 1, 1),
            None if bias is None else bias.repeat(heads),
        )  # [H D, 1, kh, kw], [H D]
    maps = v.to(acc).flatten(2).mT.reshape(v.shape[0], heads * width, *grid)  # [B, H D, h, w]
    padding = int(weight.shape[2]) // 2, int(weight.shape[3]) // 2
    found = torch.nn.functional.conv2d(maps, weight, bias, padding=padding, groups=int(heads * width))  # [B, H D, h, w]
    return found.flatten(2).mT.reshape(v.shape).to(v.dtype).contiguous()  # [B, N, H, D]
