"""torch.compile for the transformer: whole blocks, or only the element-wise operations between matrix products.

Either way one compilation serves all layers and any number of tokens: the token axis is marked as dynamic, so neither
clip lengths nor packing cause recompilation. Whole blocks need tokens in one list of a fixed layout
(``FilledPacking``). Compiled element-wise functions replace attributes of the modules (``norm_and_rotate``, ``gate``,
``modulated_norm``, ``add_gated``), whose uncompiled forms are in blocks.py and dit.py.

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
from sa3dist.model.blocks import GatedProjection, RMSNorm, SelfAttention, norm_and_rotate, rotate, silu_gate, sine_gate
from sa3dist.model.compile_choice import compiles_on_cuda
from sa3dist.model.dit import Block, DiT, Shared, add_gated, modulated_norm
from sa3dist.model.kernel_trial import agrees
from sa3dist.model.lean_programs import lean
from sa3dist.model.token_layout import Packed, Padded

# Whether our own kernel sums the modulations' gradients, on GPUs where it works.
TOKEN_SUMS_KERNEL = True
# Whether the backward pass recomputes the norms' outputs from their inputs. Per token and block this saves five times
# the model width of memory, and moves seven times the width more.
RECOMPUTE_NORMS = True
# Inductor options for whole blocks.
INDUCTOR_OPTIONS: dict[str, Any] = {
    # Whether this joins reductions over rows and columns depends on the number of tokens: long clips would need another
    # program.
    "triton.mix_order_reduction": False,
    # Arguments' sizes and strides are guarded already. These 165 assertions check only intermediate results, including
    # those of opaque operations, and take a tenth of the host's time.
    "size_asserts": False,
}
# Inductor options if the same command must give the same bits, whatever the environment sets: nothing is chosen by
# measuring, and each kernel has one variant. "deterministic" alone leaves pointwise kernels several.
DETERMINISTIC_OPTIONS: dict[str, Any] = {
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


def _norm_and_rotate(x_GNPHD, gamma, eps: float, cos_ND, sin_ND, half: int, dtype: torch.dtype):
    return rotate(F.rms_norm(x_GNPHD, gamma.shape, gamma.to(x_GNPHD.dtype), eps), cos_ND, sin_ND, half).to(dtype)


class CompiledElementwise:
    """The compiled element-wise functions, with the signatures of those they replace."""

    def __init__(self, backend: str, tokens: int | None) -> None:
        """tokens: see ``compile_blocks``."""
        self._tokens = tokens
        functions = (_modulated_norm, _add_gated, _norm_and_rotate, silu_gate)
        options = DETERMINISTIC_OPTIONS if tokens and backend == "inductor" else None
        # False if deterministic: another number of clips must not generalise and replace an earlier program.
        dynamic = False if tokens else None
        self._modulated_norm, self._add_gated, self._norm_and_rotate, self._silu_gate = (
            torch.compile(function, backend=backend, options=options, dynamic=dynamic) for function in functions
        )

    def modulated_norm(self, norm: nn.Module, h_GNE, scale_BE, shift_BE, layout: Padded | Packed) -> Tensor:
        if not (isinstance(norm, RMSNorm) and norm.force_fp32):
            return modulated_norm(norm, h_GNE, scale_BE, shift_BE, layout)
        tokens = mark_dynamic(h_GNE, 1, self._tokens)
        return self._modulated_norm(tokens, norm.gamma, norm.eps, scale_BE, shift_BE, *self._owners(layout))

    def add_gated(self, h_GNE, gate_BE, branch_GNE, layout: Padded | Packed) -> Tensor:
        if isinstance(layout, Padded) and layout.valid_BN is not None:
            return add_gated(h_GNE, gate_BE, branch_GNE, layout)
        tokens = mark_dynamic(h_GNE, 1, self._tokens), gate_BE, mark_dynamic(branch_GNE, 1, self._tokens)
        return self._add_gated(*tokens, *self._owners(layout))

    def norm_and_rotate(
        self, norm: nn.Module, x_GNPHD, rotary: tuple[Tensor, Tensor, int], dtype: torch.dtype
    ) -> Tensor:
        if not isinstance(norm, RMSNorm):
            return norm_and_rotate(norm, x_GNPHD, rotary, dtype)
        cos_ND, sin_ND, half = rotary
        tables = mark_dynamic(cos_ND, 0, self._tokens), mark_dynamic(sin_ND, 0, self._tokens)
        return self._norm_and_rotate(mark_dynamic(x_GNPHD, 1, self._tokens), norm.gamma, norm.eps, *tables, half, dtype)

    def silu_gate(self, x_GNE) -> Tensor:
        return self._silu_gate(mark_dynamic(x_GNE, 1, self._tokens))

    def _owners(self, layout: Padded | Packed) -> tuple[Tensor, ...]:
        if isinstance(layout, Padded):
            return ()
        return mark_dynamic(layout.clip_K, 0, self._tokens), mark_dynamic(layout.owner_BK, 1, self._tokens)


def mark_dynamic(x: Tensor, axis: int, hint: int | None) -> Tensor:
    """``x``, with this axis marked as dynamic for the compiler.

    hint   the length that tiles are chosen for, part of the key in the compiler's cache; None: the first that occurs
    """
    if hint is None or x.shape[axis] == 1:
        torch._dynamo.maybe_mark_dynamic(x, axis)
    else:
        torch._dynamo.mark_dynamic(x, axis, hint_override=hint)
    return x


@functools.cache
def compiled_elementwise(backend: str, tokens: int | None) -> CompiledElementwise:
    """One set of compiled functions per process, backend and ``tokens``, for any number of models."""
    return CompiledElementwise(backend, tokens)


def compile_elementwise(dit: DiT, backend: str | None = "inductor", tokens: int | None = None) -> None:
    """Let all blocks of ``dit`` call the compiled functions; backend None restores the uncompiled ones.

    tokens   see ``compile_blocks``
    """
    compiled = None if backend is None else compiled_elementwise(backend, tokens)
    for module in dit.modules():
        if isinstance(module, Block):
            module.modulated_norm = compiled.modulated_norm if compiled else modulated_norm
            module.add_gated = compiled.add_gated if compiled else add_gated
        elif isinstance(module, SelfAttention):
            module.norm_and_rotate = compiled.norm_and_rotate if compiled else norm_and_rotate
        elif isinstance(module, GatedProjection) and module.gate is not sine_gate:
            module.gate = compiled.silu_gate if compiled else silu_gate


def compile_blocks(dit: DiT, backend, whole: bool = True, tokens: int | None = None) -> None:
    """Compile whole blocks of ``dit``: one program for all blocks and any number of tokens.

    backend   of torch.compile; None runs blocks uncompiled
    whole     raise if a block cannot be compiled as one graph; otherwise the rest of it runs uncompiled
    tokens    for deterministic runs: the tokens of the largest micro batch. Programs are then compiled for that size,
              whichever size occurs first, and nothing is chosen by measuring. None otherwise
    """
    dit.transformer.run_block = Block.forward
    if backend is None:
        return
    # There is one program per number of clips, with and without given context, with and without gradients. A filling
    # only changes the length of ``start_S``, which only attention reads, an opaque operation.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    options = None
    if backend == "inductor":
        options = INDUCTOR_OPTIONS | (DETERMINISTIC_OPTIONS if tokens else {}) | _joined_sums(_token_sums_of(dit))
    # Lets later processes reuse the traced program although adapted layers are autograd functions: their backward
    # passes are traced too, and so are part of the cache key.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch._functorch.config.ban_recompute_materialized_backward = not RECOMPUTE_NORMS
    compiled = torch.compile(Block.forward, backend=lean(backend), fullgraph=whole, dynamic=False, options=options)

    def run_block(block: Block, h_GNE: Tensor, modulation: tuple[Tensor, ...], shared: Shared) -> Tensor:
        mark_dynamic(h_GNE, 1, tokens)
        if block is first:
            _mark_lengths(shared, tokens)
        return compiled(block, h_GNE, modulation, shared)

    first = dit.transformer.layers[0]
    dit.transformer.run_block = run_block


def _mark_lengths(shared: Shared, tokens: int | None) -> None:
    """Mark the token axes of tensors that all blocks of a pass read."""
    layout, (cos_ND, sin_ND, _) = shared.layout, shared.rotary
    mark_dynamic(layout.owner_BK, 1, tokens)
    for table in (cos_ND, sin_ND, layout.clip_K, layout.is_frame_K1, layout.is_clips_K):
        mark_dynamic(table, 0, tokens)
    mark_dynamic(layout.start_S, 0, None if tokens is None else layout.clips + 2)
    if shared.local_GTC is not None and shared.local_GTC.shape[1] > 1:
        mark_dynamic(shared.local_GTC, 1, tokens)


@functools.cache
def _joined_sums(token_sums: str | None) -> dict[str, Any]:
    """The compiler option that joins the raw sums of a block's layers, and the sums of its modulations' gradients.

    Cached, because options are part of a program's key: a new object would recompile for each model.
    """
    # Imported here: it imports the compiler.
    from sa3dist_kernels.joined_sums import JoinedSums

    return {"post_grad_custom_pre_pass": JoinedSums(token_sums)}


def _token_sums_of(dit: DiT) -> str | None:
    """``token_sums`` of ``JoinedSums``: "triton" if our kernel sums the modulations' gradients."""
    device = dit.transformer.layers[0].to_scale_shift_gate.device
    return "triton" if TOKEN_SUMS_KERNEL and device.type == "cuda" and _token_sums_work(device, dit.dtype) else None


