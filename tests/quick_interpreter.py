"""Triton's interpreter in a third of the time, with the same results.

It replaces hundreds of attributes of ``triton.language`` anew in every call of a device function,
and reduces element by element what a GPU reduces in pairs.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_np_dtype = functools.cache(interpreter._get_np_dtype)
_replaced = set()  # of tl and tl.core, while a kernel runs


class _Scope(interpreter._LangPatchScope):
    """What the outermost call replaced."""

    def __init__(self, scope):
        super().__init__()
        self._changes = scope._changes

    def restore(self):
        _replaced.clear()
        super().restore()


def _patch_once(fn):
    modules = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules <= _replaced:
        return interpreter._LangPatchScope()
    outermost, scope = not _replaced, _patch_lang(fn)
    _replaced.update(modules)
    return _Scope(scope) if outermost else scope


def _reduce_in_pairs(self, input):
    given, axis = self.unravel(input, self.axis)
    parts = [x.handle.data for x in given]
    while parts[0].shape[axis] > 1:  # a power of two, as of all blocks
        # Neighbours, so that the function need not commute.
        pairs = [
            self.to_tensor(part.take(range(start, part.shape[axis], 2), axis), x.dtype)
            for start in (0, 1)
            for part, x in zip(parts, given, strict=True)
        ]
        found = self.combine_fn.fn(*pairs)
        found = found if isinstance(found, tuple) else (found,)
        parts = [
            x.handle.data.reshape(pairs[0].handle.data.shape).astype(part.dtype)
            for x, part in zip(found, parts, strict=True)
        ]
    results = []
    for part, x in zip(parts, given, strict=True):
        if not self.keep_dims:
            data = part.item() if self.axis is None else part.take(0, axis)
        elif self.axis is None:
            data = part.reshape([1] * input[0].handle.data.ndim)
        else:
            data = part
        results.append(self.to_tensor(data, x.dtype))
    return results


def _np_dtype_of(dtype):
    scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _np_dtype(scalar)


def install():
    """For the rest of the process."""
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _np_dtype_of
    interpreter.ReduceOps.generic_reduce = _reduce_in_pairs
