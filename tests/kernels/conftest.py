"""Kernels in Triton's interpreter."""

from importlib.util import find_spec

if find_spec("triton"):
    from sa3dist_kernels import triton_support

    if triton_support.interpreting():
        from tests.helpers import interpreter

        interpreter.be_quick()