@functools.cache
def _token_sums_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on ``device`` and agrees with torch; if not, the reason is logged."""
    draw = torch.Generator().manual_seed(0)
    left, right, factor = (
        torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1, 77, 96), (1, 77, 96), 96)
    )
    # The sums of a gate and of a norm, in one launch as in a block.
    rows = torch.rand(1, 77, 1, generator=draw).to(device)
    sums = TokenSum(left, right, bias_E=factor), TokenSum(right, left, rows, factor)
    return agrees(
        "gradients of modulations",
        lambda: token_sums(sums, impl="triton"),
        lambda: [part for each in sums for part in token_sums_reference(each)],
    )


@contextlib.contextmanager
def uncompiled(dit: DiT) -> Iterator[None]:
    """A context in which ``dit`` runs uncompiled: for inputs that no program was compiled for."""
    names = "run_block", "modulated_norm", "add_gated", "norm_and_rotate", "gate"
    saved = [(vars(module), {name: vars(module).get(name) for name in names}) for module in dit.modules()]
    try:
        compile_elementwise(dit, None)
        compile_blocks(dit, None)
        yield
    finally:
        for attributes, values in saved:
            for name, value in values.items():
                # Delete attributes that were the class's: guards check for that.
                attributes.pop(name, None)
                attributes |= {} if value is None else {name: value}


def wants_compile(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to compile; ``auto`` does on CUDA if the run is long enough.

    Raises ConfigError for ``on`` on a CPU without a C++ compiler.
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
    """From now on, run what cannot be compiled uncompiled, in this process; the compiler logs why."""
    torch._dynamo.config.suppress_errors = True
    # Compile backward passes with their forward passes: once a forward pass has run it is too late to fall back.
    torch._functorch.config.force_non_lazy_backward_lowering = True


def start_compile_workers() -> None:
    """Start the compiler's worker processes, which take seconds to start."""
    from torch._inductor.async_compile import maybe_warm_pool

    maybe_warm_pool()


def keep_compiled_in(directory: Path) -> None:
    """Keep compiled kernels in ``directory`` for later runs, unless the environment names another cache."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory))
