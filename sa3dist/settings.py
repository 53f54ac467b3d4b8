"""The settings of a run: their meaning, ranges and defaults, and the checks across them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sa3dist.data.remote.local_paths import can_be_named, expand_home, is_text
from sa3dist.errors import ConfigError, read_duration
from sa3dist.request.fields import IDENTITY
from sa3dist.request.listening import ListeningFields
from sa3dist.request.patterns import too_many

# The spellings of on and off in YAML 1.1 and JSON.
_SWITCHES = {"true": "on", "yes": "on", "on": "on", "false": "off", "no": "off", "off": "off"}
OnOff = BeforeValidator(lambda value: _SWITCHES.get(str(value).lower(), value))
NoWord = BeforeValidator(lambda value: "no" if _SWITCHES.get(str(value).lower()) == "off" else value)
# Fields that may name a file or folder of this machine.
PLACES = ("audio_data_url", "model", "lora_checkpoint_url", "output_dir", "work_dir", "text_encoder", "resume")
# The endpoint's documented limit, kept for compatibility; the shapes themselves allow more (spec/training.md 3).
XS_RANK_LIMIT = 17
# These values multiply float32 tensors.
FLOAT32_MAX = 3.4028e38
SECONDS_OF_A_YEAR = 31_536_000
# Above are only typing errors: a step would never end, or a loader would need more memory than any machine has.
MANY = 100_000


class Settings(ListeningFields):
    """Everything a run depends on: the hosted endpoint's fields, then our own."""

    # Our own from here on.
    latents: Annotated[Literal["whole", "crop", "on_the_fly"], IDENTITY] = Field(
        "whole",
        description="encode whole clips once and crop latents, encode each crop once, or encode crops at every step",
    )

    # Where things are.
    name: str = Field("sa3dist-lora", min_length=1, description="name of the run")
    output_dir: Path | None = Field(
        None, validate_default=False, description="results, checkpoints; unset = runs/<name>"
    )
    work_dir: Path | None = Field(
        None,
        validate_default=False,
        description="shards and latents, shared by runs; unset = sa3dist-work beside output_dir",
    )
    text_encoder: str | None = Field(None, description="directory or repo id of T5Gemma; unset = the model's own")

    # The adapter and the objective.
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False, description="adapter scale times rank; unset = rank")
    prompt_dropout: Annotated[float, IDENTITY] = Field(
        0.1, ge=0, le=1, description="share of clips trained without prompt"
    )
    context_weight: Annotated[float, IDENTITY] = Field(
        1.0, ge=0, allow_inf_nan=False, description="weight of the loss on given context"
    )
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False, description="AdamW weight decay")
    warmup_steps: int = Field(0, ge=0, description="first steps, over which the learning rate rises linearly")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after the warm-up: constant, or falling to 0 just behind the last step"
    )
    seconds_total_of: Annotated[Literal["file", "clip"], IDENTITY] = Field(
        "file", description="duration told to the model: of the whole file, as the reference does, or of the crop"
    )
    reference_numerics: Annotated[bool, IDENTITY] = Field(
        False,
        description="round timestep and duration to the base's precision before their features, as the reference does",
    )

    # Running at scale.
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=MANY, description="micro batches per process and optimiser step"
    )
    global_batch_size: int | None = Field(
        None, ge=1, le=MANY, description="clips per step over all processes; derives gradient_accumulation_steps"
    )
    mixed_precision: Annotated[Literal["bf16", "no"], NoWord, IDENTITY] = Field(
        "bf16", description="autocast of the step: bf16 or no"
    )
    gradient_checkpointing: Annotated[Literal["auto", "on", "off"], OnOff] = Field(
        "auto", description="recompute blocks in the backward pass: auto (when memory asks for it), on, off"
    )
    compile: Annotated[Literal["auto", "on", "off"], OnOff] = Field(
        "auto",
        description="compile what lies between the matrix products: auto (CUDA, runs of 200 steps or more), on, off",
    )
    adapter_products: Literal["auto", "formed", "per_use", "factored"] = Field(
        "auto",
        description="multiply with adapted weights formed once per step, or for every use of a block (per_use: least "
        "memory, all blocks recomputed), or with base and factors apart; auto: formed on CUDA, per_use if memory or "
        "ZeRO-3 asks",
    )
    cuda_graphs: Annotated[Literal["auto", "on", "off"], OnOff] = Field(
        "auto",
        description="replay forward and backward as CUDA graphs: auto (CUDA, runs of 50 steps or more), on, off",
    )
    deterministic: bool = Field(
        False, description="only deterministic kernels: same command, same bits; what cannot be compiled ends the run"
    )
    gradient_compression: Annotated[Literal["none", "bf16"], IDENTITY] = Field(
        "none", description="format in which gradients travel between processes: float32 (none), or bf16 for slow links"
    )
    mode: Literal["indexed", "streaming"] = Field(
        "indexed",
        description="indexed (every clip once per epoch, by position) or streaming (shards too many to index, in turn)",
    )
    shuffle_buffer: int = Field(256, ge=1, le=MANY, description="clips each loader process mixes in streaming mode")
    bucket_batches: Annotated[int, IDENTITY] = Field(
        1,
        ge=1,
        le=MANY,
        description="micro batches sorted by length together, so that less is padded; 1 = plain shuffle",
    )
    encode_batch: int = Field(
        1,
        ge=1,
        le=64,
        description="clips of one length, or captions, encoded in one pass; above 1 values may differ by rounding",
    )
    num_workers: int = Field(2, ge=0, le=1024, description="loader processes per rank")
    on_bad_clip: Literal["raise", "skip"] = Field("raise", description="stop at unusable clips, or skip and name them")
    max_download_bytes: int = Field(1 << 40, ge=1, description="largest remote source that is downloaded, in bytes")
    public_addresses_only: bool = Field(
        False, description="refuse addresses of data and adapters that point to this machine or its network"
    )
    cache_bytes: int = Field(
        64 << 30, ge=0, description="clips of remote shards kept on the local disk, in bytes; the least used go first"
    )
    verify_base: bool = Field(
        False, description="hash the model's files again, though path, size, time and inode are those of the last run's"
    )
    allow_any_dataset_size: bool = Field(False, description="lift the limit of 4..2000 clips")

    on_oom: Literal["fail", "adapt"] = Field(
        "fail",
        description="out of memory in a step: end with 70 (fail), or with 75, and the next start recomputes blocks",
    )
    step_timeout: float = Field(
        600,
        gt=0,
        le=SECONDS_OF_A_YEAR,
        allow_inf_nan=False,
        description="seconds without progress in a step after which the run ends with 70",
    )
    max_wall_time: Annotated[float | None, BeforeValidator(read_duration)] = Field(
        None,
        gt=0,
        le=SECONDS_OF_A_YEAR,
        allow_inf_nan=False,
        description="save and end with 75 so that the program has run for no longer: seconds, or H:MM:SS",
    )

    # Saving, resuming, reporting.
    log_every: int = Field(10, ge=1, description="steps between rows of metrics.jsonl")
    save_every: int = Field(500, ge=1, description="steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")
    resume: str = Field(
        "auto", description="auto (newest good checkpoint in output_dir), never, or a checkpoint's path"
    )
    log_clips: bool = Field(False, description="add the keys of every step's clips to metrics.jsonl")

    log_with: list[str] | None = Field(
        None, description="trackers beside metrics.jsonl: tensorboard, wandb, trackio, mlflow; unset = none"
    )
    log_project: str = Field("sa3dist", min_length=1, description="project, or experiment, of the run in trackers")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *typing.get_args(annotation)}:
            raise ValueError(f"{value!r} is not a number")
        if isinstance(value, str) and not is_text(value):
            raise ValueError("holds bytes that are not UTF-8; rename what it names, or give a link to it")
        if isinstance(value, str) and value == "":
            if cls.model_fields[info.field_name].default is not None:
                raise ValueError("is empty; give a value or leave it out")
            return None
        return value

    @field_validator(*PLACES, mode="before")
    @classmethod
    def _home_as_in_a_shell(cls, value: Any) -> Any:
        try:
            return expand_home(value) if isinstance(value, str | Path) else value
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @field_validator("name", "output_dir", "work_dir")
    @classmethod
    def _can_be_made(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "name" and ("/" in value or value in (".", "..")):
            raise ValueError(f"{value!r} is a path, expected a plain name; output_dir says where results go")
        if value is not None and not can_be_named(value):
            raise ValueError("has a part that is no file name: at most 255 bytes, and no NUL")
        return value

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _empty_list_is_unset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value] if value else None
        if isinstance(value, list):
            value = [item.strip() if isinstance(item, str) else item for item in value]
            if "" in value:
                raise ValueError("an empty pattern matches every layer; remove it")
            if all(isinstance(item, str) for item in value) and (problem := too_many(value)):
                raise ValueError(problem)
        return value or None

    @field_validator("preview_prompts", "log_with", mode="before")
    @classmethod
    def _one_is_a_list_and_none_is_unset(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, list) and not all(is_text(item) for item in value if isinstance(item, str)):
            raise ValueError("holds bytes that are not UTF-8")
        return value or None

    @model_validator(mode="after")
    def _check_across(self) -> Settings:
        xs = self.adapter_type.endswith("-xs")
        refused = {
            f"rank: {self.rank} is out of range for {self.adapter_type}, expected 1..{XS_RANK_LIMIT}; the -xs types "
            f"train a rank x rank matrix, so choose a smaller rank or another adapter_type": xs
            and self.rank > XS_RANK_LIMIT,
            f"warmup_steps: {self.warmup_steps} leaves none of number_of_steps ({self.number_of_steps}) at the full "
            f"learning rate; choose fewer": self.warmup_steps >= self.number_of_steps,
            # Measured: at 380 s the gradients of activations underflow, adapter gradients are off by up to 59 %.
            "mixed_precision: no loses gradients over a float16 base; use bf16, or base_precision fp32": (
                (self.base_precision, self.mixed_precision) == ("fp16", "no")
            ),
            "pre_encode: true has nothing to encode ahead with latents: on_the_fly; unset one": (
                self.pre_encode and self.latents == "on_the_fly"
            ),
            "adapter_products: per_use forms weights anew as blocks are recomputed; use gradient_checkpointing: auto": (
                (self.adapter_products, self.gradient_checkpointing) == ("per_use", "off")
            ),
        }
        for key in ("learning_rate", "alpha", "context_weight", "weight_decay"):
            value = getattr(self, key) or 0.0
            refused[f"{key}: {value:g} is more than float32 holds ({FLOAT32_MAX}); choose a smaller one"] = (
                value > FLOAT32_MAX
            )
        if self.mode == "streaming":
            refused |= {
                f"{key}: with mode: streaming it {reason}": applies
                for key, applies, reason in (
                    ("bucket_batches", self.bucket_batches > 1, "sorts by length, which an index knows; leave it at 1"),
                    (
                        "duration",
                        self.duration is None,
                        "must be given: without an index the longest clip is not known",
                    ),
                    ("validation", bool(self.validation), "needs an index to choose clips from; leave it at 0"),
                    ("latents", self.latents != "whole", "must be whole: there is no cache to keep crops in"),
                    ("pre_encode", self.pre_encode, "would have no end; stream the shards that sa3dist encode leaves"),
                    ("on_bad_clip", self.on_bad_clip != "raise", "must be raise; sa3dist shard leaves bad clips out"),
                )
            }
        for reason, applies in refused.items():
            if applies:
                raise ValueError(reason)
        object.__setattr__(self, "output_dir", Path(self.output_dir or Path("runs") / self.name))
        object.__setattr__(self, "work_dir", Path(self.work_dir or self.output_dir.parent / "sa3dist-work"))
        return self

    def as_dict(self) -> dict[str, Any]:
        """The tree as plain YAML and JSON values."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The values marked ``IDENTITY``, by name."""
        return {
            name: getattr(self, name) for name, field in type(self).model_fields.items() if IDENTITY in field.metadata
        }

    def accumulation(self, world_size: int) -> int:
        """Micro batches per process and step. Raises ConfigError where global_batch_size does not divide or differs."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        per_round = self.batch_size * world_size
        if self.global_batch_size % per_round:
            raise ConfigError(
                f"global_batch_size: {self.global_batch_size} is not a multiple of batch_size x processes = "
                f"{self.batch_size} x {world_size}; choose a multiple of {per_round}"
            )
        derived = self.global_batch_size // per_round
        # A resolved config has 1 there beside global_batch_size.
        if self.gradient_accumulation_steps not in (1, derived):
            raise ConfigError(
                f"gradient_accumulation_steps: {self.gradient_accumulation_steps}, but global_batch_size "
                f"{self.global_batch_size} makes it {derived} here; give one of the two"
            )
        return derived
