"""What token matching and planning return: small frozen dataclasses of tensors and ints."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Match:
    """The best partner of every token, from :func:`vitkern.bipartite_match`.

    ``score [B, N]`` float32: the similarity of a source to its partner, ``-inf`` where there is none. ``dst [B, N]``
    int32: the partner's position, its own where there is none. ``role [B, N]`` int8: 0 source, 1 destination,
    2 bystander, 3 protected, 4 masked. ``limit``: the most tokens that any sample can merge. ``ragged``: whether samples
    may differ in how many they can merge (a mask, segments, a window).
    """

    score: Tensor
    dst: Tensor
    role: Tensor
    limit: int
    ragged: bool


torch.export.register_dataclass(Match, serialized_type_name="vitkern.Match")
