"""The libraries whose models tests patch, made importable.

PyPI's torchvision is built for CUDA: on a CPU-only torch it imports only after the schemas of its C++ ops are defined by
hand, and a torchvision that does not import breaks timm and transformers too. Import this module before them.
"""

import importlib.util

import torch

_OPS = ("nms", "qnms", "roi_align", "qroi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_BACKWARDS = ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")
_kept = []  # a Library takes its definitions along when it is collected


def prepare() -> None:
    """Defines the schemas that torchvision looks for, once, if torch has no CUDA and torchvision is there."""
    if _kept or torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    library = torch.library.Library("torchvision", "DEF")
    for name in (*_OPS, *(f"_{op}_backward" for op in _BACKWARDS)):
        library.define(f"{name}(Tensor input) -> Tensor")  # no model here calls them: the name is enough
    _kept.append(library)


prepare()
