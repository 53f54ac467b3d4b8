"""Triton's interpreter in a third of its time: what it does again and again without effect is left out."""

import dataclasses
import functools
import inspect
import math

import numpy
import triton.language
from triton.language import core
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_numpy_dtype = functools.cache(interpreter._get_np_dtype)


@functools.cache
def _languages(function) -> list:
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return [value for value in seen if value in (triton.language, core)]


def _patch_once(function):
    """What the interpreter does ahead of a call; nothing where every language module in sight is replaced already."""
    languages = _languages(function)
    if languages and not any(core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch_lang(function)


@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[core.tuple, core.constexpr]:
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))


def _init_tensor(self, handle, type):
    """As Triton's own; tensors of one shape share it."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(tuple(type.shape.values) if type.is_block() else ())


@functools.cache
def _block(sizes: tuple[int, ...]) -> tuple[core.tuple, int, str]:
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    shape = core.tuple(sizes)
    return shape, core.validate_block_shape(shape), str(shape)


def _init_block_type(self, element_ty, shape):
    """As Triton's own; types of one shape share it."""
    self.element_ty = element_ty
    self.shape, self.numel, written = _block(tuple(core._unwrap_shape(shape)))
    self.name = f"<{written}, {element_ty}>"


def _quick_numpy_dtype(type):
    """As Triton's own, which makes its table anew at every call."""
    return numpy.dtype(numpy.uint64) if isinstance(type.scalar, core.pointer_type) else _numpy_dtype(type.scalar)


def be_quick() -> None:
    """For the rest of this process."""
    # Once per launch, not at every inner call.
    interpreter._patch_lang = _patch_once
    core.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block_type
    interpreter._get_np_dtype = _quick_numpy_dtype
    options = interpreter.interpreter_builder.options
    # Every sum and product of integers is done again in int64 for an assertion that only ``debug`` makes.
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
