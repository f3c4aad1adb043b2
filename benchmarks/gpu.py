"""`make gpu`: what a CUDA device must show. Correctness, sanitizer on a small subset, then the benchmark table.

Sections run one after another and are skipped where their results exist already: --section window resumes. Writes JSON and
Markdown under <out>/<device>/. Fits in ten minutes: cases are few and each is timed by CUDA graph replays.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vitkern  # noqa: E402
from benchmarks.measure import environment, supported  # noqa: E402
from vitkern import testing  # noqa: E402

SECTIONS = {  # section -> the ops that it checks; those with a file in benchmarks/cases are timed
    "window": ("window_attention", "window_attention_qkvpacked", "window_attention_options", "depthwise_value"),
    "attention": ("attention", "mask_from_logits"),
    "linear": ("linear_attention", "feature_rows", "chain_sum", "grid_sum"),
    "channel": ("channel_attention",),
    "scan": ("selective_scan",),
    "deformable": ("deformable_attention",),
    "sampled": ("sampled_window_attention",),
    "neighborhood": ("neighborhood_attention", "neighborhood_qk", "neighborhood_av"),
    "merge": (
        "bipartite_match",
        "merge_plan",
        "merge_tokens",
        "unmerge_tokens",
        "select_tokens",
        "drop_tokens",
        "restore_tokens",
    ),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def correctness(name: str) -> list[dict[str, Any]]:
    """Every small call of the op, in every dtype and on every GPU back-end, forward and backward, against the oracle."""
    entry = testing.entries()[name]
    found = []
    for dtype in DTYPES:
        for backend in testing.backends("cuda"):
            for call in entry.small():
                moved = _on_device(call)
                row = {"op": name, "call": str(call), "dtype": str(dtype), "backend": backend}
                try:
                    testing.assert_matches(entry, moved, dtype, backend)
                    row["result"] = "agrees"
                except vitkern.backends.Refused as refusal:
                    row["result"] = "refused: " + str(refusal).splitlines()[0]
                except Exception as error:  # a failure of one case must not hide the others
                    row["result"] = f"FAILED: {type(error).__name__}: {error}"
                found.append(row)
    return found


def _on_device(call: Any) -> Any:
    from dataclasses import replace

    return replace(call, tensors={n: t.cuda() for n, t in call.tensors.items()})


SANITIZED = """
import sys, torch, vitkern
from vitkern import testing
for name in sys.argv[1:]:
    entry = testing.entries()[name]
    for backend in testing.backends("cuda"):
        for call in entry.small():  # the first that the back-end serves
            leaves = call.leaves(torch.bfloat16, entry.gradient)
            tensors = {n: t.detach().cuda().requires_grad_(t.requires_grad) for n, t in leaves.items()}
            try:
                outputs = call.run(tensors, backend)
            except vitkern.backends.Refused:
                continue
            if entry.gradient:
                outputs[0].float().sum().backward()
            print(f"{name} on {backend}: {call}")
            break
        else:
            print(f"{name} on {backend}: no call ran")
torch.cuda.synchronize()
"""


def sanitizer(names: tuple[str, ...]) -> dict[str, str]:
    """compute-sanitizer memcheck and racecheck over one small call of each op and back-end."""
    found = {}
    for tool in ("memcheck", "racecheck"):
        command = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-c",
            SANITIZED,
            *names,
        ]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=150, cwd=ROOT)
            idle = [line for line in done.stdout.splitlines() if line.endswith("no call ran")]
            clean = "; ".join(["clean", *idle])
            found[tool] = clean if done.returncode == 0 else done.stdout[-1500:] + done.stderr[-500:]
        except (OSError, subprocess.TimeoutExpired) as error:
            found[tool] = f"did not run: {error}"
    return found


def replayed(run: Any, repeats: int = 50) -> float:
    """Median seconds of the kernels of one call: a CUDA graph replayed, the second-level cache flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / replayed(lambda: target.copy_(source))


