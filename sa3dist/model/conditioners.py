"""The prompt and duration conditioners: from hidden states and seconds to the sequences the DiT reads.

Legend: B batch, L prompt tokens, H text encoder width, C conditioning width.
"""

import torch
from torch import Tensor, nn

from sa3dist.model.blocks import expo_features
from sa3dist.model.config import ModelConfig, NumberConfig, PromptConfig
from sa3dist.model.frequencies import FEATURES

# Width of T5Gemma b-b, the only text encoder the format knows.
HIDDEN_WIDTH = 768


class ExpoFeatures(nn.Module):
    """First entry of the number embedding, without state: the file's Linear is entry 1."""

    def forward(self, values: Tensor) -> Tensor:
        return expo_features(values)


class NumberConditioner(nn.Module):
    """One token from one number, for ``seconds_total`` in seconds."""

    def __init__(self, config: NumberConfig, width: int):
        super().__init__()
        self.lowest, self.highest = config.min_val, config.max_val
        self.embedder = nn.ModuleDict({"embedding": nn.Sequential(ExpoFeatures(), nn.Linear(FEATURES, width))})

    def forward(self, values_B: Tensor, dtype: torch.dtype, reference_numerics: bool = False) -> Tensor:
        """(B,) to (B, 1, C). Values are clamped to the configured range.

        dtype               dtype of activations, to which the features are cast
        reference_numerics  round the normalised number to ``dtype`` before its features, as the reference does
        """
        value = (values_B.float().clamp(self.lowest, self.highest) - self.lowest) / (self.highest - self.lowest)
        features, linear = self.embedder["embedding"]
        return linear(features(value.to(dtype) if reference_numerics else value).to(dtype))[:, None]


class PromptConditioner(nn.Module):
    """Projects the text encoder's hidden states and fills the padded positions."""

    def __init__(self, config: PromptConfig, width: int):
        super().__init__()
        self.padding_mode = config.padding_mode
        self.register_module(
            "proj_out", nn.Linear(HIDDEN_WIDTH, width) if config.project_out or width != HIDDEN_WIDTH else None
        )
        self.register_parameter(
            "padding_embedding", nn.Parameter(torch.zeros(width)) if config.padding_mode == "learned" else None
        )

    def forward(self, hidden_BLH: Tensor, mask_BL: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, H) to (B, L, C). The projection runs in ``dtype``; without one the dtype does not change."""
        embeds = hidden_BLH if self.proj_out is None else self.proj_out(hidden_BLH.to(dtype))
        return self.fill_padding(embeds, mask_BL)

    def fill_padding(self, embeds_BLC: Tensor, mask_BL: Tensor) -> Tensor:
        """Replace positions with mask 0 by the learned vector or by zero, or keep them, per config. Idempotent."""
        if self.padding_mode == "none":
            return embeds_BLC
        valid = mask_BL.bool()[..., None]
        # where, not a product: padded positions may hold anything, even NaN.
        filler = self.padding_embedding if self.padding_mode == "learned" else embeds_BLC.new_zeros(())
        return torch.where(valid, embeds_BLC, filler)


class Conditioners(nn.Module):
    """The conditioners, whose adapter names start with ``conditioners.``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.conditioners = nn.ModuleDict(
            {
                "prompt": PromptConditioner(config.prompt, config.cond_dim),
                "seconds_total": NumberConditioner(config.seconds_total, config.cond_dim),
            }
        )

    @property
    def prompt(self) -> PromptConditioner:
        return self.conditioners["prompt"]

    @property
    def seconds_total(self) -> NumberConditioner:
        return self.conditioners["seconds_total"]
