"""Adapted linear layers: W' formed once per step on a GPU, the factored form anywhere, and their autograd."""

from sa3dist_kernels.adapted_linear import NormCache, adapted_linear, effective_weight_reference
from sa3dist_kernels.adapter_types import ADAPTER_TYPES, AdapterType
from sa3dist_kernels.formed_linear import formed_linear
from sa3dist_kernels.formed_spec import FormedLayer, FormedSpec
from sa3dist_kernels.formed_weights import FormedWeights, share_statistics
from sa3dist_kernels.frozen_products import frozen_linear
from sa3dist_kernels.gated_linear import gated_formed_linear, silu_gated
from sa3dist_kernels.weight_norms import FrozenConstants, frozen_constants

__all__ = [
    "ADAPTER_TYPES",
    "AdapterType",
    "FormedLayer",
    "FormedSpec",
    "FormedWeights",
    "FrozenConstants",
    "NormCache",
    "adapted_linear",
    "effective_weight_reference",
    "formed_linear",
    "frozen_constants",
    "frozen_linear",
    "gated_formed_linear",
    "share_statistics",
    "silu_gated",
]
