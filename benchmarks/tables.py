"""python -m benchmarks.tables: writes the Markdown tables of the committed results, the one in the README, and that of the models
that are served, anew.

A table is made from its JSON alone, so that no number in a document is typed by hand; tests/test_documents.py compares.
"""

import json
from pathlib import Path
from typing import Any

from vitkern.patch import table as models

from . import merging

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
IN_README = "cpu-avx2/window_attention"


def markdown(result: dict[str, Any]) -> str:
    """One result as a table, with the machine and its ceilings above."""
    names = result["baselines"]
    env, c = result["environment"], result["ceilings"]
    heads = ["case", "dtype", "pass", "vitkern", *names, "best ÷ vitkern", "floor", "time ÷ floor", "binds"]
    lines = [
        f"{env['cpu']}, {env['threads']} threads, {env['instruction set']}; torch {env['torch']}; commit {env['commit']}. "
        f"Copy {c['bandwidth'] / 1e9:.1f} GB/s, product {c['flops']['float32'] / 1e9:.0f} GFLOP/s (float32; 2048³, or ours), "
        f"own product loop {c['own_flops'] / 1e9:.0f} GFLOP/s, own exp {c['exps'] / 1e9:.2f} G/s. "
        "Medians of interleaved runs, in ms.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for r in result["rows"]:
        if "wrong" in r:
            lines.append(f"| {r['case']} | {r['dtype']} | {r['pass']} | wrong |" + " |" * (len(heads) - 4))
            continue
        cells = [f"{r['seconds'][n] * 1e3:.2f}" if n in r["seconds"] else "–" for n in ("vitkern", *names)]
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "–"
        tail = [ratio, f"{r['floor'] * 1e3:.2f}", f"{r['over_floor']:.2f}", r["binds"]]
        lines.append("| " + " | ".join([r["case"], r["dtype"], r["pass"], *cells, *tail]) + " |")
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every file with a table, and what it must hold."""
    files = {p.with_suffix(".md"): markdown(json.loads(p.read_text())) for p in sorted(RESULTS.glob("cpu-*/*.json"))}
    of_models = sorted(RESULTS.glob("cpu-*/models/merging.json"))
    files |= {p.with_suffix(".md"): merging.markdown(json.loads(p.read_text())) for p in of_models}
    files[ROOT / "docs" / "models.md"] = models.markdown()
    begin, end = f"<!-- {IN_README} -->\n", "<!-- end -->"
    before, rest = README.read_text().split(begin)
    table = files[RESULTS / f"{IN_README}.md"]
    return files | {README: before + begin + table + rest[rest.index(end) :]}


def main() -> None:
    for path, text in generated().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
