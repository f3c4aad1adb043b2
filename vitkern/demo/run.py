"""The demo's arguments, lines and pictures."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import vitkern
from vitkern.demo import merging
from vitkern.demo.efficientvit import efficientvit, fused
from vitkern.demo.measure import Result, compare, logits
from vitkern.demo.models import deformable_detr, dinat, mask2former, on_kernel, sam
from vitkern.demo.report import write_report

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def photographs(files: list[str]) -> list[tuple[str, Any]]:
    """The user's pictures, or the two photographs that scikit-learn ships."""
    from PIL import Image

    if files:
        return [(Path(f).name, Image.open(f).convert("RGB")) for f in files]
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    return [(Path(n).name, Image.fromarray(i)) for n, i in zip(found.filenames, found.images, strict=True)]


def pixels(pictures: list[tuple[str, Any]], size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W], resized and normalised as ImageNet models expect."""
    import numpy

    batch = [torch.from_numpy(numpy.asarray(p.resize((size[1], size[0])), dtype="float32") / 255) for _, p in pictures]
    x = torch.stack(batch).movedim(-1, 1)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


@dataclass(frozen=True)
class Subject:
    """A model of the demo. One with sizes runs on those only, in float32 and without torch.compile, which takes minutes."""

    make: Callable[[], nn.Module]
    sizes: tuple[tuple[int, int], ...] = ()
    patched: Callable[[nn.Module], AbstractContextManager[Any]] = vitkern.patched


def models(name: str | None) -> dict[str, Subject]:
    """Models from the library's own configurations with random weights, or the user's own model."""
    import transformers

    if name is None:
        return {
            "Swin-T": Subject(
                lambda: transformers.SwinForImageClassification(transformers.SwinConfig(num_labels=1000))
            ),
            "SwinV2-T": Subject(
                lambda: transformers.Swinv2ForImageClassification(transformers.Swinv2Config(num_labels=1000))
            ),
            "SAM encoder, 384 wide": Subject(sam, ((512, 512),)),
            "Mask2Former, Swin-T": Subject(mask2former, ((256, 320),)),
            "EfficientViT-B1": Subject(efficientvit, ((512, 512), (1024, 1024)), fused),
            "DiNAT (eager: definition)": Subject(dinat, ((224, 224),), on_kernel),
            "Deformable DETR, small": Subject(deformable_detr, ((384, 512),)),
        }
    if Path(name).is_dir():
        load = transformers.AutoModelForImageClassification.from_pretrained
        return {Path(name).name: Subject(lambda: load(name, local_files_only=True))}
    try:
        config = transformers.AutoConfig.for_model(name)
    except ValueError as error:
        raise SystemExit(
            f"vitkern demo: --model must be a local model directory or an architecture of transformers, got {name!r}"
        ) from error
    return {name: Subject(lambda: transformers.AutoModelForImageClassification.from_config(config))}


def table(results: list[Result]) -> Table:
    shown = Table(
        title="milliseconds per batch (medians of interleaved runs); peak MB of each; errors against the model in float64"
    )
    heads = (
        "model",
        "pixels",
        "dtype",
        "eager",
        "compiled",
        "vitkern",
        "× eager",
        "× compiled",
        "peak MB",
        "difference",
        "error eager",
        "error vitkern",
        "same top 1",
        "same top 5",
    )
    for head in heads:
        shown.add_column(head, justify="left" if head in ("model", "pixels", "dtype") else "right")
    for r in results:
        times = [f"{r.milliseconds[k]:.1f}" if k in r.milliseconds else "–" for k in ("eager", "compiled", "vitkern")]
        memory = [f"{m:.0f}" if m is not None else "?" for m in r.megabytes.values()]
        over = f"{r.ratio_compiled:.2f}" if r.ratio_compiled else "–"
        agreement = [f"{x:.1e}" for x in (r.difference, r.errors["eager"], r.errors["vitkern"])]
        agreement += ["yes" if r.same_best else "no", f"{r.same_five:.0%}"]
        size = f"{r.size[0]}×{r.size[1]}"
        shown.add_row(r.model, size, r.dtype, *times, f"{r.ratio:.2f}", over, " / ".join(memory), *agreement)
    return shown


def merge_tokens(pictures: list[tuple[str, Any]], options: argparse.Namespace, bar: Progress) -> list[merging.Merged]:
    """DeiT-S and DINOv2-S with and without token merging."""
    results = []
    with bar:
        made = merging.models()
        task = bar.add_task("merging", total=len(made))
        for name, (make, patch, r) in made.items():
            torch.manual_seed(0)
            model = make().eval()
            x = pixels(pictures, merging.SIZE)
            step = lambda text: bar.update(task, description=text)  # noqa: E731
            results.append(merging.compare(name, model, x, [p for _, p in pictures], patch, r, options.seconds, step))
            bar.advance(task)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vitkern demo", description="Models on photographs, with and without vitkern."
    )
    parser.add_argument("--model", help="a local model directory, or an architecture name of transformers")
    parser.add_argument("--image", action="append", default=[], help="a picture of yours (may be given several times)")
    parser.add_argument("--sizes", default="224x224,256x320", help="height x width, comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="float32, bfloat16")
    parser.add_argument("--batch", type=int, default=2, help="pictures per batch (they repeat)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (it takes a minute per model)"
    )
    parser.add_argument("--quick", action="store_true", help="one size, Swin only, no torch.compile: under a minute")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each line")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the HTML report")
    options = parser.parse_args(argv)
    pictures = photographs(options.image)
    pictures = (pictures * options.batch)[: max(options.batch, len(options.image))]
    sizes = [tuple(int(n) for n in s.split("x")) for s in options.sizes.split(",")][: 1 if options.quick else None]
    dtypes = [DTYPES[d] for d in options.dtypes.split(",")]
    made = {name: m for name, m in models(options.model).items() if not (options.quick and m.sizes)}
    console = Console()
    wide = Console(width=max(console.width, 170))
    bar = Progress(
        TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    results: list[Result] = []
    reports: dict[str, str] = {}
    with bar:
        lines = {name: (list(m.sizes), [torch.float32]) if m.sizes else (sizes, dtypes) for name, m in made.items()}
        task = bar.add_task("starting", total=sum(len(s) * len(d) for s, d in lines.values()))
        for name, subject in made.items():
            torch.manual_seed(0)
            model = subject.make().eval()
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            with subject.patched(model) as report:
                reports[name] = str(report)
            bar.update(task, description=f"{name}: the result in float64")
            with torch.inference_mode():
                exact = {s: logits(model.double(), pixels(pictures, s).double()).float() for s in lines[name][0]}
            for dtype in lines[name][1]:
                model.float().load_state_dict(weights)  # the last dtype may have rounded them
                compiled = None
                if not (options.no_compile or options.quick or subject.sizes):
                    torch._dynamo.reset()
                    compiled = torch.compile(model, dynamic=False)
                for size in lines[name][0]:
                    x = pixels(pictures, size)
                    step = lambda text: bar.update(task, description=text)  # noqa: E731
                    run = compare(name, model, x, exact[size], dtype, compiled, options.seconds, step, subject.patched)
                    results.append(run)
                    bar.advance(task)
                    compiled = None  # compiling takes about a minute: one size shows it
    wide.print(table(results))
    merged = merge_tokens(pictures, options, bar) if options.model is None else []
    if merged:
        wide.print(merging.table(merged))
    path = write_report(options.out, results, merged, reports, pictures, options.model is None)
    console.print(f"Report with plots: {path}")
    # by the model in float64: where eager rounds across a threshold (Mask2Former's masks), only the difference is large
    wrong = [r for r in results if r.dtype == "float32" and not r.errors["vitkern"] <= 1e-3 * max(r.scale, 1.0)]
    for r in wrong:
        console.print(f"[red]{r.model} {r.size}: outputs are {r.errors['vitkern']:.2e} away from the model in float64")
    return 1 if wrong else 0
