"""Token merging on photographs: DeiT-S and DINOv2-S with and without it, and a picture of the groups."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import vitkern
from vitkern import merging
from vitkern.demo.measure import interleaved

SIZE = (224, 224)


@dataclass
class Merged:
    """One line of the table."""

    model: str
    size: tuple[int, int]
    dtype: str
    r: int
    milliseconds: dict[str, float]
    tokens: list[int]  # after the embedding and after each block
    saved: float  # share of the blocks' operations
    cosine: float  # of every token's feature with merging (that of its group) to that without: the mean
    pictures: list[Tensor]  # uint8 [H, W, 3], one per picture, the groups after the last block

    @property
    def ratio(self) -> float:
        """How many times as fast as without merging."""
        return self.milliseconds["plain"] / self.milliseconds["merged"]


def models() -> dict[str, tuple[Callable[[], nn.Module], int, int]]:
    """Small models of transformers with random weights, their patch size, and r."""
    import transformers

    small = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
    return {
        "DeiT-S": (
            lambda: transformers.DeiTModel(transformers.DeiTConfig(intermediate_size=1536, **small)),
            16,
            13,
        ),
        "DINOv2-S": (
            lambda: transformers.Dinov2Model(transformers.Dinov2Config(image_size=SIZE[0], patch_size=14, **small)),
            14,
            17,
        ),
    }


def compare(
    name: str,
    model: nn.Module,
    x: Tensor,
    pictures: list[Any],
    patch: int,
    r: int,
    seconds: float,
    step: Callable[[str], None],
) -> Merged:
    """The model on the pixels x of the pictures, without merging and with r tokens merged in every block."""
    title = f"{name} {x.shape[-2]}x{x.shape[-1]} r={r}"
    grid = (x.shape[-2] // patch, x.shape[-1] // patch)

    def plain() -> Tensor:
        return model(x).last_hidden_state

    def merged() -> Tensor:
        report = merging.apply(model, r=r)
        try:
            return plain()
        finally:
            report.undo()

    with torch.inference_mode():
        step(f"{title}: merging")
        whole = plain()
        report = merging.apply(model, r=r, trace=True)
        features = plain()
        report.undo()
        step(f"{title}: measuring")
        times = interleaved({"plain": plain, "merged": merged}, seconds)
    prefix = whole.shape[1] - grid[0] * grid[1]
    drawn = [
        merging.visualize(report.plan, p.resize((x.shape[-1], x.shape[-2])), grid, prefix=prefix, sample=i)
        for i, p in enumerate(pictures)
    ]
    spread = vitkern.unmerge_tokens(features, report.plan)
    cosine = torch.nn.functional.cosine_similarity(whole, spread, dim=-1).mean().item()
    size = (x.shape[-2], x.shape[-1])
    dtype = str(x.dtype).removeprefix("torch.")
    return Merged(name, size, dtype, r, times, [whole.shape[1], *report.tokens], report.flops_saved, cosine, drawn)


def table(results: list[Merged]) -> Table:
    shown = Table(
        title="token merging: ms per batch (medians of interleaved runs); cosine: each token's feature to that without merging"
    )
    for head in ("model", "pixels", "dtype", "r"):
        shown.add_column(head)
    for head in ("no merging", "merging", "×", "operations saved", "cosine", "tokens after each block"):
        shown.add_column(head, justify="right")
    for m in results:
        times = (f"{m.milliseconds['plain']:.1f}", f"{m.milliseconds['merged']:.1f}", f"{m.ratio:.2f}")
        tokens = " ".join(str(n) for n in m.tokens)
        shown.add_row(
            m.model, f"{m.size[0]}×{m.size[1]}", m.dtype, str(m.r), *times, f"{m.saved:.0%}", f"{m.cosine:.4f}", tokens
        )
    return shown
