"""An adapter file together with a base on disk: effective weights and plain factors, one layer at a time.

Legend: O fan_out, I fan_in, R rank.
"""

import torch
from sa3dist_kernels import effective_weight_reference, frozen_constants

from sa3dist.adapters.file import BASE_KEY, AdapterFile
from sa3dist.adapters.svd_bases import singular_bases
from sa3dist.adapters.transfer import covered_layers
from sa3dist.model.loading import BaseOnDisk


class AdapterOnDisk:
    """The layers an adapter file changes in one base, without loading either.

    file   as read by ``read_adapter_file``
    base   checked, but not loaded
    Raises CheckpointError, as ``load_adapter`` does, for any missing, unexpected or misshapen tensor.
    """

    def __init__(self, file: AdapterFile, base: BaseOnDisk) -> None:
        self.file, self.base = file, base
        self.layers = covered_layers(file, base.adapter_roots)
        self.kind = file.config.kind
        self.scale = file.config.alpha / file.config.rank
        self._trained = file.layers()

    @property
    def of_another_base(self) -> bool:
        """Whether the file's header names a base with another digest, as for a post-trained sibling."""
        found = self.file.metadata.get(BASE_KEY)
        return found is not None and found != self.base.weights.digest

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        """A layer's trained tensors in float32, by their names."""
        return {key: value.float() for key, value in self._trained[name].items()}

    def effective_weight(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight the layer acts with at strength 1, in the shape of its frozen weight.

        Everything but the singular bases of -xs types, which are float32 by definition, is computed in ``dtype``.
        """
        weight = self.base.fp32_weight(name)
        trained = {key: value.to(dtype) for key, value in self.trained(name).items()}
        bases = singular_bases(weight.flatten(1), self.file.config.rank) if self.kind.xs else ()
        frozen = frozen_constants(weight, *bases) if bases else None
        return effective_weight_reference(weight.to(dtype), trained, self.kind, self.scale, frozen)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(up, down), (O, R) and (R, I) in float32: scale * up @ down is what the layer adds before any norm."""
        trained = self.trained(name)
        if not self.kind.xs:
            return trained["lora_B"], trained["lora_A"]
        left_OR, right_IR = singular_bases(self.base.fp32_weight(name).flatten(1), self.file.config.rank)
        return left_OR, trained["M_xs"] @ right_IR.t()
