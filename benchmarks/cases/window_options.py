"""window_attention as SAM, HAT, MaxViT, GC ViT and CSWin call it: positions, a halo, strides, shared queries, stripes."""

from dataclasses import dataclass
from typing import Any

import torch

import vitkern
from vitkern import DepthwiseValue
from vitkern.bias import DecomposedRelativePosition, PerHeadGroup, RelativePosition

BASELINES = ("eager", "compiled", "sdpa")


@dataclass(frozen=True)
class Case:
    """One shape on a square map. `kind`: decomposed, halo, grid, shared or stripes."""

    model: str
    kind: str
    batch: int
    side: int
    window: int
    heads: int
    d: int
    keys: int = 0  # side of a halo

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}"

    @property
    def padded(self) -> int:
        return -(-self.side // self.window) * self.window

    def inputs(self, dtype: torch.dtype, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, low: bool = True) -> torch.Tensor:
            made = torch.randn(*shape, generator=generator)
            return (made.to(dtype) if low else made).to(device).requires_grad_(grad)

        w, heads, d = self.window, self.heads, self.d
        made = {"qkv": draw(self.batch, self.side, self.side, 3, heads, d)}
        if self.kind == "decomposed":
            made |= {"rel_h": draw(2 * w - 1, d, low=False), "rel_w": draw(2 * w - 1, d, low=False)}
            made |= {"k_pad": draw(heads, d), "v_pad": draw(heads, d)}
        elif self.kind == "stripes":
            rows = (2 * self.side - 1) * (2 * w - 1)
            made |= {f"table{i}": draw(rows, heads // 2, low=False) for i in range(2)}
            made["weight"] = draw(heads * d, 1, 3, 3)
        else:
            made["table"] = draw(((w + (self.keys or w)) - 1) ** 2, heads, low=False)
        if self.kind == "shared":
            made["q"] = draw(self.batch, w, w, heads, d)
        return made

    def run(self, inputs: dict[str, Any], backend: str | None = None) -> torch.Tensor:
        qkv, w, sides = inputs["qkv"], self.window, (self.window, self.window)
        if self.kind == "decomposed":
            bias = DecomposedRelativePosition(inputs["rel_h"], inputs["rel_w"], sides, sides)
            pads = (inputs["k_pad"], inputs["v_pad"])
            return vitkern.window_attention_qkvpacked(qkv, w, bias=bias, pad_kv=pads, backend=backend)
        if self.kind == "stripes":
            of_groups = PerHeadGroup(tuple(RelativePosition(inputs[f"table{i}"]) for i in range(2)))
            lepe = DepthwiseValue(inputs["weight"], scope="window")
            stripes = [(None, w), (w, None)]
            return vitkern.window_attention_qkvpacked(qkv, stripes, bias=of_groups, lepe=lepe, backend=backend)
        table = RelativePosition(inputs["table"])
        if self.kind == "halo":
            options = {"context_size": self.keys, "pad_kv": "zero"}
            return vitkern.window_attention(*qkv.unbind(-3), w, bias=table, backend=backend, **options)
        if self.kind == "grid":
            return vitkern.window_attention_qkvpacked(qkv, w, bias=table, partition="grid", backend=backend)
        k, v = qkv.unbind(-3)[1:]
        return vitkern.window_attention(inputs["q"], k, v, w, bias=table, shared_q=True, backend=backend)

    def work(self, dtype: torch.dtype, backward: bool) -> dict[str, float]:
        """Bytes, floating-point operations and exponentials of the op: each input read once, each output written once."""
        element = torch.finfo(dtype).bits // 8
        tokens = self.batch * self.side**2
        size = tokens * self.heads * self.d
        keys = {"halo": self.keys**2, "stripes": self.side * self.window}.get(self.kind, self.window**2)
        maps = 3 if self.kind == "shared" else 4
        flops = 2.0 * size * keys * (2 + (5 if backward else 0))
        if self.kind == "decomposed":
            flops += 2.0 * size * 2 * self.window * (3 if backward else 1)
        if self.kind == "stripes":
            flops += 2.0 * size * 9 * (3 if backward else 1)
        return {
            "bytes": float(size * element * (maps + (maps + 3 if backward else 0))),
            "flops": flops,
            "exps": float(tokens * self.heads * keys * (2 if backward else 1)),
        }


CASES = [
    Case("SAM ViT-B 1024², windows of 14, decomposed positions", "decomposed", 1, 64, 14, 12, 64),
    Case("HAT 64², windows of 16 in halos of 24", "halo", 1, 64, 16, 6, 30, keys=24),
    Case("MaxViT-T 224² stage 1, grid of 7", "grid", 8, 56, 7, 2, 32),
    Case("GC ViT-T 224² stage 1, global queries, windows of 7", "shared", 8, 56, 7, 2, 32),
    Case("CSWin-T 224² stage 3, stripes of 7, convolution of the values", "stripes", 8, 14, 7, 8, 32),
]
GPU_CASES = [Case(c.model, c.kind, 8 * c.batch, c.side, c.window, c.heads, c.d, c.keys) for c in CASES]
