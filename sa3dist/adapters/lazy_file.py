"""An adapter file and a base on disk: effective weights and plain factors, one layer at a time.

Legend: O fan_out, I fan_in, R rank.
"""

from collections.abc import Mapping

import torch
from sa3dist_kernels import effective_weight_reference, frozen_constants
from sa3dist_kernels.weight_norms import EPS

from sa3dist.adapters.attach import AdapterConfig
from sa3dist.adapters.file import BASE_KEY, AdapterFile
from sa3dist.adapters.svd_bases import singular_bases
from sa3dist.adapters.transfer import covered_layers
from sa3dist.model.loading import BaseOnDisk


def factors(
    config: AdapterConfig, trained: Mapping[str, torch.Tensor], weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down), (O, R) and (R, I) in float32; scale * up @ down is what a layer adds before any norm.

    weight   the layer's frozen weight
    """
    if not config.kind.xs:
        return trained["lora_B"].float(), trained["lora_A"].float()
    left_OR, right_IR = singular_bases(weight.flatten(1), config.rank)
    return left_OR, trained["M_xs"].float() @ right_IR.t()


def row_norms(config: AdapterConfig, trained: Mapping[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Norms (O) of the rows of W0 + scale * D, float32, by which types with a row magnitude divide."""
    up_OR, down_RI = factors(config, trained, weight)
    return torch.linalg.vector_norm(weight.flatten(1).float() + config.alpha / config.rank * up_OR @ down_RI, dim=1)


def effective(
    config: AdapterConfig,
    trained: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    norms_O: torch.Tensor | None = None,
) -> torch.Tensor:
    """A layer's effective weight at strength 1, in the shape of its frozen ``weight``.

    norms_O   divides rows by these instead of their own norms
    Everything is computed in ``dtype``, except the singular bases of -xs types, which are float32 by definition.
    """
    kind = config.kind
    bases = singular_bases(weight.flatten(1), config.rank) if kind.xs else ()
    frozen = frozen_constants(weight, *bases) if bases else None
    values = {key: value.to(dtype) for key, value in trained.items()}
    if norms_O is not None:
        ratio_O = (row_norms(config, trained, weight) + EPS) / (norms_O.float() + EPS)
        values[kind.row_magnitude] = values[kind.row_magnitude] * ratio_O
    return effective_weight_reference(weight.to(dtype), values, kind, config.alpha / config.rank, frozen)


class AdapterOnDisk:
    """The layers of a base that an adapter file changes, without loading the base.

    file   from ``read_adapter_file``
    base   checked, but not loaded
    Raises CheckpointError, as ``load_adapter`` does, for any missing, unexpected or misshapen tensor.
    """

    def __init__(self, file: AdapterFile, base: BaseOnDisk) -> None:
        self.file, self.base = file, base
        self.layers = covered_layers(file, base.adapter_roots)
        self.kind = file.config.kind
        self._trained = file.layers()

    @property
    def of_another_base(self) -> bool:
        """Whether the file's header has another base's digest, for example a post-trained sibling's."""
        digest = self.file.metadata.get(BASE_KEY)
        return digest is not None and digest != self.base.weights.digest

    def trained(self, name: str) -> dict[str, torch.Tensor]:
        """A layer's trained tensors in float32, by their names."""
        return {key: value.float() for key, value in self._trained[name].items()}

    def effective_weight(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``effective`` of the layer called ``name``."""
        return effective(self.file.config, self.trained(name), self.base.fp32_weight(name), dtype)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(up, down), (O, R) and (R, I) in float32: scale * up @ down is what the layer adds before any norm."""
        return factors(self.file.config, self.trained(name), self.base.fp32_weight(name))

    def row_norms(self, name: str) -> torch.Tensor:
        """``row_norms`` of the layer called ``name``."""
        return row_norms(self.file.config, self.trained(name), self.base.fp32_weight(name))
