"""Layers for Hugging Face's `kernels` library: the modules that ``patch`` serves, and those of ``vitkern.nn``, in its contract.

    from kernels import Mode, kernelize, use_kernel_mapping
    from vitkern import layers

    layers.write_repository("vitkern-layers")
    with use_kernel_mapping(layers.mapping(model, "vitkern-layers")):
        model = kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")

A layer is a class with nothing but a forward that runs on the module it replaces: stateless, with gradients, and fit for
``torch.compile``. ``layers.XCA`` is that of ``vitkern.nn.XCA``; the layer of a library's class has the class's whole name,
``getattr(layers, "transformers.models.swin.modeling_swin.SwinLayer")``.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from torch import nn

import vitkern
from vitkern.patch import _find, _kind

DEVICES = ("cpu", "cuda")
_SERVED = "_vitkern_served"


def __getattr__(name: str) -> type[nn.Module]:
    module, _, short = name.rpartition(".")
    server = _find(name)[0] if module else None
    if server is not None:
        source = getattr(importlib.import_module(module), short)
        layer = _layer(short, _served_forward, inspect.signature(source.forward))
    elif not module and name in vitkern.nn.__all__ and name[0].isupper():
        source = getattr(vitkern.nn, name)
        layer = _layer(name, source.forward, inspect.signature(source.forward))
    else:
        raise AttributeError(f"vitkern.layers has no {name}: neither vitkern.nn nor patch serves a class of that name")
    globals()[name] = layer
    return layer


def _layer(name: str, forward: Any, signature: inspect.Signature) -> type[nn.Module]:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    run.__signature__ = signature  # type: ignore[attr-defined]
    members = {"forward": run, "can_torch_compile": True, "has_backward": True, "__module__": __name__}
    return type(name, (nn.Module,), members)


def _served_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module.__dict__[_SERVED](module, *args, **kwargs)


def _serves(module: nn.Module) -> bool:
    """Whether patch serves this one; `kernels` asks for every module before it gives it a layer."""
    found = _find(_kind(module))[0](module)  # type: ignore[misc]
    if isinstance(found, str):
        return False
    module.__dict__[_SERVED] = found
    return True


def mapping(model: nn.Module, repository: str | Path) -> dict[str, dict[str, Any]]:
    """The kernel mapping of every class in ``model`` that ``patch`` serves; marks these classes for ``kernelize``.

    ``repository`` is a folder that :func:`write_repository` has made. A module that ``patch`` would keep keeps its forward.
    """
    from kernels import LocalLayerRepository, replace_kernel_forward_from_hub

    kinds = {}
    for module in model.modules():
        if _find(_kind(module))[0] is not None:
            kinds[_kind(module)] = type(module)
    for kind, source in kinds.items():
        replace_kernel_forward_from_hub(source, kind, _serves)
    places = {kind: LocalLayerRepository(Path(repository), layer_name=kind) for kind in kinds}
    return {kind: dict.fromkeys(DEVICES, place) for kind, place in places.items()}


def write_repository(folder: str | Path) -> Path:
    """Writes a local repository of `kernels` whose layers are those of the vitkern that is installed; returns the folder."""
    for device in DEVICES:
        variant = Path(folder) / f"torch-{device}"
        variant.mkdir(parents=True, exist_ok=True)
        (variant / "__init__.py").write_text(
            '"""The layers of the installed vitkern."""\n\nfrom vitkern import layers\n'
        )
        metadata = {
            "id": f"vitkern_{device}",
            "name": "vitkern",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": device},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return Path(folder)
