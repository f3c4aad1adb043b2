"""`vitkern bench --lengths`: time against the number of tokens, of the four families, and a plot of each.

One image, forward, float32; medians of interleaved runs. What is timed agrees with its definition in float64: linear forms at the
shortest length, the others at each.
"""

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
from .baselines import attention as attention_baselines
from .baselines import bipartite_match as match_baselines
from .baselines import window_attention as window_baselines
from .cases import attention as attention_cases
from .cases import bipartite_match as match_cases
from .cases import window_attention as window_cases

RESULTS = Path(__file__).parent / "results"
LENGTHS = tuple(2**n for n in range(8, 17))
HEADS, WIDTH = 8, 32
LONGEST = 20.0  # seconds a run may take; a form that would take longer is left out
NAMES = ("softmax, fused by PyTorch", "linear, eager", "linear, vitkern", "Manhattan decay, vitkern")


def rates(dtype: torch.dtype) -> Tensor:
    return torch.log(1 - 2.0 ** -(2 + 4 * torch.arange(HEADS) / HEADS)).to(dtype)


def attend(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
            exact, eager = attend(name, *(t.double() for t in (q, k, v))), attend(name, q, k, v)
        assert_close_to_oracle(name, attend(name, q, k, v), exact, eager)


def measured() -> list[dict[str, Any]]:
    """Seconds by name for each length."""
    rows: list[dict[str, Any]] = []
    for n in LENGTHS:
        q, k, v = torch.randn(3, 1, n, HEADS, WIDTH).unbind()
        if not rows:
            check(q, k, v)
        last = rows[-1]["seconds"] if rows else {}
        names = [m for m in NAMES if not rows or (m in last and 4 * last[m] < LONGEST)]
        runs = {m: lambda m=m, q=q, k=k, v=v: attend(m, q, k, v) for m in names}
        rows.append({"tokens": n, "seconds": measure.interleaved(runs, 15, 6.0)})
    return rows


def _series(op: str) -> tuple[Any, Any, list[tuple[int, Any]], list[str]]:
    """Cases, baselines, (tokens, case) and the names of the baselines of an op."""
    if op == "window_attention":
        made = [(s * s, window_cases.Case("map", 1, (s, s), (7, 7), (3, 3), 3, 32)) for s in (14, 28, 56, 112, 224)]
        return window_cases, window_baselines, made, ["eager", "sdpa"]
    if op == "attention":
        tokens = [64, 196, 400, 784, 1600, 3136]
        made = [(n, attention_cases.Case("positions", 1, n, n, 12, 64, bias=True)) for n in tokens]
        return attention_cases, attention_baselines, made, ["eager", "sdpa"]
    tokens = [256, 1024, 4096, 16384]
    return match_cases, match_baselines, [(n, match_cases.Case("tokens", 1, n, 64)) for n in tokens], ["eager"]


SERIES = {
    "window_attention": "Windows of 7 × 7 with shift 3 of square maps, 3 heads of 32 channels, table of positions",
    "attention": "12 heads of 64 channels with a bias of positions",
    "bipartite_match": "Matching of tokens of 64 channels",
}
LINEAR = f"{HEADS} heads of {WIDTH} channels"


def series(op: str) -> list[dict[str, Any]]:
    """Seconds by name for each length, of vitkern and of what people run instead."""
    from .run import measure_case  # which imports the tables, and these the lengths

    cases, baselines, made, names = _series(op)
    rows = []
    for tokens, case in made:
        found = measure_case(cases, baselines, case, torch.float32, False, names)
        if "wrong" in found:
            raise RuntimeError(f"{op}, {tokens} tokens: {found['wrong']}")
        rows.append({"tokens": tokens, "seconds": found["seconds"]})
    return rows


def crossing(rows: list[dict[str, Any]], name: str) -> str:
    """From where on a form is faster than softmax."""
    for r in rows:
        s = r["seconds"]
        if name in s and (NAMES[0] not in s or s[name] < s[NAMES[0]]):
            return f"{name}: faster than softmax from N = {r['tokens']} on"
    return f"{name}: nowhere faster than softmax"


def names_of(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for r in result["rows"] for name in r["seconds"]))


def markdown(result: dict[str, Any], picture: str) -> str:
    env, rows, names = result["environment"], result["rows"], names_of(result)
    lines = [
        f"{result.get('what', LINEAR)}, one image, float32, forward. {env['cpu']}, {env['threads']} threads, "
        f"{env['instruction set']}; torch {env['torch']}; commit {env['commit']}. Medians of interleaved runs, in ms.",
        "",
        "| N | " + " | ".join(names) + " |",
        "|" + "---|" * (len(names) + 1),
    ]
    for r in rows:
        cells = [f"{r['seconds'][m] * 1e3:.2f}" if m in r["seconds"] else "–" for m in names]
        lines.append(f"| {r['tokens']} | " + " | ".join(cells) + " |")
    crossings = [f"{crossing(rows, m)}." for m in NAMES[1:]] if NAMES[0] in names else []
    return "\n".join([*lines, "", *crossings, *([""] if crossings else []), f"![]({picture})", ""])


def plot(result: dict[str, Any], path: Path) -> None:
    from . import plots

    plots.lengths(result, names_of(result), path)


def main(out: Path | None = None) -> int:
    """Writes lengths.json (linear forms) and lengths-<op>.json with their tables and plots."""
    torch.manual_seed(0)
    env = measure.environment()
    folder = out or RESULTS / f"cpu-{env['instruction set'].removesuffix('_bf16')}" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        made = {"lengths": {"what": LINEAR, "rows": measured()}}
    made |= {f"lengths-{op}": {"what": what, "rows": series(op)} for op, what in SERIES.items()}
    for name, found in made.items():
        result = {"environment": env} | found
        path = folder / f"{name}.json"
        path.write_text(json.dumps(result, indent=1))
        path.with_suffix(".md").write_text(markdown(result, f"{name}.svg"))
        plot(result, path.with_suffix(".svg"))
        print(markdown(result, f"{name}.svg"))
    return 0
