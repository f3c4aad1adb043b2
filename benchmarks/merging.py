"""python -m benchmarks.merging: a whole DeiT-S over r, with vitkern.merging, with published merging, and without merging.

The published merge is written here in plain PyTorch on the same weights (Bolya et al. 2023), eager and compiled; without
merging the model runs timm's own fused attention. Times are medians of interleaved runs; a row counts only where the class
scores of vitkern agree with those of the published merge.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from vitkern import merging

from . import measure

NAMES = ("no merging", "vitkern", "eager", "compiled")
RESULTS = Path(__file__).parent / "results"


class Published(nn.Module):
    """Merging as published, on the modules of a VisionTransformer of timm."""

    def __init__(self, model: Any, r: int) -> None:
        super().__init__()
        self.model, self.r = model, r

    def forward(self, pixels: Tensor) -> Tensor:
        m = self.model
        x = m.norm_pre(m.patch_drop(m._pos_embed(m.patch_embed(pixels))))
        size = torch.ones_like(x[..., :1])
        for i, block in enumerate(m.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
            bias = size.log().mT[:, None] if i else None
            out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
            x = x + block.attn.proj(out.transpose(1, 2).flatten(2))
            x, size = merge(x, size, k.mean(2), self.r)
            x = x + block.mlp(block.norm2(x))
        return m.forward_head(m.norm(x))


def merge(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    r = min(r, (x.shape[1] - 1) // 2)
    if r == 0:
        return x, size
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].mT
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    gone, kept = order[:, :r], order[:, r:].sort(dim=1)[0]
    to = partner[..., None].gather(1, gone)

    def summed(t: Tensor) -> Tensor:
        a, b, c = t[:, ::2], t[:, 1::2], t.shape[-1]
        moved = a.gather(1, gone.expand(-1, -1, c))
        return torch.cat((a.gather(1, kept.expand(-1, -1, c)), b.scatter_add(1, to.expand(-1, -1, c), moved)), 1)

    total = summed(size)
    return summed(x * size) / total, total


def row(model: Any, x: Tensor, r: int) -> dict[str, Any]:
    published = Published(model, r)
    compiled = torch.compile(published, dynamic=False)

    def ours() -> Tensor:
        report = merging.apply(model, r=r)
        try:
            return model(x)
        finally:
            report.undo()

    runs = {
        "no merging": lambda: model(x),
        "vitkern": ours,
        "eager": lambda: published(x),
        "compiled": lambda: compiled(x),
    }
    with torch.inference_mode():
        want, got = published(x), ours()
        wrong = (want - got).abs().max() / want.abs().max()
        if wrong > 1e-4:
            return {"r": r, "wrong": wrong.item()}
        return {"r": r, "seconds": measure.interleaved(runs, 15, 40.0)}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table; r = 0 is the cost of the wrapper."""
    env = result["environment"]
    lines = [
        f"{result['model']}, float32, batch {result['batch']}. {env['cpu']}, {env['threads']} threads, {env['instruction set']}; "
        f"torch {env['torch']}; commit {env['commit']}. Medians of interleaved runs, in ms.",
        "",
        "| r | " + " | ".join(NAMES) + " | × no merging | × eager | × compiled |",
        "|" + "---|" * (len(NAMES) + 4),
    ]
    for found in result["rows"]:
        if "wrong" in found:
            lines.append(f"| {found['r']} | wrong by {found['wrong']:.1e} |" + " |" * (len(NAMES) + 2))
            continue
        s = found["seconds"]
        ratios = [s[n] / s["vitkern"] for n in ("no merging", "eager", "compiled")]
        cells = [f"{s[n] * 1e3:.1f}" for n in NAMES] + [f"{x:.2f}" for x in ratios]
        lines.append(f"| {found['r']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import timm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", default="0,4,8,13,16")
    parser.add_argument("--json", type=Path, help="results/cpu-<instruction set>/models/merging.json by default")
    parser.add_argument("--resume", action="store_true", help="keeps the rows of an earlier run that --r does not name")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=False).eval()
    x = torch.randn(options.batch, 3, *model.patch_embed.img_size)
    env = measure.environment()
    path = options.json or RESULTS / f"cpu-{env['instruction set']}" / "models" / "merging.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if options.resume else []
    for r in map(int, options.r.split(",")):  # what is measured is written at once: a later run goes on with the rest
        rows = sorted([*(old for old in rows if old["r"] != r), row(model, x, r)], key=lambda found: found["r"])
        result = {"model": options.model, "batch": options.batch, "environment": env, "rows": rows}
        path.write_text(json.dumps(result, indent=1))
        path.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
