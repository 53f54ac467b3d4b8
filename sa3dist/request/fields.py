"""The hosted endpoint's fields, with its names, defaults and ranges."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Marks settings that change the numbers of a step: a checkpoint continues only with the same values.
IDENTITY = "identity"
PRECISION_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
Alias = BeforeValidator(lambda value: PRECISION_ALIASES.get(value, value) if isinstance(value, str) else value)
# Repeated from sa3dist_kernels, which imports torch: programs that only read settings, such as a supervisor, do
# without.
AdapterName = Literal[
    "lora", "dora", "dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs"
]


class EndpointFields(BaseModel):
    """A request of the hosted endpoint, as far as a run depends on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())

    audio_data_url: str = Field(
        description="zip, folder or WebDataset shards of captioned clips, or latent shards: local path, file://, "
        "http(s)://, s3://"
    )
    model: str = Field(
        "medium-base", description="medium-base, small-music-base, small-sfx-base, or a base's directory"
    )
    number_of_steps: int = Field(1000, ge=1, le=20000, description="optimiser steps")
    learning_rate: float = Field(
        1e-4, gt=0, allow_inf_nan=False, description="AdamW learning rate; its peak if scheduled"
    )
    rank: int = Field(16, ge=1, le=256, description="rank of the adapters; at most 17 for the -xs types")
    adapter_type: AdapterName = Field("dora-rows", description="one of the nine adapter types")
    duration: float | None = Field(
        None,
        ge=1,
        le=380,
        description="crop length in seconds, capped at the model's native length; unset = longest clip",
    )
    batch_size: Annotated[int, IDENTITY] = Field(1, ge=1, le=8, description="clips per process and micro batch")
    seed: Annotated[int, IDENTITY] = Field(42, ge=0, le=2147483647, description="seed of every random draw")
    base_precision: Annotated[Literal["bf16", "fp16", "fp32"], Alias, IDENTITY] = Field(
        "bf16", description="storage of the frozen base: bf16 (bfloat16), fp16 (float16), fp32"
    )
    include: list[str] | None = Field(None, description="adapt only layers whose name has one of these; [a-b] expands")
    exclude: list[str] | None = Field(None, description="never adapt layers whose name has one of these; [a-b] expands")
    lora_checkpoint_url: str | None = Field(None, description="adapter to start from, by sa3dist or another trainer")
    pre_encode: bool = Field(False, description="encode every clip before step 1 (true) or on first use (false)")
