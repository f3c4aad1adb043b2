"""python -m benchmarks.lengths: the time of one attention against the number of tokens, softmax and linear, and a plot of it.

Heads of a vision transformer on one image, forward; medians of interleaved runs. A linear form counts only where it agrees with its
definition in float64 at the shortest length.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vitkern
from vitkern import decay
from vitkern.testing import assert_close_to_oracle

from . import measure

RESULTS = Path(__file__).parent / "results"
LENGTHS = tuple(2**n for n in range(8, 17))
HEADS, WIDTH = 8, 32
LONGEST = 20.0  # seconds a run may take; a form that would take longer is left out
NAMES = ("softmax, fused by PyTorch", "linear, eager", "linear, vitkern", "Manhattan decay, vitkern")


def rates(dtype: torch.dtype) -> Tensor:
    return torch.log(1 - 2.0 ** -(2 + 4 * torch.arange(HEADS) / HEADS)).to(dtype)


def run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == NAMES[0]:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    if name == NAMES[1]:
        a, b, c = (t.transpose(1, 2) for t in (F.elu(q) + 1, F.elu(k) + 1, F.pad(v, (0, 1), value=1.0)))
        out = a @ (b.mT @ c)
        return (out[..., :-1] / (out[..., -1:] + 1e-6)).transpose(1, 2)
    if name == NAMES[2]:
        return vitkern.linear_attention(q, k, v, feature_map="elu1")
    side = 2 ** (q.shape[1].bit_length() // 2)
    grid = (q.shape[1] // side, side)
    return vitkern.linear_attention(q, k, v, feature_map="elu1", decay=decay.Manhattan(rates(q.dtype), grid))


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name in NAMES[2:]:
        with vitkern.use_backend("reference"):
            exact, eager = run(name, *(t.double() for t in (q, k, v))), run(name, q, k, v)
        assert_close_to_oracle(name, run(name, q, k, v), exact, eager)


def measured() -> list[dict[str, Any]]:
    """Seconds by name for each length."""
    rows: list[dict[str, Any]] = []
    for n in LENGTHS:
        q, k, v = torch.randn(3, 1, n, HEADS, WIDTH).unbind()
        if not rows:
            check(q, k, v)
        last = rows[-1]["seconds"] if rows else {}
        names = [m for m in NAMES if not rows or (m in last and 4 * last[m] < LONGEST)]
        runs = {m: lambda m=m, q=q, k=k, v=v: run(m, q, k, v) for m in names}
        rows.append({"tokens": n, "seconds": measure.interleaved(runs, 15, 6.0)})
    return rows


def crossing(rows: list[dict[str, Any]], name: str) -> str:
    """From where on a form is faster than softmax."""
    for r in rows:
        s = r["seconds"]
        if name in s and (NAMES[0] not in s or s[name] < s[NAMES[0]]):
            return f"{name}: faster than softmax from N = {r['tokens']} on"
    return f"{name}: nowhere faster than softmax"


def markdown(result: dict[str, Any]) -> str:
    env, rows = result["environment"], result["rows"]
    lines = [
        f"{HEADS} heads of {WIDTH} channels, one image, float32, forward. {env['cpu']}, {env['threads']} threads, "
        f"{env['instruction set']}; torch {env['torch']}; commit {env['commit']}. Medians of interleaved runs, in ms.",
        "",
        "| N | " + " | ".join(NAMES) + " |",
        "|" + "---|" * (len(NAMES) + 1),
    ]
    for r in rows:
        cells = [f"{r['seconds'][m] * 1e3:.2f}" if m in r["seconds"] else "–" for m in NAMES]
        lines.append(f"| {r['tokens']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{crossing(rows, m)}." for m in NAMES[1:]), "", "![](lengths.svg)", ""])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in NAMES:
        points = [(r["tokens"], r["seconds"][name] * 1e3) for r in rows if name in r["seconds"]]
        axes.loglog(*zip(*points, strict=True), marker="o", base=2, label=name)
    axes.set_yscale("log", base=10)
    axes.set_xlabel("tokens N")
    axes.set_ylabel("milliseconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="results/cpu-<instruction set>/models/lengths.json by default")
    options = parser.parse_args()
    torch.manual_seed(0)
    env = measure.environment()
    path = options.json or RESULTS / f"cpu-{env['instruction set']}" / "models" / "lengths.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        result = {"environment": env, "rows": measured()}
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(markdown(result))
    plot(result["rows"], path.with_suffix(".svg"))
    print(markdown(result))


if __name__ == "__main__":
    main()
