"""torch.compile for the transformer: whole blocks, or only the element-wise operations between matrix products.

Either way there is one compilation for all layers and any number of tokens: the token axis is marked as dynamic, so
neither clip lengths nor packing recompile anything. Whole blocks need tokens in one list of a fixed layout
(``FilledPacking``). Element-wise functions take the place of attributes of the modules (``turn``, ``gate``,
``modulated_norm``, ``add_gated``), whose uncompiled forms stand in blocks.py and dit.py.

Legend: G padded clips or 1 packed list, N tokens, B clips, E width, P members of a pair, H heads, D head width.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sa3dist_kernels.token_sums import TokenSum, token_sums, token_sums_reference
from torch import Tensor, nn

from sa3dist.errors import ConfigError
from sa3dist.model.add_scaled import add_scaled
from sa3dist.model.blocks import GatedProjection, RMSNorm, SelfAttention, rotate, silu_gate, sine_gate, turn
from sa3dist.model.compile_choice import compiles_on_cuda
from sa3dist.model.dit import Block, DiT, Shared, add_gated, modulated_norm
from sa3dist.model.kernel_trial import agrees
from sa3dist.model.lean_programs import lean
from sa3dist.model.token_layout import Packed, Padded

# Whether the modulations' gradients are summed by our own kernel on a GPU where it works.
TOKEN_SUMS = True
# Whether what norms give is made again in the backward pass, from what entered them: five widths of the stream a block
# are not kept, for seven more that are moved.
NORMS_AGAIN = True
# Of Inductor, for whole blocks.
CHOICES: dict[str, Any] = {
    # Whether reductions over rows and over columns are joined would depend on the number of tokens: another program for
    # long clips.
    "triton.mix_order_reduction": False,
    # Sizes and strides have been looked at when a program is called; what it would look at again on its way is what it,
    # and the operations it does not look into, have made themselves. Those 165 looks take a tenth of a host's time.
    "size_asserts": False,
}
# Where the same command must give the same bits, whatever the environment asks for: no tiles, splits or padding are
# chosen by measuring, and of every kernel there is one variant. By itself the first leaves pointwise kernels several.
EXACT: dict[str, Any] = {
    "deterministic": True,
    "triton.autotune_pointwise": False,
    "max_autotune": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
}


def _scaled(base: Tensor, x: Tensor, factor_BE: Tensor, owners: Sequence[Tensor]) -> Tensor:
    return add_scaled(base, x, factor_BE, *owners) if owners else torch.addcmul(base, x, factor_BE[:, None])


def _modulated_norm(h_GNE, gamma, eps: float, scale_BE, shift_BE, *owners):
    normed = F.rms_norm(h_GNE.float(), gamma.shape, gamma.float(), eps).to(h_GNE.dtype)
    return _scaled(shift_BE if owners else shift_BE[:, None], normed, scale_BE, owners)


def _add_gated(h_GNE, gate_BE, branch_GNE, *owners):
    return _scaled(h_GNE, branch_GNE.to(h_GNE.dtype), gate_BE, owners)


def _turn(x_GNPHD, gamma, eps: float, cos_ND, sin_ND, half: int, dtype: torch.dtype):
    return rotate(F.rms_norm(x_GNPHD, gamma.shape, gamma.to(x_GNPHD.dtype), eps), cos_ND, sin_ND, half).to(dtype)


class CompiledElementwise:
    """The compiled functions behind the signatures that the modules call."""

    def __init__(self, backend: str, tokens: int | None) -> None:
        """tokens: see ``compile_blocks``."""
        self._tokens = tokens
        functions = (_modulated_norm, _add_gated, _turn, silu_gate)
        options = EXACT if tokens and backend == "inductor" else None
        # Exact: a number of clips that comes later has programs of its own, and takes no earlier one's place.
        dynamic = False if tokens else None
        self._modulated_norm, self._add_gated, self._turn, self._silu_gate = (
            torch.compile(function, backend=backend, options=options, dynamic=dynamic) for function in functions
        )

    def modulated_norm(self, norm: nn.Module, h_GNE, scale_BE, shift_BE, layout: Padded | Packed) -> Tensor:
        if not (isinstance(norm, RMSNorm) and norm.force_fp32):
            return modulated_norm(norm, h_GNE, scale_BE, shift_BE, layout)
        tokens = any_length(h_GNE, 1, self._tokens)
        return self._modulated_norm(tokens, norm.gamma, norm.eps, scale_BE, shift_BE, *self._owners(layout))

    def add_gated(self, h_GNE, gate_BE, branch_GNE, layout: Padded | Packed) -> Tensor:
        if isinstance(layout, Padded) and layout.valid_BN is not None:
            return add_gated(h_GNE, gate_BE, branch_GNE, layout)
        tokens = any_length(h_GNE, 1, self._tokens), gate_BE, any_length(branch_GNE, 1, self._tokens)
        return self._add_gated(*tokens, *self._owners(layout))

    def turn(self, norm: nn.Module, x_GNPHD, rotary: tuple[Tensor, Tensor, int], dtype: torch.dtype) -> Tensor:
        if not isinstance(norm, RMSNorm):
            return turn(norm, x_GNPHD, rotary, dtype)
        cos_ND, sin_ND, half = rotary
        tables = any_length(cos_ND, 0, self._tokens), any_length(sin_ND, 0, self._tokens)
        return self._turn(any_length(x_GNPHD, 1, self._tokens), norm.gamma, norm.eps, *tables, half, dtype)

    def silu_gate(self, x_GNE) -> Tensor:
        return self._silu_gate(any_length(x_GNE, 1, self._tokens))

    def _owners(self, layout: Padded | Packed) -> tuple[Tensor, ...]:
        if isinstance(layout, Padded):
            return ()
        return any_length(layout.clip_K, 0, self._tokens), any_length(layout.owner_BK, 1, self._tokens)


def any_length(x: Tensor, axis: int, taken_for: int | None) -> Tensor:
    """``x``, with a promise to the compiler's guards: this axis will have other lengths too.

    taken_for   the length that the compiler chooses by, part of what its cache finds a program by; None: the one that
                comes first
    """
    if taken_for is None or x.shape[axis] == 1:
        torch._dynamo.maybe_mark_dynamic(x, axis)
    else:
        torch._dynamo.mark_dynamic(x, axis, hint_override=taken_for)
    return x


@functools.cache
def compiled_elementwise(backend: str, tokens: int | None) -> CompiledElementwise:
    """One set of compiled functions per process and backend, whatever the number of models."""
    return CompiledElementwise(backend, tokens)


def compile_elementwise(dit: DiT, backend: str | None = "inductor", tokens: int | None = None) -> None:
    """Let every block of ``dit`` call the compiled functions, or with None its own again.

    tokens   see ``compile_blocks``
    """
    made = None if backend is None else compiled_elementwise(backend, tokens)
    for module in dit.modules():
        if isinstance(module, Block):
            module.modulated_norm = made.modulated_norm if made else modulated_norm
            module.add_gated = made.add_gated if made else add_gated
        elif isinstance(module, SelfAttention):
            module.turn = made.turn if made else turn
        elif isinstance(module, GatedProjection) and module.gate is not sine_gate:
            module.gate = made.silu_gate if made else silu_gate


def compile_blocks(dit: DiT, backend, whole: bool = True, tokens: int | None = None) -> None:
    """Run whole blocks of ``dit`` as one compiled program, the same for all of them and for any number of tokens.

    backend   of torch.compile; None: blocks run as they are
    whole     raise where a block cannot be compiled as one; otherwise that part of it runs uncompiled
    tokens    the most of a micro batch, where a program must give the same bits in every process: it is compiled for
              so many, whichever come first, and nothing in it is chosen by measuring
    """
    dit.transformer.run_block = Block.forward
    if backend is None:
        return
    # One program for each number of clips, with and without given context, for training and without gradients. Whether
    # there is a filling shows in the length of ``start_S`` alone, which only attention reads: an opaque operation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Not dynamic of its own accord: what has other sizes is marked.
    options = None
    if backend == "inductor":
        options = CHOICES | (EXACT if tokens else {}) | _joined_sums(_token_sums_of(dit))
    # What one process has traced the next need not. The backward passes of adapted layers are traced too, so they are
    # part of what a program is found by.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch._functorch.config.ban_recompute_materialized_backward = not NORMS_AGAIN
    compiled = torch.compile(Block.forward, backend=lean(backend), fullgraph=whole, dynamic=False, options=options)

    def run_block(block: Block, h_GNE: Tensor, modulation: tuple[Tensor, ...], shared: Shared) -> Tensor:
        any_length(h_GNE, 1, tokens)
        if block is first:
            _mark_lengths(shared, tokens)
        return compiled(block, h_GNE, modulation, shared)

    first = dit.transformer.layers[0]
    dit.transformer.run_block = run_block


def _mark_lengths(shared: Shared, tokens: int | None) -> None:
    """What all blocks of a pass read has other lengths too."""
    layout, (cos_ND, sin_ND, _) = shared.layout, shared.rotary
    any_length(layout.owner_BK, 1, tokens)
    for table in (cos_ND, sin_ND, layout.clip_K, layout.is_frame_K1, layout.is_clips_K):
        any_length(table, 0, tokens)
    any_length(layout.start_S, 0, None if tokens is None else layout.clips + 2)
    if shared.local_GTC is not None and shared.local_GTC.shape[1] > 1:
        any_length(shared.local_GTC, 1, tokens)


@functools.cache
def _joined_sums(token_sums: str | None) -> dict[str, Any]:
    """Option of the compiler that joins the raw sums of a block's layers, and the sums of its modulations' gradients.

    The same object each time: programs are found by their options, and without it every model would be compiled anew.
    """
    # Imports the compiler.
    from sa3dist_kernels.joined_sums import JoinedSums

    return {"post_grad_custom_pre_pass": JoinedSums(token_sums)}


def _token_sums_of(dit: DiT) -> str | None:
    """What sums the modulations' gradients: see ``JoinedSums``."""
    device = dit.transformer.layers[0].to_scale_shift_gate.device
    return "triton" if TOKEN_SUMS and device.type == "cuda" and _token_sums_work(device, dit.dtype) else None


