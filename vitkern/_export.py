"""How small frozen dataclasses of tensors and ints are made: options that carry tensors, and what ops return."""

from typing import TypeVar

import torch

T = TypeVar("T")


def exportable(made: type[T]) -> type[T]:
    """Registers a dataclass, so that programs that take or return it can be exported."""
    torch.export.register_dataclass(made, serialized_type_name=f"vitkern.{made.__name__}")
    return made
