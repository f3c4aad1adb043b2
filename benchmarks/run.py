"""`vitkern bench`: the op against every baseline a user could pick instead, on this machine's CPU.

Agreement with the float64 oracle is checked first, in the same run: no speed-up is printed over a wrong result. Times are
medians of interleaved runs; the floor is the largest of bytes, operations and exponentials over this machine's ceilings.
"""

import argparse
import csv
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from . import measure, tables

ROOT = Path(__file__).parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def measure_case(
    cases: Any, baselines: Any, case: Any, dtype: torch.dtype, backward: bool, names: list[str]
) -> dict[str, Any]:
    """Checks, then times one case. Returns a row of results."""
    inputs = case.inputs(dtype, grad=backward)
    leaves = [t for t in inputs.values() if t.requires_grad]
    upstream = torch.randn(case.run(inputs).shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def complete(run: Any, given: dict[str, Any], go: torch.Tensor) -> list[torch.Tensor]:
        out = run(given)
        wanted = [t for t in given.values() if t.requires_grad]
        return [out.detach(), *torch.autograd.grad(out, wanted, go)] if backward else [out]

    oracle_inputs = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in inputs.items()}
    oracle = complete(lambda given: case.run(given, "reference"), oracle_inputs, upstream.double())
    eager = complete(lambda given: case.run(given, "reference"), inputs, upstream)
    wrong = measure.agreement(str(case), complete(case.run, inputs, upstream), oracle, eager)
    row: dict[str, Any] = {
        "case": str(case),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": "fwd+bwd" if backward else "fwd",
    }
    if wrong:
        return row | {"wrong": wrong}
    runs = {"vitkern": case.run}
    for name in measure.supported(baselines, names, case, "cpu", backward):
        runs[name] = baselines.make(name, case, "cpu", dtype)
    if backward:
        timed = {n: (lambda run=run: torch.autograd.grad(run(inputs), leaves, upstream)) for n, run in runs.items()}
    else:
        timed = {n: (lambda run=run: run(inputs)) for n, run in runs.items()}
    with torch.set_grad_enabled(backward):
        seconds = measure.interleaved(timed, 41)
    return row | {"seconds": seconds, "work": case.work(dtype, backward)}


def finish(row: dict[str, Any], ceilings: measure.Ceilings) -> dict[str, Any]:
    """Adds floor, ratios and what binds."""
    if "wrong" in row:
        return row
    floor, binds = ceilings.floor(row["work"], DTYPES[row["dtype"]])
    others = {n: s for n, s in row["seconds"].items() if n != "vitkern"}
    ours = row["seconds"]["vitkern"]
    best = min(others, key=lambda n: others[n]) if others else None
    own_floor = max(floor, row["work"]["flops"] / ceilings.own_flops)
    return row | {
        "floor": floor,
        "binds": binds,
        "over_floor": ours / floor,
        "over_own_floor": ours / own_floor,
        "best": best,
        "ratio": others[best] / ours if best else None,
    }


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    t = Table(title="median milliseconds; ratio = best baseline / vitkern")
    for head in ("case", "dtype", "pass", "vitkern", *names, "ratio", "best", "floor", "time ÷ floor", "binds"):
        t.add_column(head, justify="left" if head in ("case", "dtype", "pass", "best", "binds") else "right")
    for r in rows:
        if "wrong" in r:
            t.add_row(r["case"], r["dtype"], r["pass"], f"[red]wrong: {r['wrong']}")
            continue
        cells = [f"{r['seconds'][n] * 1e3:.2f}" if n in r["seconds"] else "–" for n in ("vitkern", *names)]
        ratio = f"{r['ratio']:.2f}" if r["ratio"] else "–"
        t.add_row(
            r["case"], r["dtype"], r["pass"], *cells, ratio, r["best"] or "–",
            f"{r['floor'] * 1e3:.2f}", f"{r['over_floor']:.2f}", r["binds"],
        )  # fmt: skip
    return t


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "dtype", "pass", "implementation", "seconds", "floor"])
        for r in rows:
            for name, seconds in r.get("seconds", {}).items():
                writer.writerow([r["case"], r["dtype"], r["pass"], name, seconds, r["floor"]])


