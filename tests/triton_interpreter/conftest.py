"""The interpreter at a third of its cost: it patches the language anew for every call of a device function, which the launch
around it has done, looks for overflows that it then reports to nobody, and makes the type and the shape of every value anew."""

import functools

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch, _dtype = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)


@functools.cache
def _languages(fn):
    return [x for x in fn.__globals__.values() if x is tl or x is tl.core]


def _patch_once(fn):
    patched = not any(tl.core.is_builtin(language.arange) for language in _languages(fn))
    return interpreter._LangPatchScope() if patched else _patch(fn)


def _dtype_once(kind):
    element = kind.element_ty if isinstance(kind, tl.block_type) else kind
    return _dtype(tl.uint64 if isinstance(element, tl.pointer_type) else element)


interpreter._patch_lang, interpreter._get_np_dtype = _patch_once, _dtype_once
assert not interpreter.interpreter_builder.options.debug, "an overflow would be an error, and has to be looked for"
TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, op: None


# types and shapes -----------------------------------------------------------------------------------------------------

_make_block, _unwrap, _equal = core.block_type.__init__, core._unwrap_if_constexpr, core.dtype.__eq__
_broadcast, _blocks = TritonSemantic.broadcast_impl_value, {}


@functools.cache
def _shape(*sides):
    """What a tensor keeps of its shape: the product and the sides, the same objects for every tensor of the shape."""
    numel = 1
    for side in sides:
        numel *= side
    return core.constexpr(numel), core.tuple([core.constexpr(side) for side in sides])


def _block_once(self, element_ty, shape):
    key = element_ty.name, *[_unwrap_once(side) for side in shape]
    if key not in _blocks:
        _make_block(self, element_ty, shape)
        _blocks[key] = vars(self) | {"of_tensors": _shape(*self.shape)}
    vars(self).update(_blocks[key])


def _tensor_once(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = type.of_tensors if isinstance(type, core.block_type) else _shape()


def _unwrap_once(x):
    if isinstance(x, core.constexpr):
        return x.value
    return _unwrap(x) if isinstance(x, (list, tuple, core.tuple)) else x


def _broadcast_once(self, lhs, rhs):
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(self, lhs, rhs)


core.block_type.__init__, core.tensor.__init__, core._unwrap_if_constexpr = _block_once, _tensor_once, _unwrap_once
core.dtype.__eq__ = lambda self, other: self is other or _equal(self, other)
TritonSemantic.broadcast_impl_value = _broadcast_once


# products --------------------------------------------------------------------------------------------------------------


def _dot_in_order(self, a, b, d, *precision):
    """Products channel after channel in every tile, as on a GPU: BLAS has another order in tiles of another shape, and a row of
    one weight has no gradient only because every kernel finds the same dP."""
    sums, a, b = d.data.copy(), a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
    for channel in range(a.shape[-1]):
        sums += a[..., channel, None] * b[..., channel, None, :]
    return interpreter.TensorHandle(sums, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot_in_order
