"""Calls compiled forward and backward programs without most of AOTAutograd's wrappers, to save host time.

The wrappers handle whatever a function may do: they classify arguments, record sizes of every saved tensor and sort
results. A block has 70 tensors each way, which took a sixth of the host's time for a step. A program with one result
that mutates no argument needs none of it. torch has no public way to the programs; they are taken from its
``CompiledFunction`` class. If that does not look as expected, programs are called torch's way, and the log says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sa3dist_kernels.frozen_products import no_autocast
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def lean(backend: str | Callable) -> Callable:
    """``backend`` of torch.compile, with its programs called through ``LeanProgram``; one object per backend."""

    def lean_backend(graph: torch.fx.GraphModule, inputs: Sequence, options: dict[str, Any] | None = None) -> Callable:
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return LeanProgram(compile_fx(graph, inputs, config_patches=options))
        return LeanProgram(torch._dynamo.lookup_backend(backend)(graph, inputs))

    return lean_backend


class LeanProgram:
    """Calls ``compiled``, a backend's result for a graph; once its programs are known, calls those directly."""

    def __init__(self, compiled: Callable) -> None:
        self._compiled = compiled
        self._programs: Programs | None = None
        self._is_lean = True

    def __call__(self, *arguments) -> Sequence[Tensor]:
        if self._programs is not None:
            # Dynamo guards on requires_grad, so ``differentiable`` is the same at each call.
            differentiable = [arguments[index] for index in self._programs.differentiable]
            return (_Lean.apply(self._programs, list(arguments), *differentiable),)
        results = self._compiled(*arguments)
        # Without gradients there is one program, with little around it.
        if self._is_lean and results[0].grad_fn is not None:
            try:
                self._programs = Programs.of(results, arguments)
            except (AttributeError, NotImplementedError) as problem:
                self._is_lean = False
                log.info("compiled blocks are called through torch's wrappers, at more host time: %s", problem)
        return results


class Programs:
    """The two programs of a graph.

    forward         takes its arguments as a list; returns the result, saved tensors and sizes
    backward        takes sizes, saved tensors and the result's gradient; returns a gradient per argument. It overwrites
                    saved tensors, so it runs only once
    saved, sizes    slices of the forward program's results
    differentiable  indices of the arguments that require a gradient
    """

    def __init__(self, function, arguments: Sequence) -> None:
        metadata = function.metadata
        self.forward, self.backward = function.compiled_fw, function.compiled_bw
        self.saved = metadata.tensors_saved_for_backwards_slice
        self.sizes = metadata.symints_saved_for_backwards_slice
        self.differentiable = [
            index for index, value in enumerate(arguments) if isinstance(value, Tensor) and value.requires_grad
        ]

    @staticmethod
    def of(results: Sequence[Tensor], arguments: Sequence) -> Programs | None:
        """The programs behind ``results``; None if the backward program will only be compiled when first needed.

        Raises NotImplementedError or AttributeError if the wrappers do something that ``_Lean`` does not.
        """
        function = type(results[0].grad_fn)._forward_cls
        metadata = function.metadata
        # Results that are arguments or views, mutated arguments, random numbers, effects, tensor subclasses.
        unsupported = (
            metadata.num_forward_returns - 1, metadata.num_outputs_aliased, metadata.num_unsafe_view_outputs,
            metadata.tokens, metadata.num_backward_tokens, metadata.is_rng_op_functionalized,
            metadata.num_graphsafe_rng_states, metadata.num_opaque_objects_saved_for_bw,
            metadata.num_tensors_saved_with_no_vc_check,
            any(info.mutates_data or info.mutates_metadata for info in metadata.input_info),
            function.maybe_subclass_metadata, len(metadata.input_info) - len(arguments),
            not results[0].is_contiguous(),
        )  # fmt: skip
        if any(unsupported):
            raise NotImplementedError(f"they do more than return one new tensor: {unsupported}")
        return None if function.compiled_bw is None else Programs(function, arguments)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, programs: Programs, arguments: list, first: Tensor, *_):
        """arguments: all of them, in a list that the program empties; then again those that require a gradient."""
        with no_autocast(first.device):
            results = programs.forward(arguments)
        ctx.save_for_backward(*results[programs.saved])
        ctx.programs, ctx.sizes = programs, results[programs.sizes]
        return results[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        programs, ctx.programs = ctx.programs, None
        if programs is None:
            raise RuntimeError("a compiled block's backward pass runs only once: it overwrites saved tensors")
        arguments = [*ctx.sizes, *ctx.saved_tensors, grad.contiguous()]
        # So that the program frees each saved tensor after its last use.
        ctx.maybe_clear_saved_tensors()
        del grad
        with no_autocast(arguments[-1].device):
            gradients = programs.backward(arguments)
        return None, None, *(gradients[index] for index in programs.differentiable)