def compare(base: str, argv: list[str]) -> None:
    """The same benchmark at another commit and here, in turn, three times; prints the ratio of medians per case."""
    folder = Path(tempfile.mkdtemp(prefix="vitkern-base-"))
    subprocess.run(["git", "worktree", "add", "--detach", str(folder), base], cwd=ROOT, check=True, capture_output=True)
    try:
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True, capture_output=True
        )
        found: dict[str, dict[str, list[float]]] = {}
        for turn in range(3):
            for side, tree in (("here", ROOT), ("base", folder)):
                out = folder / f"{side}-{turn}.json"
                command = [sys.executable, "-m", "benchmarks.run", *argv, "--baselines", "none", "--json", str(out)]
                subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL, env=_environment(tree))
                for row in json.loads(out.read_text())["rows"]:
                    key = f"{row['case']}, {row['dtype']}, {row['pass']}"
                    found.setdefault(key, {}).setdefault(side, []).append(row["seconds"]["vitkern"])
        for key, sides in found.items():
            here, there = (sorted(sides[side])[len(sides[side]) // 2] for side in ("here", "base"))
            print(f"{key}: {there * 1e3:.3f} ms at {base}, {here * 1e3:.3f} ms here, {there / here:.2f} times as fast")
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=False)


def _environment(tree: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(tree)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vitkern bench", description=__doc__)
    parser.add_argument("--op", default="window_attention", help="the op to time (a file of benchmarks/cases)")
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated dtypes")
    parser.add_argument("--passes", default="fwd,fwd+bwd", help="fwd, fwd+bwd or both")
    parser.add_argument("--baselines", default="", help="comma-separated, 'none', or all of the op's by default")
    parser.add_argument("--base", help="compare with another commit instead of with the baselines")
    parser.add_argument("--json", type=Path, help="write results as JSON")
    parser.add_argument("--csv", type=Path, help="write results as CSV")
    parser.add_argument("--plot", type=Path, help="write a picture of time over floor")
    parser.add_argument("--ratios", type=Path, help="write a picture of the ratios to the best baseline")
    parser.add_argument(
        "--roofline", type=Path, help="write a picture of operations a second under the machine's ceilings"
    )
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown")
    options = parser.parse_args(argv)
    if options.base:
        given = ["--op", options.op, "--case", options.case, "--dtype", options.dtype, "--passes", options.passes]
        compare(options.base, given)
        return 0
    cases = importlib.import_module(f"benchmarks.cases.{options.op}")
    baselines = importlib.import_module(f"benchmarks.baselines.{options.op}")
    names = [n for n in options.baselines.split(",") if n and n != "none"] or (
        [] if options.baselines == "none" else list(cases.BASELINES)
    )
    torch.manual_seed(0)
    ceilings = measure.cpu_ceilings()
    chosen = [
        (case, DTYPES[dtype], kind == "fwd+bwd")
        for case in cases.CASES
        if options.case in str(case)
        for dtype in options.dtype.split(",")
        for kind in options.passes.split(",")
        if kind in getattr(cases, "PASSES", ("fwd", "fwd+bwd"))
    ]
    rows = []
    for case, dtype, backward in track(chosen, description="benchmark", console=Console(stderr=True)):
        torch._dynamo.reset()
        rows.append(finish(measure_case(cases, baselines, case, dtype, backward, names), ceilings))
    names = [name for name in names if any(name in r.get("seconds", {}) for r in rows)]
    Console(width=200).print(table(rows, names))
    result = {
        "environment": measure.environment(),
        "ceilings": measure.as_json(ceilings),
        "baselines": names,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.markdown:
        options.markdown.write_text(tables.markdown(result))
    if options.csv:
        write_csv(rows, options.csv)
    for draw, path in (("over_floor", options.plot), ("ratios", options.ratios), ("roofline", options.roofline)):
        if path:
            from . import plots

            getattr(plots, draw)(result, path)
    return 1 if any("wrong" in r for r in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
