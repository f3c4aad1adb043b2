"""Pictures of a result: times over the floor, ratios to the best baseline, and the machine's roofline."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "vitkern"  # the same file from the same result
import matplotlib.pyplot as plt  # noqa: E402

OURS, OTHERS, LINE = "#d1495b", "#7a9cc6", "#777777"
PASSES = ("#d1495b", "#e8a2ab", "#3d6ea8", "#a3bfdf")


def _label(row: dict[str, Any]) -> str:
    return f"{row['case']}, {row['dtype']}, {row['pass']}"


def over_floor(result: dict[str, Any], path: Path) -> None:
    """The time of every implementation over the floor, per case."""
    good = [r for r in result["rows"] if "seconds" in r]
    names = list(dict.fromkeys(n for r in good for n in r["seconds"]))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(good) + 1.5))
    for i, name in enumerate(names):
        at = [(y + 0.8 * i / len(names), r) for y, r in enumerate(good) if name in r["seconds"]]
        axes.barh([y for y, _ in at], [r["seconds"][name] / r["floor"] for _, r in at], 0.8 / len(names), label=name)
    axes.set_yticks([y + 0.4 for y in range(len(good))], [_label(r) for r in good], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time ÷ floor (1 is the machine's limit)")
    axes.legend()
    _save(figure, path)


def ratios(result: dict[str, Any], path: Path) -> None:
    """How many times as fast as the best baseline, per case; 1 is level."""
    good = [r for r in result["rows"] if r.get("ratio")]
    cases = list(dict.fromkeys(r["case"] for r in good))
    kinds = list(dict.fromkeys((r["dtype"], r["pass"]) for r in good))
    figure, axes = plt.subplots(figsize=(8, (0.16 * len(kinds) + 0.22) * len(cases) + 1.0), layout="constrained")
    for i, kind in enumerate(kinds):
        at = [
            (cases.index(r["case"]) + 0.85 * (i + 0.5) / len(kinds) - 0.425, r["ratio"])
            for r in good
            if (r["dtype"], r["pass"]) == kind
        ]
        bars = axes.barh(
            [y for y, _ in at], [x for _, x in at], 0.85 / len(kinds), color=PASSES[i % 4], label=", ".join(kind)
        )
        axes.bar_label(bars, [f"{x:.1f}" for _, x in at], padding=3, fontsize=7, color=LINE)
    axes.axvline(1, color=LINE, linewidth=0.8)
    axes.set_yticks(range(len(cases)), [textwrap.fill(c, 44) for c in cases], fontsize=7, color=LINE)
    axes.set_ylim(len(cases) - 0.45, -0.55)
    if max(r["ratio"] for r in good) > 12:
        axes.set_xscale("log")
    axes.set_xlabel("time of the best baseline ÷ time of vitkern", fontsize=8, color=LINE)
    axes.tick_params(colors=LINE, labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    figure.legend(loc="outside upper right", ncols=4, fontsize=7, frameon=False, labelcolor=LINE)
    _save(figure, path)


def computes(result: dict[str, Any]) -> bool:
    """Whether a result has anything for a roofline: an op may move tokens alone."""
    return any(r["work"]["flops"] for r in result["rows"] if "seconds" in r)


def roofline(result: dict[str, Any], path: Path) -> None:
    """Operations a second against operations a byte, under what the machine's memory and products allow."""
    ceilings, good = result["ceilings"], [r for r in result["rows"] if "seconds" in r and r["work"]["flops"]]
    figure, axes = plt.subplots(figsize=(8, 5))
    for dtype, marker in (("float32", "o"), ("bfloat16", "^"), ("float16", "s")):
        rows = [r for r in good if r["dtype"] == dtype]
        if not rows:
            continue
        for name, color, label in (("vitkern", OURS, "vitkern"), ("best", OTHERS, "best baseline")):
            of = [(r, r["seconds"].get(r["best"] if name == "best" else name)) for r in rows]
            at = [(r["work"]["flops"] / r["work"]["bytes"], r["work"]["flops"] / s / 1e9) for r, s in of if s]
            axes.scatter(
                [x for x, _ in at], [y for _, y in at], s=18, marker=marker, color=color, label=f"{label}, {dtype}"
            )
        rate = ceilings["flops"]["float32" if dtype == "float16" else dtype]
        intensities = [10 ** (e / 20) for e in range(-20, 81)]
        roof = [min(x * ceilings["bandwidth"], rate) / 1e9 for x in intensities]
        axes.plot(intensities, roof, color=LINE, linewidth=0.8, linestyle="-" if dtype == "float32" else "--")
    axes.set_xscale("log"), axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def lengths(result: dict[str, Any], names: list[str], path: Path) -> None:
    """Milliseconds of each form against the number of tokens."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        points = [(r["tokens"], r["seconds"][name] * 1e3) for r in result["rows"] if name in r["seconds"]]
        ours = OURS if name == "vitkern" else None
        axes.loglog([n for n, _ in points], [ms for _, ms in points], marker="o", base=2, label=name, color=ours)
    axes.set_yscale("log", base=10)
    axes.set_xlabel("tokens N")
    axes.set_ylabel("milliseconds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.set_layout_engine("constrained")
    vector = path.suffix == ".svg"
    figure.savefig(path, dpi=120, transparent=vector, metadata={"Date": None} if vector else None)
    plt.close(figure)
