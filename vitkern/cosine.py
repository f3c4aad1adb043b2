"""Cosine scores (SwinV2)."""

import math
from dataclasses import dataclass

from torch import Tensor

from vitkern._export import exportable


@exportable
@dataclass(frozen=True, eq=False)
class CosineScore:
    """Scores ``exp(min(logit_scale_h, max)) * cos(q, k)`` in place of ``scale * q.k`` (Swin V2, Liu et al. 2022, eq. 2).

    ``logit_scale [H]`` (or any shape of H elements, such as ``[H, 1, 1]``) gets a gradient where it is at most ``max``. A
    vector is divided by ``max(|x|, eps)``.
    """

    logit_scale: Tensor
    max: float = math.log(100.0)
    eps: float = 1e-12
