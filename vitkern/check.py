"""vitkern check: a model patched and unpatched, layer by layer: outputs, gradients and times.

Every module that ``patch`` would replace is run alone on what the unpatched model gives it, by its own forward, by vitkern's and by
its own in float64. What is printed is the largest error of each against float64, relative to the largest value.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import vitkern
from vitkern.patch import Replaced
from vitkern.testing.oracle import FACTOR, GRADIENT_FACTOR, ULPS


@dataclass
class Layer:
    """One replaced module: errors of its own forward and of vitkern's, and milliseconds of each."""

    at: Replaced
    output: tuple[float, float]
    gradient: tuple[float, float]
    milliseconds: tuple[float, float]
    unit: float  # of rounding in the model's dtype

    @property
    def excess(self) -> float:
        """The error of vitkern over what the rule of the tests allows; above 1 is wrong."""
        pairs = (self.output, FACTOR), (self.gradient, GRADIENT_FACTOR)
        return max(got / (factor * own + ULPS * self.unit) for (own, got), factor in pairs)


def load(name: str) -> nn.Module:
    """A local directory of transformers or timm, or an architecture of either with random weights."""
    folder = Path(name)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.exists():
            raise SystemExit(f"vitkern check: {name} has no config.json, which names the architecture")
        architecture = json.loads(config.read_text()).get("architecture")  # timm's
        return _timm(architecture, folder) if architecture else _transformers(folder)
    try:
        import transformers

        settings = transformers.AutoConfig.for_model(name)
    except (ImportError, ValueError):
        return _timm(name)
    return transformers.AutoModel.from_config(settings)


def _transformers(folder: Path) -> nn.Module:
    import transformers

    return transformers.AutoModel.from_pretrained(folder, local_files_only=True)


def _timm(name: str, folder: Path | None = None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise SystemExit(
            f"vitkern check: {name!r} is no architecture of transformers, and timm is not installed"
        ) from error
    if name not in timm.list_models():
        raise SystemExit(f"vitkern check: {name!r} is neither a directory nor an architecture of transformers or timm")
    model = timm.create_model(name)
    if folder is None:
        return model
    weights = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).exists()), None)
    if weights is None:
        raise SystemExit(f"vitkern check: {folder} has neither model.safetensors nor pytorch_model.bin")
    timm.models.load_checkpoint(model, str(weights))
    return model


def pixels(model: nn.Module, image: str | None, size: list[int] | None) -> Tensor:
    """[1, 3, H, W]: the picture, or noise; of the model's own size where none is given."""
    sides = size or _own_size(model)
    if image is None:
        return torch.randn(1, 3, *sides, generator=torch.Generator().manual_seed(0))
    from vitkern.demo.run import photographs
    from vitkern.demo.run import pixels as of_pictures

    return of_pictures(photographs([image]), (sides[0], sides[1]))


def _own_size(model: Any) -> list[int]:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    found = (
        getattr(config, "image_size", None) or getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    )
    return [found, found] if isinstance(found, int) else list(found)


# layers -----------------------------------------------------------------------------------------------------------------


