"""Masked and biased attention as published models call it: shapes, inputs, and the work that cannot be avoided."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern
from vitkern.bias import DecomposedRelativePosition
from vitkern.mask import FromLogits
from vitkern.modulation import TalkingHeads

from ._random import tensors

BASELINES = ("eager", "compiled", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flex")
MIXTURES = ("pre_weight", "pre_bias", "post_weight", "post_bias")


@dataclass(frozen=True)
class Case:
    """One shape. `model` says who calls it so; `bias`: a dense [H, Nq, Nk] shared by the batch; `grid`: SAM's decomposed
    positions on it; `mixed`: CaiT's talking heads; `masks`: the sides of predicted masks, which each show a query a disc of a
    tenth of the square of keys."""

    model: str
    batch: int
    queries: int
    keys: int
    heads: int
    d: int
    bias: bool = False
    grid: int = 0
    mixed: bool = False
    masks: int = 0

    def __str__(self) -> str:
        return f"{self.model}, Nq={self.queries}, Nk={self.keys}, H={self.heads}, D={self.d}, batch {self.batch}"

    @property
    def side(self) -> int:
        """Of the square of keys."""
        return round(self.keys**0.5)

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        shapes: dict[str, tuple[int, ...]] = {
            "q": (self.batch, self.queries, self.heads, self.d),
            "k": (self.batch, self.keys, self.heads, self.d),
            "v": (self.batch, self.keys, self.heads, self.d),
        }
        if self.bias:
            shapes["bias"] = (self.heads, self.queries, self.keys)
        if self.grid:
            shapes |= {name: (2 * self.grid - 1, self.d) for name in ("rel_h", "rel_w")}
        if self.mixed:
            shapes |= {name: (self.heads,) * (2 if "weight" in name else 1) for name in MIXTURES}
        made = tensors(dtype, device, grad, **shapes)
        if self.masks:
            made["logits"] = self._discs().to(device)
        return made

    def _discs(self) -> torch.Tensor:
        """[B, Q, h, w]: above 0 in a disc around a random centre."""
        generator = torch.Generator().manual_seed(1)
        centre = torch.rand(self.batch, self.queries, 2, 1, 1, generator=generator)
        along = torch.linspace(0, 1, self.masks)
        square = (along[:, None] - centre[:, :, 0]).square() + (along - centre[:, :, 1]).square()
        return 0.1 / torch.pi - square

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        options: dict[str, Any] = {"bias": inputs.get("bias"), "backend": backend}
        if self.grid:
            options["bias"] = DecomposedRelativePosition(
                inputs["rel_h"], inputs["rel_w"], *[(self.grid, self.grid)] * 2
            )
        if self.mixed:
            options["modulation"] = TalkingHeads(*(inputs[name] for name in MIXTURES))
        if self.masks:
            options["mask"] = FromLogits(inputs["logits"], (self.side, self.side))
        return vitkern.attention(inputs["q"], inputs["k"], inputs["v"], **options)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes: q, k, v, bias and logits read once, the output written; backward reads them and dout and writes gradients. Two
        products forward, five backward, two more mixtures of the heads each way; one exponential a score and pass. Of hidden
        keys nothing need be done."""
        size = torch.finfo(dtype).bits // 8
        rows = self.batch * self.heads * self.d * (2 * self.queries + 2 * self.keys)
        scores = self.batch * self.heads * self.queries * self.keys * (0.1 if self.masks else 1.0)
        shared = self.heads * self.queries * self.keys * self.bias
        logits = 4.0 * self.batch * self.queries * self.masks**2
        mixed = self.heads * self.mixed
        return {
            "bytes": float((rows + shared) * size * (3 if backward else 1)) + logits,
            "flops": 2.0 * scores * (self.d * (7 if backward else 2) + mixed * (8 if backward else 2)),
            "exps": scores * (2 if backward else 1),
        }


CASES = [
    Case("BEiT-B/16 224²", 8, 197, 197, 12, 64, bias=True),
    Case("BEiT-B/16 384²", 2, 577, 577, 12, 64, bias=True),
    Case("BEiT-B/16 512²", 1, 1025, 1025, 12, 64, bias=True),
    Case("DeiT-S", 8, 197, 197, 6, 64),
    Case("SAM-B windows", 25, 196, 196, 12, 64, grid=14),
    Case("CaiT-S", 8, 196, 196, 8, 48, mixed=True),
    Case("Mask2Former 1/8, 90 % hidden, from logits 1/4", 1, 100, 4096, 8, 32, masks=128),
]
GPU_CASES = CASES
