"""vitkern: fused attention kernels for vision transformers."""

import gc as _gc

# What importing makes stays: a pass over all objects, which often falls due here, finds nothing and takes longer than the rest.
_collects = _gc.isenabled()
_gc.disable()
try:
    from vitkern import bias, decay, feature_map, mask, merging, modulation, nn
    from vitkern.backends import explain, load, use_backend
    from vitkern.cosine import CosineScore
    from vitkern.ops._library import info
    from vitkern.ops.attention import attention
    from vitkern.ops.attention_varlen import attention_varlen
    from vitkern.ops.bipartite_match import bipartite_match
    from vitkern.ops.channel_attention import channel_attention
    from vitkern.ops.cluster_tokens import cluster_tokens
    from vitkern.ops.deformable_attention import deformable_attention
    from vitkern.ops.drop_tokens import drop_tokens
    from vitkern.ops.linear_attention import linear_attention
    from vitkern.ops.merge_lse import merge_lse
    from vitkern.ops.merge_plan import merge_plan
    from vitkern.ops.merge_tokens import merge_tokens
    from vitkern.ops.neighborhood_attention import neighborhood_attention, neighborhood_av, neighborhood_qk
    from vitkern.ops.reconstruct_tokens import reconstruct_tokens
    from vitkern.ops.restore_tokens import restore_tokens
    from vitkern.ops.sampled_window_attention import sampled_window_attention
    from vitkern.ops.scaled_dot_product_attention import scaled_dot_product_attention
    from vitkern.ops.select_tokens import select_tokens
    from vitkern.ops.selective_scan import selective_scan
    from vitkern.ops.selective_scan_2d import selective_scan_2d
    from vitkern.ops.soft_merge import soft_merge
    from vitkern.ops.unmerge_tokens import unmerge_tokens
    from vitkern.ops.window_attention import window_attention, window_attention_qkvpacked
    from vitkern.ops.window_order import window_order
    from vitkern.patch import PatchReport, patch, patched
    from vitkern.rope import Rope
    from vitkern.stats import Stats
    from vitkern.tokens import Match, MergePlan
    from vitkern.value import DepthwiseValue
finally:
    if _collects:
        _gc.enable()

__version__ = "0.1.0"
__all__ = [
    "CosineScore",
    "DepthwiseValue",
    "Match",
    "MergePlan",
    "PatchReport",
    "Rope",
    "Stats",
    "attention",
    "attention_varlen",
    "bias",
    "bipartite_match",
    "channel_attention",
    "cluster_tokens",
    "decay",
    "deformable_attention",
    "drop_tokens",
    "explain",
    "feature_map",
    "info",
    "linear_attention",
    "mask",
    "merge_lse",
    "merge_plan",
    "merge_tokens",
    "merging",
    "modulation",
    "neighborhood_attention",
    "neighborhood_av",
    "neighborhood_qk",
    "nn",
    "patch",
    "patched",
    "reconstruct_tokens",
    "restore_tokens",
    "sampled_window_attention",
    "scaled_dot_product_attention",
    "select_tokens",
    "selective_scan",
    "selective_scan_2d",
    "soft_merge",
    "unmerge_tokens",
    "use_backend",
    "window_attention",
    "window_attention_qkvpacked",
    "window_order",
]

load("_cpu")
