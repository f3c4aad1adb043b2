"""What an attention op can return beside its output."""

from typing import NamedTuple

from torch import Tensor


class Stats(NamedTuple):
    """Statistics of one attention call; None where not asked for with ``return_stats``."""

    lse: Tensor | None = None
    key_mean: Tensor | None = None
    row: Tensor | None = None
    logits_mean: Tensor | None = None
    probs: Tensor | None = None
    logits: Tensor | None = None
    index: Tensor | None = None  # type: ignore[assignment]
