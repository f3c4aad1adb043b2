"""`vitkern demo`: Swin models on real photographs, eager, compiled and patched; a table and an HTML report."""

from vitkern.demo.run import main

__all__ = ["main"]
