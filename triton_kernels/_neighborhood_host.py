"""What the launch functions of neighbourhood attention and its halves do on the host: limits, tiles, strides."""

import functools
import math

import torch
import triton
from torch import Tensor

from ._host import DTYPES, device_reasons, power
from ._window_host import alignment

MAX_WIDTH = 256                         # D and Dv
CONFIGS = (                             # element bytes and width at most; tokens of a tile, keys of a block, warps, stages
    (2, 64, 64, 32, 8, 2), (2, 128, 32, 32, 8, 2), (2, 256, 16, 32, 8, 2), (4, 64, 16, 16, 4, 2), (4, 256, 16, 16, 8, 1),
)  # fmt: skip
UNSPECIALIZED = (
    "q_strides", "k_strides", "v_strides", "a_strides", "dout_strides", "dlse_strides", "rpb_strides", "ke_strides", "ve_strides",
    "x_strides", "y_strides", "lengths", "tiles", "heads", "extras", "total", "chunks", "tokens",
)  # fmt: skip


def reasons(maps: dict[str, Tensor], rpb: Tensor | None, interpreted: bool) -> list[str]:
    """Why the kernels cannot run these maps, one sentence each; empty if they can."""
    first, *_ = maps.values()
    why = device_reasons(next(iter(maps)), first, interpreted)
    if any(x.dtype != first.dtype or x.dtype not in DTYPES for x in maps.values()):
        given = ", ".join(str(x.dtype) for x in maps.values())
        why.append(f"{', '.join(maps)} must share float32, bfloat16 or float16, got {given}")
    for name, x in maps.items():
        if name != "attention" and not 1 <= x.shape[-1] <= MAX_WIDTH:
            why.append(f"the head size of {name} must lie in 1..{MAX_WIDTH}, got {x.shape[-1]}")
    if math.prod(first.shape[1:4]) >= 2**31:
        why.append("an image may hold fewer than 2^31 tokens")
    if rpb is not None and sum((n - 1) * s for n, s in zip(rpb.shape, rpb.stride(), strict=True)) >= 2**31:
        why.append("rpb may span fewer than 2^31 elements")
    if rpb is not None and rpb.dtype not in DTYPES:
        why.append(f"rpb must be float32, bfloat16 or float16, got {rpb.dtype}")
    return why


@functools.lru_cache(1024)
def tile(lengths: tuple, kernel: tuple, dilation: tuple, size: int) -> tuple[int, ...]:
    """The sides of a tile of `size` tokens of a group for which queries times keys of their boxes are fewest."""
    sides = [-(-n // d) for n, d in zip(lengths, dilation, strict=True)]

    def work(t: tuple[int, ...]) -> int:
        axes = zip(sides, kernel, t, strict=True)
        return math.prod(-(-n // side) * min(side + k - 1, n) for n, k, side in axes)

    powers = [1 << e for e in range(size.bit_length())]
    shapes = [(size // y // x, y, x) for x in powers for y in powers if x * y <= size]
    return min(shapes, key=lambda t: (work(t), -t[2]))


def counts(lengths, dilation, tile) -> tuple[int, ...]:
    """Tiles of the largest group along each axis."""
    return tuple(triton.cdiv(triton.cdiv(n, d), t) for n, d, t in zip(lengths, dilation, tile, strict=True))


def row_strides(x: Tensor) -> tuple[int, ...]:
    """(batch, three axes, head) of a map [B, L0, L1, L2, H, D] or [B, L0, L1, L2, H]; axes of length 1 count as 0."""
    return tuple(0 if n == 1 else s for n, s in zip(x.shape[:5], x.stride()[:5], strict=True))


def extra_strides(x: Tensor | None) -> tuple[int, ...]:
    """(batch, keys, head, dim) of extra keys or values [B|1, E, Hk, D]."""
    return (0,) * 4 if x is None else (0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:])


def window(lengths, kernel, dilation, stride, causal, zero) -> dict:
    """The constants of a window."""
    return {
        "lengths": tuple(lengths), "KERNEL": tuple(kernel), "DILATION": tuple(dilation), "STRIDE": tuple(stride),
        "CAUSAL": tuple(bool(c) for c in causal), "ZERO": bool(zero),
    }  # fmt: skip


def rpb_strides(rpb: Tensor | None) -> tuple[int, ...]:
    return (0,) * 4 if rpb is None else rpb.stride()


def arguments(q, k, v, rpb, key_mask, k_extra, v_extra, kernel, dilation, stride, causal, zero, scale, *more):
    """Programs of a grid over tiles of tokens and heads, the arguments that kernels of the fused op share, and those of the launch;
    `more` are further maps whose strides count for ALIGN."""
    batch, *lengths, heads, d = q.shape
    dv = v.shape[-1]
    wide = power(max(d, dv))
    side, block_n, warps, stages = next(x[2:] for x in CONFIGS if q.element_size() <= x[0] and wide <= x[1])
    sides = tile(tuple(lengths), tuple(kernel), tuple(dilation), side)
    tiles = counts(lengths, dilation, sides)
    extras = 0 if k_extra is None else k_extra.shape[1]
    shared = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "rpb_ptr": rpb,
        "mask_ptr": None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "ke_ptr": k_extra if extras else None, "ve_ptr": v_extra if extras else None,
        "q_strides": row_strides(q), "k_strides": row_strides(k), "v_strides": row_strides(v),
        "d_strides": (q.stride(-1), k.stride(-1), v.stride(-1)), "rpb_strides": rpb_strides(rpb),
        "ke_strides": extra_strides(k_extra), "ve_strides": extra_strides(v_extra),
        **window(lengths, kernel, dilation, stride, causal, zero), "tiles": tiles, "heads": heads, "extras": extras,
        "scale": float(scale), "D": d, "DV": dv, "BLOCK_D": power(d), "BLOCK_DV": power(dv), "GROUP": heads // k.shape[-2],
        "ALIGN": alignment([q, k, v, *more]),
        "TILE": sides, "BLOCK_N": block_n, "STAGES": stages,
    }  # fmt: skip
    return math.prod(tiles) * heads * math.prod(dilation) * batch, shared, {"num_warps": warps, "num_stages": stages}

