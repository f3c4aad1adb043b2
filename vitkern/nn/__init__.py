"""Modules over vitkern's ops, with the parameter names of the systems they serve."""

from vitkern.nn.window_attention import WindowAttention, WindowAttentionV2

__all__ = ["WindowAttention", "WindowAttentionV2"]