def layers(model: nn.Module, x: Tensor) -> list[Layer]:
    """Every module that would be replaced, on what it gets in the first call of the unpatched model."""
    report = vitkern.patch(model, dry_run=True)
    calls: dict[str, tuple[Any, Any]] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.setdefault(path, (args, kwargs)) and None

    handles = [
        model.get_submodule(r.path).register_forward_pre_hook(keep(r.path), with_kwargs=True) for r in report.replaced
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [_layer(model.get_submodule(r.path), r, *calls[r.path]) for r in report.replaced if r.path in calls]


def _layer(module: nn.Module, at: Replaced, args: Any, kwargs: Any) -> Layer:
    from vitkern.demo.measure import interleaved

    twin = copy.deepcopy(module)
    vitkern.patch(twin)
    with torch.no_grad():
        times = interleaved({"own": lambda: module(*args, **kwargs), "vitkern": lambda: twin(*args, **kwargs)}, 0.2)
    exact = copy.deepcopy(module).double()
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    oracle = _values(exact, *wide)
    found = _values(module, args, kwargs), _values(twin, args, kwargs)
    errors = [[_error(g, o) for g, o in zip(each, oracle, strict=True)] for each in found]
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return Layer(
        at,
        (errors[0][0], errors[1][0]),
        (errors[0][1], errors[1][1]),
        (times["own"], times["vitkern"]),
        torch.finfo(dtype).eps,
    )


def _values(module: nn.Module, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs, and the gradients of parameters and inputs under fixed gradients of the outputs."""
    flat, spec = tree_flatten((args, kwargs))
    flat = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat]
    leaves = [t for t in flat if isinstance(t, Tensor) and t.requires_grad] + list(module.parameters())
    args, kwargs = torch.utils._pytree.tree_unflatten(flat, spec)
    with torch.enable_grad():
        found = [t for t in tree_flatten(module(*args, **kwargs))[0] if isinstance(t, Tensor) and t.is_floating_point()]
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(t.shape, generator=generator).to(t) for t in found if t.requires_grad]
        grads = torch.autograd.grad([t for t in found if t.requires_grad], leaves, upstream, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [t.detach() for t in found], zeros


def _error(found: list[Tensor], oracle: list[Tensor]) -> float:
    """The largest error of a list of tensors, each relative to its largest value, or to a thousandth of that of all: the gradient
    of a key's bias is 0 in exact numbers."""
    pairs = [(g.double(), o) for g, o in zip(found, oracle, strict=True) if o.numel()]
    largest = [o.abs().max().item() for _, o in pairs]
    least = max([1e-300, *(1e-3 * x for x in largest)])
    return max(
        ((g - o).abs().max().item() / max(x, least) for (g, o), x in zip(pairs, largest, strict=True)), default=0.0
    )


# the command ------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from vitkern.demo.measure import interleaved, logits

    parser = argparse.ArgumentParser(prog="vitkern check", description=__doc__)
    parser.add_argument("model", help="a local model directory, or an architecture of transformers or timm")
    parser.add_argument("--image", help="a picture; noise without it")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="pixels; the model's own without it")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = load(options.model).eval()
    x = pixels(model, options.image, options.size).to(dtype)
    model, console = model.to(dtype), Console(width=160)
    found = sorted(layers(model, x), key=lambda layer: -layer.excess)
    if not found:
        console.print(str(vitkern.patch(model, dry_run=True)))
        return 1
    shown = Table(title="errors against float64, of the model itself and of vitkern; those that differ most first")
    for head in ("module", "op", "output", "vitkern", "gradient", "vitkern", "ms", "vitkern"):
        shown.add_column(head, justify="left" if head in ("module", "op") else "right")
    for layer in found:
        cells = [f"{e:.1e}" for e in (*layer.output, *layer.gradient)] + [f"{t:.2f}" for t in layer.milliseconds]
        shown.add_row(layer.at.path, layer.at.op, *cells)
    console.print(shown)

    def patched() -> Tensor:
        with vitkern.patched(model):
            return logits(model, x)

    with torch.no_grad():
        want, got = logits(model, x).float(), patched().float()
        times = interleaved({"eager": lambda: logits(model, x), "vitkern": patched}, 1.0)
    difference = ((got - want).abs().max() / want.abs().max().clamp(min=1e-30)).item()
    console.print(
        f"{len(found)} modules replaced; the model's output differs by {difference:.1e} of its largest value; "
        f"{times['eager']:.1f} ms unpatched, {times['vitkern']:.1f} ms patched"
    )
    wrong = [layer for layer in found if not layer.excess <= 1]
    if wrong:
        console.print(f"{len(wrong)} modules are further from float64 than they may be, {wrong[0].at.path} most")
    return 1 if wrong else 0
