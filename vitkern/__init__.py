"""vitkern: fused attention kernels for vision transformers."""

from vitkern import bias, nn
from vitkern.backends import explain, load, use_backend
from vitkern.cosine import CosineScore
from vitkern.ops._library import info
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked
from vitkern.patch import PatchReport, patch, patched
from vitkern.stats import Stats

__version__ = "0.1.0"
__all__ = [
    "CosineScore",
    "PatchReport",
    "Stats",
    "bias",
    "explain",
    "info",
    "nn",
    "patch",
    "patched",
    "use_backend",
    "window_attention",
    "window_attention_qkvpacked",
]

load("_cpu")
