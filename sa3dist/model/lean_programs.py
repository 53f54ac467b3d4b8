"""Compiled programs without most of what AOTAutograd does around them at every call.

It makes a forward and a backward program of a function, and wraps them for whatever a function may do: arguments are
told apart, lengths noted on every tensor that is kept, results sorted. A block has 70 tensors each way: that took the
host a sixth of what a whole step took it. A program with one result that changes none of its arguments needs
none of it. torch has no other way to them than its own class of such a function (``CompiledFunction``): what is not
found there as expected is called as torch does, and the log says so.
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
    """``backend`` of torch.compile, so that its programs are called like that; one object for each."""

    def lean_backend(graph: torch.fx.GraphModule, inputs: Sequence, options: dict[str, Any] | None = None) -> Callable:
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            return LeanProgram(compile_fx(graph, inputs, config_patches=options))
        return LeanProgram(torch._dynamo.lookup_backend(backend)(graph, inputs))

    return lean_backend


class LeanProgram:
    """Calls ``compiled``, what a backend has made of a graph, and from when its programs are known these themselves."""

    def __init__(self, compiled: Callable) -> None:
        self._compiled = compiled
        self._programs: Programs | None = None
        self._is_lean = True

    def __call__(self, *given) -> Sequence[Tensor]:
        if self._programs is not None:
            # What asks for a gradient is part of what Dynamo has chosen this graph by: the same at each call.
            return (_Lean.apply(self._programs, list(given), *[given[place] for place in self._programs.wanted]),)
        made = self._compiled(*given)
        # Without gradients there is one program, with little around it.
        if self._is_lean and made[0].grad_fn is not None:
            try:
                self._programs = Programs.of(made, given)
            except (AttributeError, NotImplementedError) as problem:
                self._is_lean = False
                log.info("compiled blocks cost the host more than they need: %s", problem)
        return made


class Programs:
    """The two programs of a graph.

    forward     takes its arguments as a list; gives the result, what is kept, and sizes
    backward    takes sizes, what was kept and the result's gradient; gives one of every argument. It writes to what was
                kept, and so runs once
    wanted      places of the arguments that ask for a gradient
    """

    def __init__(self, function, given: Sequence) -> None:
        about = function.metadata
        self.forward, self.backward = function.compiled_fw, function.compiled_bw
        self.kept, self.sizes = about.tensors_saved_for_backwards_slice, about.symints_saved_for_backwards_slice
        self.wanted = [place for place, value in enumerate(given) if isinstance(value, Tensor) and value.requires_grad]

    @staticmethod
    def of(made: Sequence[Tensor], given: Sequence) -> Programs | None:
        """None: the backward program is compiled when it is first needed.

        Raises NotImplementedError, or AttributeError, where what is around the programs has more to do than ``_Lean``.
        """
        function = type(made[0].grad_fn)._forward_cls
        about = function.metadata
        # Results that are arguments or views, arguments that are written to, random numbers, effects, subclasses.
        more = (
            about.num_forward_returns - 1, about.num_outputs_aliased, about.num_unsafe_view_outputs, about.tokens,
            about.num_backward_tokens, about.is_rng_op_functionalized, about.num_graphsafe_rng_states,
            about.num_opaque_objects_saved_for_bw, about.num_tensors_saved_with_no_vc_check,
            any(one.mutates_data or one.mutates_metadata for one in about.input_info),
            function.maybe_subclass_metadata, len(about.input_info) - len(given), not made[0].is_contiguous(),
        )  # fmt: skip
        if any(more):
            raise NotImplementedError(f"they do more than give one new tensor: {more}")
        return None if function.compiled_bw is None else Programs(function, given)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, programs: Programs, given: list, first: Tensor, *_):
        """given: emptied by the program; those of it that ask for a gradient once more."""
        with no_autocast(first.device):
            made = programs.forward(given)
        ctx.save_for_backward(*made[programs.kept])
        ctx.programs, ctx.sizes = programs, made[programs.sizes]
        return made[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        programs, ctx.programs = ctx.programs, None
        if programs is None:
            raise RuntimeError("a compiled block's backward pass runs once: it writes to what was kept for it")
        given = [*ctx.sizes, *ctx.saved_tensors, grad.contiguous()]
        # What is kept is let go of where the program has read it.
        ctx.maybe_clear_saved_tensors()
        del grad
        with no_autocast(given[-1].device):
            found = programs.backward(given)
        return None, None, *(found[place] for place in programs.wanted)
