"""Formed weights: W' of every adapted layer once per optimiser step, and raw sums turned into gradients at its end.

    formed = FormedWeights(specs, torch.bfloat16)
    formed.form()        # from the trained tensors: W', L', R' of every layer (``form``)
    ...                  # micro batches: products with W', raw sums added into ``grads``
    formed.finish()      # raw sums to gradients, in place (``finish``)

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
    """W', L', R' of all ``specs``, one adapter type and rank, and what FINISH needs of them.

    product   format of the products and so of W', L' and R'
    impl      "triton", "torch" (plain tensors, one layer after the other), or "auto": triton on CUDA, else torch
    tiles     blocks of the Triton kernels; None: those that suit the rank, the format and the number of layers
    memory    flat, where W', L' and R' lie from its start on; several that are never read at a time may share it, for
              ``finish`` reads none of them. None: memory of its own
    layers    a ``FormedLayer`` per spec, in their order; undefined before the first ``form``

    Raises ValueError for specs that do not fit together, and for impl="triton" where no kernel can run.
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
            # Imported here: a machine without Triton runs the rest.
            from sa3dist_kernels.formed_launch import TritonForms

            self.forms = TritonForms(self.specs, memory, tiles)
        else:
            self.forms = TorchForms(self.specs, memory)
        self.layers: list[FormedLayer] = self.forms.layers

    @torch.no_grad()
    def form(self) -> None:
        """W', L', R', gains and norms from the trained tensors as they are now."""
        self.forms.form()

    @torch.no_grad()
    def finish(self) -> None:
        """Raw sums in ``grads`` to gradients, in place. The trained tensors must be those of the last ``form``."""
        self.forms.finish()


def share_statistics(parts: Sequence[FormedWeights]) -> None:
    """Have all ``parts`` keep in one memory what ``finish`` needs of ``form``.

    From here on each of them has to be finished before another is formed.
    """
    longest = max(sum(group.floats.numel() for group in part.forms.groups) for part in parts)
    memory = torch.empty(longest, device=parts[0].specs[0].weight_OI.device)
    for part in parts:
        begin = 0
        for group in part.forms.groups:
            group.keep_statistics_in(memory[begin:])
            begin += group.floats.numel()


class TorchForms:
    """Plain tensors, one layer after the other. There are no groups: nothing is kept between FORM and FINISH."""

    groups = ()

    def __init__(self, specs: list[FormedSpec], memory: torch.Tensor) -> None:
        self.specs, self.layers, begin = specs, [], 0
        for spec in specs:
            layer, begin = formed_layer(spec, memory, begin)
            self.layers.append(layer)

    def form(self) -> None:
        for spec, layer in zip(self.specs, self.layers, strict=True):
            # A forward pass that forms its weights may be autocast.
            with no_autocast(spec.weight_OI.device):
                formed = form_reference(spec.weight_OI, spec.params, spec.kind, spec.scale, spec.bases)
            layer.weight_OI.copy_(formed.weight_OI())
            layer.left_OR.copy_(formed.row_gain_O[:, None] * formed.left_OR)
            right = spec.bases[1].t() if spec.kind.xs else formed.right_RI
            layer.right_RI.copy_(right * formed.col_gain_I)

    def finish(self) -> None:
        # V is formed again: kept, it would take as much memory as the frozen weights.
        for spec in self.specs:
            formed = form_reference(spec.weight_OI, spec.params, spec.kind, spec.scale, spec.bases)
            finish_reference(formed, spec.grads, spec.kind, spec.scale, spec.bases)
