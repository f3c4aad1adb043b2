"""The interpreter at two thirds of its cost: for every call of a device function it patches the language anew, which the
launch around it has done, and for every value it makes a table of dtypes."""

import functools

import triton.language as tl
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
