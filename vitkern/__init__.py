"""vitkern: fused attention kernels for vision transformers."""

from vitkern import bias, nn
from vitkern.backends import explain, load, use_backend
from vitkern.cosine import CosineScore
from vitkern.ops._library import info
from vitkern.ops.bipartite_match import bipartite_match
from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked
from vitkern.patch import PatchReport, patch, patched
from vitkern.stats import Stats
from vitkern.tokens import Match

__version__ = "0.1.0"
__all__ = [
    "CosineScore",
    "Match",
    "PatchReport",
    "Stats",
    "bias",
    "bipartite_match",
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
