"""The adapted weights W' of all layers of a model: FORM computes them once per optimiser step, FINISH makes gradients.

    formed = FormedWeights(specs, torch.bfloat16)
    formed.form()        # W', L' and R' of every layer, from the trained tensors (``form``)
    ...                  # micro batches: products with W'; raw sums accumulate in ``grads``
    formed.finish()      # turns the raw sums into gradients, in place (``finish``)

Legend: O fan_out, I fan_in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sa3dist_kernels.formed_reference import finish_reference, form_reference
from sa3dist_kernels.formed_spec import FormedLayer, FormedSpec, formed_layer, product_elements
from sa3dist_kernels.frozen_products import no_autocast

if TYPE_CHECKING:
    from sa3dist_kernels.formed_blocks import Tiles


class FormedWeights:
    """W', L' and R' of layers that share one adapter type and rank.

    specs     the layers
    product   dtype of W', L' and R', and so of the products with them
    impl      "triton", "torch" (one layer at a time), or "auto": triton on CUDA, else torch
    tiles     block sizes of the Triton kernels; None chooses them by rank, dtype and number of rows
    memory    flat buffer that receives W', L' and R' from its start; None allocates one. Instances may share a buffer
              if only one of them is in use at a time: ``finish`` does not read it
    layers    attribute: a ``FormedLayer`` per spec, in the same order; undefined before the first ``form``

    Raises ValueError if the specs differ in type or rank, and for impl="triton" where no kernel can run.
    """

    def __init__(
        self,
        specs: Sequence[FormedSpec],
        product: torch.dtype,
        impl: str = "auto",
        tiles: Tiles | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        self.specs = list(specs)
        for spec in self.specs:
            spec.check()
            if (spec.kind, spec.rank) != (self.specs[0].kind, self.specs[0].rank):
                first = self.specs[0]
                raise ValueError(
                    f"{spec.kind.name} rank {spec.rank} among {first.kind.name} layers of rank {first.rank}: expected"
                    " one type and rank"
                )
        if impl not in ("auto", "triton", "torch"):
            raise ValueError(f"impl={impl!r}, expected one of auto, triton, torch")
        if impl == "auto":
            impl = "triton" if self.specs[0].weight_OI.is_cuda and product != torch.float64 else "torch"
        if memory is None:
            memory = torch.empty(product_elements(self.specs), dtype=product, device=self.specs[0].weight_OI.device)
        if impl == "triton":
            # Imported here: loading the kernels takes a quarter of a second.
            from sa3dist_kernels.formed_launch import TritonForms

            self.forms = TritonForms(self.specs, memory, tiles)
        else:
            self.forms = TorchForms(self.specs, memory)
        self.layers: list[FormedLayer] = self.forms.layers

    @torch.no_grad()
    def form(self) -> None:
        """Compute W', L', R', gains and norms from the current trained tensors."""
        self.forms.form()

    @torch.no_grad()
    def finish(self) -> None:
        """Turn the raw sums in ``grads`` into gradients, in place. Trained tensors must be unchanged since ``form``."""
        self.forms.finish()


def share_statistics(parts: Sequence[FormedWeights]) -> None:
    """Let all ``parts`` keep their statistics, which ``finish`` reads, in one shared buffer.

    From then on each part must be finished before another one is formed.
    """
    longest = max(sum(group.floats.numel() for group in part.forms.groups) for part in parts)
    memory = torch.empty(longest, device=parts[0].specs[0].weight_OI.device)
    for part in parts:
        begin = 0
        for group in part.forms.groups:
            group.keep_statistics_in(memory[begin:])
            begin += group.floats.numel()


class TorchForms:
    """FORM and FINISH in plain torch, one layer at a time."""

    # Keeps no statistics between FORM and FINISH, so ``share_statistics`` has nothing to share.
    groups = ()

    def __init__(self, specs: list[FormedSpec], memory: torch.Tensor) -> None:
        self.specs, self.layers, begin = specs, [], 0
        for spec in specs:
            layer, begin = formed_layer(spec, memory, begin)
            self.layers.append(layer)

    def form(self) -> None:
        for spec, layer in zip(self.specs, self.layers, strict=True):
            # With weights formed per use this may run inside an autocast forward pass.
            with no_autocast(spec.weight_OI.device):
                formed = form_reference(spec.weight_OI, spec.params, spec.kind, spec.scale, spec.bases)
            layer.weight_OI.copy_(formed.weight_OI())
            layer.left_OR.copy_(formed.row_gain_O[:, None] * formed.left_OR)
            right = spec.bases[1].t() if spec.kind.xs else formed.right_RI
            layer.right_RI.copy_(right * formed.col_gain_I)

    def finish(self) -> None:
        # Recompute V: keeping it would take as much memory as the frozen weights.
        for spec in self.specs:
            formed = form_reference(spec.weight_OI, spec.params, spec.kind, spec.scale, spec.bases)
            finish_reference(formed, spec.grads, spec.kind, spec.scale, spec.bases)