@functools.cache
def _token_sums_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on ``device`` and agrees with torch; if not, the log says why."""
    draw = torch.Generator().manual_seed(0)
    left, right, factor = (
        torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1, 77, 96), (1, 77, 96), 96)
    )
    # A gate's and a norm's, in one launch as in a block.
    rows = torch.rand(1, 77, 1, generator=draw).to(device)
    sums = TokenSum(left, right, bias_E=factor), TokenSum(right, left, rows, factor)
    return agrees(
        "gradients of modulations",
        lambda: token_sums(sums, impl="triton"),
        lambda: [part for each in sums for part in token_sums_reference(each)],
    )


@contextlib.contextmanager
def uncompiled(dit: DiT) -> Iterator[None]:
    """While this is entered ``dit`` runs as it is written: for inputs that the compiled programs were not made for."""
    names = "run_block", "modulated_norm", "add_gated", "turn", "gate"
    before = [(vars(module), {name: vars(module).get(name) for name in names}) for module in dit.modules()]
    try:
        compile_elementwise(dit, None)
        compile_blocks(dit, None)
        yield
    finally:
        for attributes, held in before:
            for name, value in held.items():
                # Taken out where its class has it: what is compiled asks for that too.
                attributes.pop(name, None)
                attributes |= {} if value is None else {name: value}


def wants_compile(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to compile: as told, or with ``auto`` on CUDA where a run is long enough.

    Raises ConfigError when told to on a CPU without a C++ compiler.
    """
    if device.type == "cuda":
        return compiles_on_cuda(choice, steps)
    if choice == "on" and device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise ConfigError("compile: on needs a C++ compiler on a CPU; install g++, or use compile=off") from error
    return choice == "on"


def fall_back_on_failure() -> None:
    """Let what cannot be compiled run uncompiled from here on, in this process; the compiler logs why."""
    torch._dynamo.config.suppress_errors = True
    # Backward passes are compiled with their forward passes, then: once these have run there is no way back.
    torch._functorch.config.force_non_lazy_backward_lowering = True


def start_compile_workers() -> None:
    """Start the processes that compile a GPU's kernels side by side: they take seconds until they can."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def keep_compiled_in(directory: Path) -> None:
    """Where the compiler leaves its kernels for the next run, unless the environment says so already."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory))
