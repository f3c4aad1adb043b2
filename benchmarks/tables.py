"""python -m benchmarks.tables: writes the Markdown tables of the committed results, their index, the one in the README, and that
of the models that are served, anew.

A table is made from its JSON alone, so that no number in a document is typed by hand; tests/test_documents.py compares.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from vitkern.patch import table as models

from . import lengths, merging

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
IN_README = "cpu-avx512"


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


def index(machine: Path, links: str) -> str:
    """A line for every op that was measured on a machine; its table is found behind `links`."""
    heads = ["op", "cases", "forward", "forward + backward", "time ÷ floor", "torch", "commit"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|---|---|---|"]
    for path in sorted(machine.glob("*.json")):
        result = json.loads(path.read_text())
        rows, env = [r for r in result["rows"] if r.get("ratio")], result["environment"]
        spread = [_spread([r["ratio"] for r in rows if r["pass"] == kind]) for kind in ("fwd", "fwd+bwd")]
        over = _spread([r["over_floor"] for r in rows])
        cells = [f"[{path.stem}]({links}{path.stem}.md)", str(len({r["case"] for r in rows})), *spread, over]
        lines.append("| " + " | ".join([*cells, env["torch"], f"`{env['commit']}`"]) + " |")
    env = json.loads(next(machine.glob("*.json")).read_text())["environment"]
    return f"{env['cpu']}, {env['threads']} threads, {env['instruction set']}.\n\n" + "\n".join(lines) + "\n"


def _spread(numbers: list[float]) -> str:
    return f"{min(numbers):.1f} – **{statistics.median(numbers):.1f}** – {max(numbers):.1f}" if numbers else "–"


def results_page() -> str:
    """benchmarks/results/README.md."""
    lines = [
        "# Results",
        "",
        "How many times as fast as the best baseline a user could pick instead (eager PyTorch, `torch.compile`, SDPA,",
        "FlexAttention, and what else stands in a table), over all cases in float32 and bfloat16: the least, the **median** and",
        "the greatest. A case that does not agree with the float64 oracle in the same run gets no time. The floor is the largest",
        "of bytes, operations and exponentials over the machine's measured ceilings. `python -m benchmarks.tables` makes this page",
        "from the JSON files beside it; `STATUS.md` says which kernels a GPU has never run.",
    ]
    for machine in sorted({p.parent for p in RESULTS.glob("cpu-*/*.json")}):
        lines += ["", f"## {machine.name}", "", index(machine, f"{machine.name}/").rstrip()]
        pages = sorted(machine.glob("models/*.md"))
        if pages:
            named = ", ".join(f"[{p.stem}]({machine.name}/models/{p.name})" for p in pages)
            lines += ["", f"Whole models and lengths: {named}."]
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every file with a table, and what it must hold."""
    files = {p.with_suffix(".md"): markdown(json.loads(p.read_text())) for p in sorted(RESULTS.glob("cpu-*/*.json"))}
    of_models = sorted(RESULTS.glob("cpu-*/models/merging.json"))
    files |= {p.with_suffix(".md"): merging.markdown(json.loads(p.read_text())) for p in of_models}
    grown = sorted(RESULTS.glob("cpu-*/models/lengths*.json"))
    files |= {p.with_suffix(".md"): lengths.markdown(json.loads(p.read_text()), f"{p.stem}.svg") for p in grown}
    files[ROOT / "docs" / "models.md"] = models.markdown()
    begin, end = f"<!-- {IN_README} -->\n", "<!-- end -->"
    before, rest = README.read_text().split(begin)
    table = index(RESULTS / IN_README, f"benchmarks/results/{IN_README}/")
    return files | {RESULTS / "README.md": results_page(), README: before + begin + table + rest[rest.index(end) :]}


def main() -> None:
    for path, text in generated().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
