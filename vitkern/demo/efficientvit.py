"""EfficientViT-B1 (Cai et al. 2023) for the demo, in PyTorch: its linear attention as published, or with vitkern's op."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkern.nn import LiteMLA

WIDTHS, DEPTHS, HEAD_WIDTH = (16, 32, 64, 128, 256), (1, 2, 3, 3, 4), 16


def convolution(
    inputs: int, outputs: int, side: int = 1, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.Hardswish()] if act else []))


def inverted(inputs: int, outputs: int, stride: int = 1, expand: int = 4) -> nn.Sequential:
    """A mobile block: expand, depthwise, project."""
    width = inputs * expand
    return nn.Sequential(
        convolution(inputs, width),
        convolution(width, width, 3, stride, width),
        convolution(width, outputs, act=False),
    )


class Added(nn.Module):
    """A block beside the identity."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Published(LiteMLA):
    """The published arithmetic on the parameters of `vitkern.nn.LiteMLA`, or that module's own where `fused`."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return super().forward(x)
        qkv = self.qkv(x)
        heads = torch.cat([qkv, *(op(qkv) for op in self.aggreg)], 1).flatten(2)
        q, k, v = heads.unflatten(1, (-1, 3 * self.dim)).float().chunk(3, 2)  # [B, heads, dim, N]
        q, k, v = q.relu(), k.relu(), nn.functional.pad(v, (0, 0, 0, 1), value=1.0)
        out = (v @ k.mT) @ q
        out = out[:, :, :-1] / (out[:, :, -1:] + self.eps)
        return self.proj(out.to(qkv.dtype).flatten(1, 2).unflatten(2, x.shape[2:]))


def efficientvit() -> nn.Module:
    """The classifier, with 1000 classes and random weights under which no layer fades."""
    layers: list[nn.Module] = [convolution(3, WIDTHS[0], 3, 2), Added(inverted(WIDTHS[0], WIDTHS[0], expand=1))]
    for stage in range(1, 5):
        width = WIDTHS[stage]
        layers.append(inverted(WIDTHS[stage - 1], width, 2))
        for _ in range(DEPTHS[stage] - (stage < 3)):
            if stage > 2:
                layers.append(Added(Published(width, width, dim=HEAD_WIDTH)))
            layers.append(Added(inverted(width, width)))
    head = (convolution(WIDTHS[-1], 1536), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1536, 1000))
    model = nn.Sequential(*layers, *head)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
    return model


@dataclass
class Replaced:
    """What was replaced, as a report of `vitkern.patch` has it."""

    replaced: list[str]

    def __str__(self) -> str:
        return f"{len(self.replaced)} modules run on linear_attention: {', '.join(self.replaced)}"


@contextmanager
def fused(model: nn.Module) -> Iterator[Replaced]:
    """The model with vitkern's linear attention inside the block."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Published)}
    for m in found.values():
        m.fused = True
    try:
        yield Replaced(list(found))
    finally:
        for m in found.values():
            m.fused = False
