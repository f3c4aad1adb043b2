"""What token matching and planning return: small frozen dataclasses of tensors and ints."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitkern import backends
from vitkern._export import exportable
from vitkern.ops import _checks
from vitkern.reference.merge_plan import segments


@exportable
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


@exportable
@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which output slot every token goes to, from :func:`vitkern.merge_plan`; all tensors int32.

    ``token_map [B, N]``: the slot, ``n_out`` for a token without one. ``perm [B, N]``, ``offsets [B, n_out + 1]``: the
    tokens of slot o are ``perm[offsets[o]:offsets[o + 1]]``, the destination first. ``lengths [B]``: how many slots a
    sample uses; the first ones, and all ``n_out`` unless the plan is ``ragged``.
    """

    token_map: Tensor
    perm: Tensor
    offsets: Tensor
    lengths: Tensor
    n_out: int
    ragged: bool = False

    @classmethod
    def from_map(cls, token_map: Tensor, n_out: int) -> "MergePlan":
        """A plan from any assignment ``[B, N]`` of tokens to slots; ``n_out`` drops a token. A slot's first token counts
        as its destination."""
        name = "MergePlan.from_map"
        _checks.tensor(name, "token_map", token_map)
        if token_map.dim() != 2 or token_map.is_floating_point() or token_map.dtype == torch.bool:
            raise ValueError(
                f"{name}: token_map must be integers of shape [B, N], got {token_map.dtype} {list(token_map.shape)}"
            )
        if n_out < 0:
            raise ValueError(f"{name}: n_out must be at least 0, got {n_out}")
        if backends.may_read(token_map) and token_map.numel():
            low, high = int(token_map.min()), int(token_map.max())
            if low < 0 or high > n_out:
                raise ValueError(f"{name}: token_map must lie in [0, n_out] = [0, {n_out}], got {low} to {high}")
        return cls._listed(token_map, n_out, torch.full_like(token_map[:, 0], n_out, dtype=torch.int32), False)

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str = "cpu") -> "MergePlan":
        """The plan that merges nothing."""
        position = torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch, 1)
        offsets = torch.arange(tokens + 1, dtype=torch.int32, device=device).repeat(batch, 1)
        lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
        return cls(position, position.clone(), offsets, lengths, tokens)

    @classmethod
    def _listed(
        cls, token_map: Tensor, n_out: int, lengths: Tensor, ragged: bool, later: Tensor | None = None
    ) -> "MergePlan":
        """The plan of a map; where `later` is 1 or True the token stands behind the others of its slot."""
        perm, offsets = segments(token_map, n_out, later)
        token_map, perm, offsets = (t.to(torch.int32).contiguous() for t in (token_map, perm, offsets))
        return cls(token_map, perm, offsets, lengths, n_out, ragged)

    def compose(self, later: "MergePlan") -> "MergePlan":
        """This plan, then ``later`` on its slots. Dropped tokens stay dropped."""
        if later.token_map.shape != (self.token_map.shape[0], self.n_out):
            raise ValueError(
                f"MergePlan.compose: later must be a plan of [B, n_out] = {[self.token_map.shape[0], self.n_out]} tokens, "
                f"got {list(later.token_map.shape)}"
            )
        dropped = torch.full_like(later.token_map[:, :1], later.n_out) if self.n_out else later.offsets[:, :1] * 0
        slots = torch.cat((later.token_map, dropped), 1)  # [B, n_out + 1]
        return self._listed(slots.gather(1, self.token_map.long()), later.n_out, later.lengths, later.ragged)

    def source(self) -> Tensor:
        """Which tokens each slot holds, bool ``[B, n_out, N]``: for display, it is large."""
        return self.token_map[:, None, :] == torch.arange(self.n_out, device=self.token_map.device)[:, None]

    @property
    def key_mask(self) -> Tensor | None:
        """True for the slots in use, ``[B, n_out]``; None where all are."""
        if not self.ragged:
            return None
        return torch.arange(self.n_out, device=self.lengths.device) < self.lengths[:, None]

    @property
    def cu_seqlens(self) -> Tensor:
        """Where each sample starts when the slots in use are packed, int32 ``[B + 1]``."""
        start = torch.zeros_like(self.lengths[:1]) if len(self.lengths) else self.lengths.new_zeros(1)
        return torch.cat((start, self.lengths.cumsum(0, dtype=torch.int32)))

    def pack(self, y: Tensor) -> Tensor:
        """The slots in use of ``y [B, n_out, ...]``, one sample after another: ``[T, ...]``. Reads T on the host."""
        if y.shape[:2] != (self.token_map.shape[0], self.n_out):
            raise ValueError(
                f"MergePlan.pack: y must have the batch and slots of the plan, "
                f"{[self.token_map.shape[0], self.n_out]}, got {list(y.shape[:2])}"
            )
        mask = self.key_mask
        return y.flatten(0, 1) if mask is None else y[mask]
