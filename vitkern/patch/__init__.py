"""Replaces the attention of a model you already have: ``vitkern.patch(model)``.

Only instances are changed, never classes: a served module gets a ``forward`` of its own. Parameters, buffers, state dict
and module names stay. Each library has one file with a table from class to server; a server looks at one module and
returns the new forward, or a sentence why it keeps the old one.
"""

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

LIBRARIES = ("transformers", "timm", "torchvision", "monai", "diffusers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Server = Callable[[nn.Module], "Callable[..., Any] | str"]


@dataclass(frozen=True)
class Replaced:
    """A module that now runs on a vitkern op."""

    path: str
    kind: str
    op: str


@dataclass(frozen=True)
class Kept:
    """A module that keeps its own forward, and why."""

    path: str
    kind: str
    reason: str


@dataclass
class PatchReport:
    """What :func:`patch` did, module by module."""

    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    dry: bool = False
    _modules: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every replaced module its own forward back."""
        for module in self._modules:
            module.__dict__.pop("forward", None)
        self._modules.clear()

    def __str__(self) -> str:
        done = "to be replaced" if self.dry else "replaced"
        lines = [f"vitkern: {len(self.replaced)} modules {done}, {len(self.kept)} kept"]
        lines += [f"  {done} {r.path} ({r.kind}) by {r.op}" for r in self.replaced]
        lines += [f"  kept     {k.path} ({k.kind}): {k.reason}" for k in self.kept]
        return "\n".join(lines)


def patch(
    model: nn.Module,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] = (),
    dry_run: bool = False,
) -> PatchReport:
    """Lets every attention module of ``model`` that vitkern serves run on its op, in place.

    Served on ``window_attention``: Swin, SwinV2, Swin2SR, MaskFormer-Swin, Donut-Swin and Hiera of transformers; swin,
    swinv2, swinv2_cr, tiny_vit, efficientvit_msra, maxxvit, gcvit, hiera, davit and twins of timm; swin, swin_v2, swin3d and
    maxvit of torchvision; SwinUNETR of MONAI. On ``attention``: SAM, SAM-HQ, SAM 2, GOT-OCR2, ViTDet, BEiT, Data2Vec-vision, LeViT,
    Mask2Former, MaskFormer, EoMT, DETR, ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and the vision towers of Qwen2-VL, Qwen2.5-VL
    and Qwen3-VL of transformers; beit, cait, levit, mvitv2 and vision_transformer_sam of timm. On ``linear_attention``:
    efficientvit_mit of timm; the transformer and the autoencoder of SANA of diffusers. On ``channel_attention``: xcit,
    edgenext and davit of timm. On ``soft_merge``: mobilevitv2 of timm. On ``deformable_attention``: Deformable DETR,
    Grounding DINO, MM Grounding DINO, OmDet-Turbo, LW-DETR, RF-DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, PP-DocLayout v2 to
    v4 and the pixel decoders of Mask2Former and OneFormer of transformers. On ``neighborhood_attention``: DiNAT of
    transformers (:mod:`vitkern.patch.natten` where NATTEN is not installed). Outputs and gradients are those of the model up
    to rounding; where attention weights are asked for, the module's own forward runs. A
    model that is patched twice is left as it is the second time; a module that
    another tool has given a forward, or hooks that the op would pass by, is kept. ``torch.save(model)`` saves the model
    unpatched.

    Args:
        model: any module; what it holds is served by its class.
        only: a path of a module (``"encoder.layers.2"``), a pattern (``"blocks.[0-5]"``, ``"*.attn"``), or several: no module
            is served but these and what lies in them.
        skip: likewise, what is not served.
        dry_run: report what would be done, and leave the model as it is.

    Returns:
        A :class:`PatchReport`; ``report.undo()`` restores the model.

    Raises:
        ValueError: ``only`` or ``skip`` names no module of the model.
    """
    report = PatchReport(dry=dry_run)
    paths = [path for path, _ in model.named_modules()]
    wanted = None if only is None else _patterns("only", only, paths)
    spared = _patterns("skip", skip, paths)
    covered: list[str] = []
    for path, module in model.named_modules():
        kind = _kind(module)
        if any(path.startswith(prefix) for prefix in covered):
            continue
        server, op = _find(kind)
        left_out = _left_out(path, wanted, spared)
        if left_out:
            if server is not None:
                report.kept.append(Kept(path, kind, left_out))
            continue
        if server is None:
            if "attention" in type(module).__qualname__.lower() and not _holds_served(module):
                report.kept.append(Kept(path, kind, _why_not(module)))
                covered.append(f"{path}.")
            continue
        forward = _foreign(module) or server(module)
        covered.append(f"{path}." if path else "")
        if isinstance(forward, str):
            report.kept.append(Kept(path, kind, forward))
            continue
        if not dry_run:
            report._modules.append(module)
            module.__dict__["forward"] = _Forward(module, forward, checkpoints=True)
        report.replaced.append(Replaced(path, kind, op))
    return report


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[PatchReport]:
    """:func:`patch`, with its options, for the length of a ``with`` block."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        report.undo()


def _patterns(name: str, given: str | Sequence[str], paths: list[str]) -> tuple[str, ...]:
    found = (given,) if isinstance(given, str) else tuple(given)
    for pattern in found:
        if not any(fnmatchcase(path, pattern) for path in paths):
            some = ", ".join(path for path in paths if path.count(".") < 2 and path)
            raise ValueError(f"patch: {name}={pattern!r} names no module; among those of the model are {some[:300]}")
    return found


def _left_out(path: str, wanted: tuple[str, ...] | None, spared: tuple[str, ...]) -> str | None:
    """Why a module is not to be served: by its path, or that of a module around it."""
    parts = path.split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for pattern in spared:
        if any(fnmatchcase(p, pattern) for p in around):
            return f"skip={pattern!r} leaves it out"
    if wanted is None or any(fnmatchcase(p, pattern) for p in around for pattern in wanted):
        return None
    return "only= names other modules"


class _Forward:
    """The replacement forward of one module: marks it, goes along into copies, and is left out when the module is saved.
    It is no bound method: torch.compile asks a method for the file of its function. ``checkpoints``: whether it may run
    twice where the module's own forward would checkpoint itself."""

    def __init__(self, module: Any, function: Callable[..., Any], checkpoints: bool = False) -> None:
        self.module, self.function, self.checkpoints = module, function, checkpoints

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.checkpoints and _checkpoints_in_forward(self.module):
            return self.module._gradient_checkpointing_func(partial(self.function, self.module, **kwargs), *args)
        return self.function(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Forward":
        return _Forward(copy.deepcopy(self.module, memo), self.function, self.checkpoints)

    def __reduce__(self) -> Any:
        return getattr, (self.module, "forward")  # the class's own, when it is read back


def _checkpoints_in_forward(module: Any) -> bool:
    """Whether this is a layer of transformers whose own forward would checkpoint itself; older ones do so around it."""
    wanted = getattr(module, "gradient_checkpointing", False) and module.training
    return wanted and hasattr(module, "_gradient_checkpointing_func") and type(module).__call__ is nn.Module.__call__


def _foreign(module: nn.Module) -> str | None:
    """Why this module must keep its forward, whatever its class: somebody else already runs through it."""
    given = module.__dict__.get("forward")
    if isinstance(given, _Forward):
        return "patched already"
    if getattr(given, "__func__", given) not in (None, type(module).forward):
        return "another tool gave it a forward of its own"
    for name, part in module.named_modules():
        served = isinstance(part, nn.MultiheadAttention) or type(part).__module__ == type(module).__module__
        inside = name and served and "Attention" in type(part).__qualname__
        if inside and any(getattr(part, hooks) for hooks in _HOOKS):
            return f"{name} has hooks, which the op would pass by"
    return None


def _table(library: str) -> dict[str, tuple[Server, str]]:
    return importlib.import_module(f"vitkern.patch.{library}").TABLE


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _holds_served(module: nn.Module) -> bool:
    """Whether a part of this module is served: a wrapper around it is not what is kept."""
    return any(_find(_kind(part))[0] is not None for part in module.modules())


def _find(kind: str) -> tuple[Server | None, str]:
    library = kind.split(".", 1)[0]
    if library not in LIBRARIES:
        return None, ""
    return _table(library).get(kind, (None, ""))


def _why_not(module: nn.Module) -> str:
    for base in type(module).__mro__[1:]:
        kind = f"{base.__module__}.{base.__qualname__}"
        if _find(kind)[0] is not None:
            return f"a subclass of {kind}; only the class itself is served"
    return "no vitkern op serves this class"
