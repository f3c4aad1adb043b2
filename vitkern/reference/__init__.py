"""The definitions: plain PyTorch, any dtype, any device, twice differentiable."""

from vitkern.reference.window_attention import window_attention

__all__ = ["window_attention"]
