"""The demo's HTML report: the photographs, the table, and plots; one file that needs nothing else."""

import base64
import io
from pathlib import Path
from typing import Any

import jinja2

import vitkern
from vitkern.demo.measure import Result
from vitkern.demo.merging import Merged

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitkern demo</title><style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 82rem; padding: 0 1rem; color: #1c1c1c; }
h1 { margin-bottom: 0; } .lead { color: #555; margin-top: .25rem; }
.photos { display: flex; gap: 1rem; flex-wrap: wrap; } .photos img { height: 11rem; border-radius: 4px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #ddd; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; } td.best { font-weight: 600; }
.photos img.groups { height: 18rem; } figcaption { color: #555; }
figure { margin: 1.5rem 0; overflow-x: auto; } figure img.plot { width: 100%; max-width: 68rem; min-width: 38rem; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: .8rem; }
</style></head><body>
<h1>vitkern demo</h1>
<p class="lead">{{ subtitle }}</p>
<div class="photos">{% for name, data in photos %}<img src="data:image/jpeg;base64,{{ data }}" alt="{{ name }}">{% endfor %}</div>
<p>{{ explanation }}</p>
<div class="scroll"><table><tr><th>model</th><th>pixels</th><th>dtype</th><th>eager ms</th><th>compiled ms</th><th>vitkern ms</th>
<th>× eager</th><th>× compiled</th><th>peak MB eager</th><th>peak MB vitkern</th><th>difference</th><th>error eager</th>
<th>error vitkern</th><th>same top 1</th><th>same top 5</th></tr>
{% for r in results %}<tr><td>{{ r.model }}</td><td>{{ r.size[0] }}×{{ r.size[1] }}</td><td>{{ r.dtype }}</td>
<td>{{ "%.1f"|format(r.milliseconds.eager) }}</td>
<td>{{ "%.1f"|format(r.milliseconds.compiled) if r.milliseconds.compiled else "–" }}</td>
<td class="best">{{ "%.1f"|format(r.milliseconds.vitkern) }}</td><td class="best">{{ "%.2f"|format(r.ratio) }}</td>
<td>{{ "%.2f"|format(r.ratio_compiled) if r.ratio_compiled else "–" }}</td>
<td>{{ "%.0f"|format(r.megabytes.eager) if r.megabytes.eager is not none else "?" }}</td>
<td>{{ "%.0f"|format(r.megabytes.vitkern) if r.megabytes.vitkern is not none else "?" }}</td>
<td>{{ "%.1e"|format(r.difference) }}</td><td>{{ "%.1e"|format(r.errors.eager) }}</td>
<td>{{ "%.1e"|format(r.errors.vitkern) }}</td><td>{{ "yes" if r.same_best else "no" }}</td>
<td>{{ "%.0f"|format(100 * r.same_five) }} %</td></tr>{% endfor %}</table></div>
{% for data, what in plots %}<figure><img class="plot" src="data:image/png;base64,{{ data }}" alt="{{ what }}"></figure>
{% endfor %}{% if merged %}<h2>Token merging</h2>
<p>Each line runs the pictures without merging and with r tokens merged in every block. The cosine is that of
every token's feature with merging (its group's) to that without, the mean. Below, the groups after the last block: every
group in its mean colour, light lines between groups.</p>
<div class="scroll"><table><tr><th>model</th><th>pixels</th><th>dtype</th><th>r</th><th>no merging ms</th><th>merging ms</th>
<th>×</th><th>operations saved</th><th>cosine</th><th>tokens after each block</th></tr>
{% for m in merged %}<tr><td>{{ m.model }}</td><td>{{ m.size[0] }}×{{ m.size[1] }}</td><td>{{ m.dtype }}</td><td>{{ m.r }}</td>
<td>{{ "%.1f"|format(m.milliseconds.plain) }}</td><td class="best">{{ "%.1f"|format(m.milliseconds.merged) }}</td>
<td class="best">{{ "%.2f"|format(m.ratio) }}</td><td>{{ "%.0f"|format(100 * m.saved) }} %</td>
<td>{{ "%.4f"|format(m.cosine) }}</td><td>{{ m.tokens|join(" ") }}</td></tr>{% endfor %}</table></div>
{% for m, drawn in groups %}<figure><div class="photos">{% for data in drawn %}<img class="groups"
src="data:image/png;base64,{{ data }}" alt="Groups of {{ m.model }}">{% endfor %}</div>
<figcaption>{{ m.model }}: {{ m.tokens[0] }} tokens in {{ m.tokens[-1] }} groups</figcaption></figure>{% endfor %}
{% endif %}<h2>What was replaced</h2>
{% for name, text in reports.items() %}<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>{% endfor %}
<h2>Machine</h2><pre>{% for key, value in info.items() %}{{ key }}: {{ value }}
{% endfor %}</pre></body></html>"""


def write_report(
    folder: Path,
    results: list[Result],
    merged: list[Merged],
    reports: dict[str, str],
    pictures: list[tuple[str, Any]],
    random_weights: bool,
) -> Path:
    """Writes index.html into the folder and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    info = vitkern.info()
    info.pop("ops")
    weights = (
        "The weights are random: agreement is that of two computations of one function, not of a trained classifier. "
    )
    explanation = (
        (weights if random_weights else "")
        + "Each line runs the same pictures through the model's own code, through torch.compile, and with its attention "
        "replaced by vitkern.patch. Times are medians of interleaved runs. Peak memory is what one forward adds "
        "to the process. The difference is the largest between vitkern and eager; the errors are the largest "
        "of each against the model in float64. Eager DiNAT needs NATTEN; the definition of its attention, in plain PyTorch, "
        "stands in its column."
    )
    page = (
        jinja2.Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            subtitle=f"vitkern {vitkern.__version__}, torch {info['torch']}, {info['threads']} threads, {info['instruction set']}",
            photos=[(name, _picture(p)) for name, p in dict(pictures).items()],
            explanation=explanation,
            results=results,
            merged=merged,
            groups=[(m, [_drawing(d) for d in m.pictures[: len(dict(pictures))]]) for m in merged],
            plots=[
                (_bars(results, attribute, f"{what} (less is better)", log), what)
                for attribute, what, log in (
                    ("milliseconds", "milliseconds per batch", False),
                    ("megabytes", "peak megabytes of one forward", False),
                    ("errors", "largest error against the model in float64", True),
                )
            ],
            reports=reports,
            info=info,
        )
    )
    path = folder / "index.html"
    path.write_text(page)
    return path


def _picture(picture: Any) -> str:
    small = picture.copy()
    small.thumbnail((640, 352))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _drawing(pixels: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).resize((448, 448), Image.NEAREST).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _bars(results: list[Result], attribute: str, label: str, log: bool) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"eager": "#b8b8b8", "compiled": "#7a9cc6", "vitkern": "#d1495b"}
    kinds = [k for k in colors if any(k in getattr(r, attribute) for r in results)]
    figure, axes = plt.subplots(figsize=(10, 0.75 * len(results) + 1.2))
    for i, kind in enumerate(kinds):
        places = [y + 0.8 * (i + 0.5) / len(kinds) - 0.4 for y in range(len(results))]
        values = [getattr(r, attribute).get(kind) or 0.0 for r in results]
        bars = axes.barh(places, values, 0.8 / len(kinds), color=colors[kind], label=kind)
        axes.bar_label(bars, [_short(v) for v in values], padding=3, fontsize=8)
    names = [f"{r.model}, {r.size[0]}×{r.size[1]}, {r.dtype}" for r in results]
    axes.set_yticks(range(len(results)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    if log:
        axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _short(value: float) -> str:
    if 0 < value < 0.05:
        return f"{value:.0e}"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value else ""
