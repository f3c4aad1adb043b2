"""What dropout draws: a key of Philox, and what it counts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitkern.ops import _checks, _sharded


class Stream(NamedTuple):
    """A seed whose heads are counted from `first_head`, and whose queries are those that `places`, int64 [B, Nq], names: the
    image, times 2^32, and its token. None: the queries' own numbers."""

    seed: int | Tensor | None
    first_head: int = 0
    places: Tensor | None = None


def stream(op: str, p: Any, value: Any, device: torch.device) -> Tensor | None:
    """Dropout with probability p as kernels take it, int64: the seed; of a Stream also the first head, and the places. To the
    first head a shard adds 2^32 times its first image. None where p is 0."""
    if not _checks.number(op, "dropout_p", p):
        return None
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p!r}")
    given = value if isinstance(value, Stream) else Stream(value)
    seed = drawn(device) if given.seed is None else _checks.seed(op, "dropout_seed", given.seed, device)
    if given is value:
        seed = torch.nn.functional.pad(seed, (0, 1), value=given.first_head)
    return seed if given.places is None else torch.cat((seed, given.places.flatten()))


def drawn(device: torch.device) -> Tensor:
    return _sharded.agreed(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device))
