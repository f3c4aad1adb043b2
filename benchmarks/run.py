"""`vitkern bench`: the op against every baseline a user could pick instead, on this machine's CPU.

Agreement with the float64 oracle is checked first, in the same run: no speed-up is printed over a wrong result. Times are
medians of interleaved runs; the floor is the largest of bytes, operations and exponentials over this machine's ceilings.
"""

import argparse
import csv
import importlib
import itertools
import json
import statistics
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


def table(op: str, rows: list[dict[str, Any]], names: list[str]) -> Table:
    t = Table(title=f"{op}: median milliseconds; ratio = best baseline / vitkern")
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


def compare(base: str, ops: list[str], argv: list[str]) -> None:
    """The same benchmark at another commit and here, in turn, three times; prints the ratio of medians per case."""
    folder = Path(tempfile.mkdtemp(prefix="vitkern-base-"))
    results = Path(tempfile.mkdtemp(prefix="vitkern-bench-"))
    git = ["git", "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), base], cwd=ROOT, check=True, capture_output=True)
    try:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=folder, check=True, capture_output=True)
        for op in ops:
            found: dict[str, dict[str, list[float]]] = {}
            for turn, (side, tree) in itertools.product(range(3), (("here", ROOT), ("base", folder))):
                for row in _timed(tree, op, argv, results / f"{op}-{side}-{turn}"):
                    key = f"{op}: {row['case']}, {row['dtype']}, {row['pass']}"
                    found.setdefault(key, {}).setdefault(side, []).append(row["seconds"]["vitkern"])
            for key, sides in found.items():
                if len(sides) < 2:
                    continue  # a case that only one of them has
                here, there = (statistics.median(sides[side]) for side in ("here", "base"))
                print(
                    f"{key}: {there * 1e3:.3f} ms at {base}, {here * 1e3:.3f} ms here, {there / here:.2f} times as fast"
                )
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], cwd=ROOT, check=False)


def _timed(tree: Path, op: str, argv: list[str], out: Path) -> list[dict[str, Any]]:
    """The rows of an op without baselines: these benchmarks on the package of another tree."""
    arguments = ["--op", op, *argv, "--baselines", "none", "--out", str(out)]
    program = (
        f"import sys; sys.path.insert(0, {str(tree)!r}); import vitkern; sys.path.insert(0, {str(ROOT)!r}); "
        f"from benchmarks.run import main; main({arguments!r})"
    )
    subprocess.run([sys.executable, "-c", program], cwd=out.parent, check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / f"{op}.json").read_text())["rows"]


def measure_op(op: str, options: argparse.Namespace, ceilings: measure.Ceilings) -> dict[str, Any]:
    """Every case of an op that is asked for, checked and timed, with the machine's ceilings."""
    cases = importlib.import_module(f"benchmarks.cases.{op}")
    baselines = importlib.import_module(f"benchmarks.baselines.{op}")
    names = [n for n in options.baselines.split(",") if n and n != "none"] or (
        [] if options.baselines == "none" else list(cases.BASELINES)
    )
    chosen = [
        (case, DTYPES[dtype], kind == "fwd+bwd")
        for case in cases.CASES
        if options.case in str(case)
        for dtype in options.dtype.split(",")
        for kind in options.passes.split(",")
        if kind in getattr(cases, "PASSES", ("fwd", "fwd+bwd"))
    ]
    rows = []
    for case, dtype, backward in track(chosen, description=op, console=Console(stderr=True)):
        torch._dynamo.reset()
        rows.append(finish(measure_case(cases, baselines, case, dtype, backward, names), ceilings))
    names = [name for name in names if any(name in r.get("seconds", {}) for r in rows)]
    Console(width=200).print(table(op, rows, names))
    ceiling = measure.as_json(ceilings)
    return {"environment": measure.environment(), "ceilings": ceiling, "baselines": names, "rows": rows}


def write(op: str, result: dict[str, Any], options: argparse.Namespace) -> None:
    """The files of a result: JSON and its table, with --csv and --plot also these."""
    path = options.out / f"{op}.json"
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".md").write_text(tables.markdown(result))
    if options.csv:
        write_csv(result["rows"], path.with_suffix(".csv"))
    if options.plot:
        from . import plots

        plots.over_floor(result, options.out / f"{op}-floor.svg")
        if any(r.get("ratio") for r in result["rows"]):
            plots.ratios(result, options.out / f"{op}-ratios.svg")
        if plots.computes(result):
            plots.roofline(result, options.out / f"{op}-roofline.svg")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vitkern bench", description=__doc__)
    parser.add_argument(
        "--op", default="all", help="files of benchmarks/cases, comma-separated; all of them by default"
    )
    parser.add_argument("--case", default="", help="only cases whose name holds this text")
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated dtypes")
    parser.add_argument("--passes", default="fwd,fwd+bwd", help="fwd, fwd+bwd or both")
    parser.add_argument("--baselines", default="", help="comma-separated, 'none', or all of the op's by default")
    parser.add_argument("--base", metavar="REF", help="compare with another commit instead of with the baselines")
    parser.add_argument("--lengths", action="store_true", help="time against the number of tokens instead")
    parser.add_argument("--out", type=Path, help="a folder for the results: JSON and tables")
    parser.add_argument("--csv", action="store_true", help="with --out: also CSV")
    parser.add_argument(
        "--plot", action="store_true", help="with --out: also times over the floor, ratios and the roofline"
    )
    options = parser.parse_args(argv)
    if options.lengths:
        from . import lengths

        return lengths.main(options.out)
    known = sorted(p.stem for p in (ROOT / "benchmarks" / "cases").glob("[!_]*.py"))
    ops = known if options.op == "all" else options.op.split(",")
    if set(ops) - set(known):
        parser.error(f"--op must be of {', '.join(known)}, got {options.op}")
    if options.base:
        given = ["--case", options.case, "--dtype", options.dtype, "--passes", options.passes]
        compare(options.base, ops, given)
        return 0
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    ceilings = measure.cpu_ceilings()
    wrong = False
    for op in ops:
        result = measure_op(op, options, ceilings)
        wrong |= any("wrong" in r for r in result["rows"])
        if options.out:
            write(op, result, options)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
