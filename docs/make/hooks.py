"""What mkdocs calls: figures are drawn and tables of speed put in as the site is built, so that neither is ever stale."""

import csv
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs takes it away again behind this file; the folder of this file is there already

import figures  # noqa: E402

from benchmarks import lengths, plots  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SYSTEMS = re.compile(r"<!-- systems: (\w+) -->")
ROLE = re.compile(r":(?:func|class|mod|math):(?=<code>)")  # of docstrings, which Markdown does not know
NAMES = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA", "reference": "definition"}
SPEED = re.compile(r"<!-- speed: (\w+) -->")


def on_files(files: Any, config: Any) -> Any:
    warnings.filterwarnings("ignore", "no compiled")
    made = {f"figures/{name}.svg": draw() for name, draw in figures.FIGURES.items()}
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted(RESULTS.glob("cpu-*/*.json")):
            result = json.loads(path.read_text())
            for kind in ("ratios", "roofline") if plots.computes(result) else ("ratios",):
                picture = Path(folder) / f"{kind}.svg"
                getattr(plots, kind)(result, picture)
                made[f"speed/{path.parent.name}-{path.stem}-{kind}.svg"] = picture.read_bytes()
        for path in sorted(RESULTS.glob("cpu-*/models/lengths*.json")):
            picture = Path(folder) / "lengths.svg"
            lengths.plot(json.loads(path.read_text()), picture)
            made[f"speed/{path.parents[1].name}-{path.stem}.svg"] = picture.read_bytes()
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    markdown = SYSTEMS.sub(lambda found: systems(found[1]), markdown)
    return SPEED.sub(lambda found: speed(found[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return ROLE.sub("", html)


def speed(op: str) -> str:
    """The measured speed of an op on every machine with a committed result: a picture, and the table folded away."""
    parts = []
    for path in sorted(RESULTS.glob(f"cpu-*/{op}.json"), reverse=True):
        result, machine = json.loads(path.read_text()), path.parent.name
        env = result["environment"]
        good = [r["ratio"] for r in result["rows"] if r.get("ratio")]
        parts.append(
            f"**`{op}`**, {env['cpu']}, {env['threads']} threads, {env['instruction set']}, torch {env['torch']}, commit "
            f"`{env['commit']}`: {min(good):.1f} to {max(good):.1f} times as fast as the best baseline.\n\n"
            f"![Ratios of {op}](speed/{machine}-{op}-ratios.svg)\n"
        )
        roof = f"![Roofline of {op}](speed/{machine}-{op}-roofline.svg)\n\n" if plots.computes(result) else ""
        folded = f"\n{roof}{path.with_suffix('.md').read_text()}".replace("\n", "\n    ")
        parts.append(f'??? note "Milliseconds against every baseline, floor, roofline"\n{folded}')
        grown = path.parent / "models" / (f"lengths-{op}.json" if op != "linear_attention" else "lengths.json")
        if grown.exists():
            parts.append(f"{lengths.markdown(json.loads(grown.read_text()), f'speed/{machine}-{grown.stem}.svg')}")
    if not parts:
        raise ValueError(f"no committed result of {op}")
    return "\n\n".join(parts)


def systems(family: str) -> str:
    """The rows of docs/systems.csv of one family as a table."""
    with open(ROOT / "docs" / "systems.csv", newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["family"] == family]
    lines = ["| system | computes | call | back-ends | tested |", "|---|---|---|---|---|"]
    for r in rows:
        also = f"<br><small>{r['also']}</small>" if r["also"] else ""
        call = "" if r["state"].startswith("no") else f"`{r['call']}`"
        module = f"<br>`nn.{r['module']}`" if r["module"] else ""
        file, _, name = r["test"].partition("::")
        words = name.removeprefix("test_").replace("_", " ")
        state = f"<small>{file.removeprefix('test_')}: {words}</small>" if file else f"*{r['state']}*"
        able = "<br>".join(NAMES[name] for name in r["backends"].split())
        cells = (f"**{r['system']}**{also}", r["operator"], call + module, able and f"<small>{able}</small>", state)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)
