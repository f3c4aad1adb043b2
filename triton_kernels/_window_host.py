"""What both launch functions of window attention do on the host: limits, geometry, strides, configuration."""

import math

import torch
from torch import Tensor

from ._host import DTYPES, device_reasons, power, stream

MAX_TOKENS = 1024                       # of one window
MAX_WIDTH = 256                         # D and Dv
MAX_AXES = 4


def reasons(q, k, v, bias, index, window, dropout_p, interpreted) -> list[str]:
    """Why the kernels cannot run these arguments, one sentence each; empty if they can."""
    why = device_reasons("q", q, interpreted)
    size = math.prod(window)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        why.append(f"q, k and v must share float32, bfloat16 or float16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 1 <= len(window) <= MAX_AXES:
        why.append(f"windows may have 1 to {MAX_AXES} axes, got {len(window)}")
    if size > MAX_TOKENS:
        why.append(f"a window may hold {MAX_TOKENS} tokens, got {size}")
    for name, width in (("D", q.shape[-1]), ("Dv", v.shape[-1])):
        if not 1 <= width <= MAX_WIDTH:
            why.append(f"{name} must lie in 1..{MAX_WIDTH}, got {width}")
    if math.prod(q.shape[1:-2]) >= 2**31:
        why.append("an image may hold fewer than 2^31 tokens")
    if bias is not None and bias.dtype not in DTYPES:
        why.append(f"bias must be float32, bfloat16 or float16, got {bias.dtype}")
    if index is not None and index.dtype != torch.int32:
        why.append(f"index must be int32, got {index.dtype}")
    if not 0.0 <= dropout_p < 1.0:
        why.append(f"dropout_p must lie in [0, 1), got {dropout_p}")
    return why


def row_strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """(batch, four axes, head) of a map [B, *L, H, D] or [B, *L, H]; axes of length 1 count as stride 0."""
    step = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    return (step[0], *[0] * (MAX_AXES - axes), *step[1 : 1 + axes], step[1 + axes])


def tied_strides(maps: dict[str, Tensor | None], axes: int) -> dict:
    """The strides of maps; None for those that equal the first, whose offsets a kernel then computes once for all."""
    found = {f"{n}_strides": (0,) * 6 if x is None else row_strides(x, axes) for n, x in maps.items()}
    first, *rest = found
    return {first: found[first]} | {n: None if found[n] == found[first] else found[n] for n in rest}


def alignment(maps: list[Tensor]) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride of the maps but the last, and each of those is then 1."""
    unit = all(x.stride(-1) == 1 for x in maps)
    steps = [s for x in maps for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    return math.gcd(8, *steps) if unit else 1


def arguments(
    q, k, v, bias, index, logit_scale, k_pad, v_pad, seed, window, shift, roll_first, pad_visible, scale, mask_value,
    cosine_max, cosine_eps, dropout_p, others=(),
) -> dict:
    """The arguments that all kernels share, by name; `others` are further maps whose strides count for ALIGN."""
    axes = len(window)
    lengths = q.shape[1:-2]
    heads, width, width_v = q.shape[-2], q.shape[-1], v.shape[-1]
    lead = MAX_AXES - axes
    counts = [-(-n // w) for n, w in zip(lengths, window, strict=True)]
    padded = any(n % w for n, w in zip(lengths, window, strict=True))
    k_pad_strides = (0, 0) if k_pad is None else k_pad.stride()
    v_pad_strides = (0, 0) if v_pad is None else v_pad.stride()
    if bias is not None and index is None:
        bias = bias.expand(heads, math.prod(window), math.prod(window))
    if bias is not None and sum((n - 1) * s for n, s in zip(bias.shape, bias.stride(), strict=True)) >= 2**31:
        bias = bias.contiguous()                            # kernels count inside a bias in 32 bits
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "bias_ptr": bias, "index_ptr": index if bias is not None else None,
        "tau_ptr": logit_scale, "k_pad_ptr": k_pad, "v_pad_ptr": v_pad, "stream": stream(seed) if dropout_p > 0.0 else None,
        **tied_strides({"q": q, "k": k, "v": v}, axes),
        "d_strides": (q.stride(-1), k.stride(-1), v.stride(-1)),
        "bias_strides": (0, 0, 0) if bias is None else (*bias.stride(), 0)[:3],
        "index_strides": (0, 0) if index is None else index.stride(),
        "pad_strides": (*k_pad_strides, *v_pad_strides),
        "tau_stride": 0 if logit_scale is None else logit_scale.stride(0),
        "lengths": (*[1] * lead, *lengths), "counts": (*[1] * lead, *counts), "shifts": (*[0] * lead, *shift),
        "table_rows": 1 if bias is None else bias.shape[0],
        "windows": math.prod(counts), "heads": heads, "scale": float(scale),
        "mask_value": 0.0 if math.isinf(mask_value) else float(mask_value),
        "cosine_max": float(cosine_max), "cosine_eps": float(cosine_eps),
        "threshold": math.ceil(dropout_p * 2.0**32), "keep_scale": 1.0 / (1.0 - dropout_p),
        "WINDOW": (*[1] * lead, *window), "AXES": axes, "N": math.prod(window), "D": width, "DV": width_v,
        "BLOCK_D": power(width), "BLOCK_DV": power(width_v), "GROUP": heads // k.shape[-2],
        "PADS": 0 if not padded else 2 if pad_visible else 1, "SHIFTED": any(shift), "ROLL_FIRST": bool(roll_first),
        "HIDE": mask_value == -math.inf, "ALIGN": alignment([q, k, v, *others]),
    }  # fmt: skip


UNSPECIALIZED = (
    "q_strides", "k_strides", "v_strides", "dout_strides", "dlse_strides", "dq_strides", "dk_strides", "dv_strides",
    "tau_stride", "lengths", "counts", "shifts", "table_rows", "windows", "heads", "total", "chunks", "threshold",
)  # fmt: skip