def speed(names: tuple[str, ...]) -> list[dict[str, Any]]:
    bandwidth = copy_bandwidth()
    rows = []
    for name in names:
        if not (ROOT / "benchmarks" / "cases" / f"{name}.py").exists():
            continue
        cases, baselines = (importlib.import_module(f"benchmarks.{kind}.{name}") for kind in ("cases", "baselines"))
        for case in cases.GPU_CASES:
            for direction in getattr(cases, "PASSES", ("fwd", "fwd+bwd")):
                rows.append({"op": name, **timed(case, direction, cases, baselines, bandwidth)})
    return rows


def timed(case: Any, direction: str, cases: Any, baselines: Any, bandwidth: float) -> dict[str, Any]:
    """Seconds of every back-end and of the baselines that need no compiling."""
    backward = direction == "fwd+bwd"
    inputs = case.inputs(torch.bfloat16, "cuda", grad=backward)
    leaves = [t for t in inputs.values() if t.requires_grad]
    upstream = torch.randn_like(case.run(inputs)) if backward else None
    runs = {b: (lambda b=b: case.run(inputs, b)) for b in testing.backends("cuda")}
    ready = [name for name in cases.BASELINES if name not in ("compiled", "flex")]
    for name in supported(baselines, ready, case, "cuda", backward):
        runs[name] = lambda other=baselines.make(name, case, "cuda", torch.bfloat16): other(inputs)
    floor = case.work(torch.bfloat16, backward)["bytes"] / bandwidth
    row: dict[str, Any] = {"case": str(case), "pass": direction, "floor": floor, "seconds": {}}
    for name, run in runs.items():
        once = (lambda run=run: torch.autograd.grad(run(), leaves, upstream)) if backward else run
        try:
            row["seconds"][name] = replayed(once)
        except Exception as error:  # a refusal or a failure is a cell of the table
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
    return row


def markdown(result: dict[str, Any]) -> str:
    env = result["environment"]
    names = list(dict.fromkeys(n for r in result["speed"] for n in r["seconds"]))
    lines = [
        f"{env['device']}, torch {env['torch']}, commit {env['commit']}. Microseconds, CUDA graph replays, cold cache.",
        "",
    ]
    lines += ["| " + " | ".join(["op", "case", "pass", "floor", *names]) + " |", "|" + "---|" * (4 + len(names))]
    for r in result["speed"]:
        cells = [f"{r['seconds'][n] * 1e6:.1f}" if n in r["seconds"] else "–" for n in names]
        lines.append(f"| {r['op']} | {r['case']} | {r['pass']} | {r['floor'] * 1e6:.1f} | " + " | ".join(cells) + " |")
    failed = [r for r in result["correctness"] if r["result"].startswith("FAILED")]
    agrees = sum(r["result"] == "agrees" for r in result["correctness"])
    lines += [
        "",
        f"Correctness: {agrees} agree, {len(failed)} fail, {len(result['correctness']) - agrees - len(failed)} refused.",
    ]
    lines += [f"- {r['backend']} {r['dtype']} {r['call']}: {r['result'][:200]}" for r in failed[:20]]
    lines += [f"- {tool}: {text[:200]}" for tool, text in result["sanitizer"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--section", default="all", help=f"all, or some of {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here; run it where one is", file=sys.stderr)
        return 2
    folder = options.out / torch.cuda.get_device_name().lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    bad = 0
    for section in SECTIONS if options.section == "all" else options.section.split(","):
        if section not in SECTIONS:
            print(f"make gpu: SECTION must be all or some of {', '.join(SECTIONS)}, got {section!r}", file=sys.stderr)
            return 2
        path = folder / f"{section}.json"
        if path.exists() and options.section == "all":
            print(f"{section}: done already ({path}); SECTION={section} runs it again")
            continue
        ops = SECTIONS[section]
        checks = [row for op in ops for row in correctness(op)]
        result = {"environment": environment(), "correctness": checks, "sanitizer": sanitizer(ops), "speed": speed(ops)}
        path.write_text(json.dumps(result, indent=1))
        text = markdown(result)
        (folder / f"{section}.md").write_text(text)
        print(text)
        bad += sum(r["result"].startswith("FAILED") for r in checks)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
