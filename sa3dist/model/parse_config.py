"""Parses ``model_config.json``: missing keys take defaults, unknown ones are ignored, unsupported values are errors."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path

from sa3dist.errors import CheckpointError
from sa3dist.model.config import (
    AttentionKwargs,
    AutoencoderConfig,
    BottleneckConfig,
    DiTConfig,
    FeedForwardKwargs,
    ModelConfig,
    NormKwargs,
    NumberConfig,
    PatchingConfig,
    PromptConfig,
    ResamplingConfig,
    ShiftConfig,
)
from sa3dist.model.frequencies import FEATURES

# Options that determine the network: the default, then the supported values.
_DIT_OPTIONS = {
    "patch_size": (1, 1),
    "project_cond_tokens": (True, True),
    "project_global_cond": (True, True),
    "input_concat_dim": (0, 0),
    "prepend_cond_dim": (0, 0),
    "global_cond_type": ("prepend", "adaLN"),
    "timestep_cond_type": ("global", "global"),
    "timestep_features_type": ("learned", "expo"),
    "timestep_features_dim": (FEATURES, FEATURES),
    "transformer_type": ("continuous_transformer", "continuous_transformer"),
    "norm_type": ("layer_norm", "rms_norm", "dyt"),
    "rotary_pos_emb": (True, True),
    "cross_attn_rotary_pos_emb": (False, False),
    "causal": (False, False),
    "conformer": (False, False),
    "layer_scale": (False, False),
    "use_sinusoidal_emb": (False, False),
    "use_abs_pos_emb": (False, False),
    "sliding_window": (None, None),
    "final_cross_attn_ix": (-1, -1),
}
_NORM_OPTIONS = {"fix_scale": (False, False)}
_ATTENTION_OPTIONS = {"qk_norm": ("none", "none", "rms", "dyt"), "feat_scale": (False, False)}
_FEED_FORWARD_OPTIONS = {"glu": (True, True), "use_conv": (False, False), "no_bias": (False, False)}
_RESAMPLING_OPTIONS = dict.fromkeys(("conformer", "layer_scale", "causal", "feat_scale", "cross_attn"), (False, False))
_BOTTLENECK_OPTIONS = {"noise_augment_dim": (0, 0)}
_PATCHING_OPTIONS = {"oversampling": (1, 1), "postfilter_channels": (0, 0)}
_NUMBER_OPTIONS = {"fourier_features_type": ("learned", "expo")}
_PROMPT_OPTIONS = {
    "model_name": ("google/t5gemma-b-b-ul2", "google/t5gemma-b-b-ul2"),
    "padding_mode": ("zero", "none", "zero", "learned"),
    "enable_grad": (False, False),
}
_SHIFT_OPTIONS = {"type": ("full", "full"), "use_sine": (False, False)}
_CONDITIONING_IDS = {
    "cross_attention_cond_ids": ["prompt", "seconds_total"],
    "global_cond_ids": ["seconds_total"],
    "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
    "input_concat_ids": [],
    "prepend_cond_ids": [],
    "modular_local_cond_configs": [],
}


class _Section:
    """One JSON object and its path in the file, so that every message can name file and key."""

    def __init__(self, value, source: str, path: str):
        self.source, self.path = source, path
        if not isinstance(value, dict):
            raise CheckpointError(f"{source}: {path or 'the file'} is {_kind(value)}, expected an object")
        self.value = value

    def name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def child(self, key: str) -> _Section:
        return _Section(self.required(key), self.source, self.name(key))

    def required(self, key: str):
        if key not in self.value:
            raise CheckpointError(f"{self.source}: {self.name(key)} is missing; is this a Stable Audio 3 model config?")
        return self.value[key]

    def number(self, key: str) -> int:
        value = self.required(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.source}: {self.name(key)} is {value!r}, expected a positive integer")
        return value

    def read(self, cls, options: dict[str, tuple], **parsed):
        """Check that ``options`` are supported, then build ``cls`` from the keys that are its fields.

        parsed   fields already built from nested objects
        """
        fields = typing.get_type_hints(cls)
        known = {key: value for key, value in self.value.items() if key in fields and key not in parsed}
        for key, value in known.items():
            if not _fits(value, fields[key]):
                expected = getattr(fields[key], "__name__", str(fields[key]))
                raise CheckpointError(f"{self.source}: {self.name(key)} is {value!r}, expected {expected}")
        for key, (absent, *supported) in options.items():
            value = self.value.get(key, absent)
            if value not in supported:
                choices = " or ".join(map(repr, supported))
                actual = repr(value) if key in self.value else f"absent, which means {value!r}"
                raise CheckpointError(f"{self.source}: {self.name(key)} is {actual}; only {choices} is supported")
        return cls(**known, **parsed)

    def refuse(self, key: str, reason: str):
        raise CheckpointError(f"{self.source}: {self.name(key)}: {reason}")


def read_model_config(path: Path) -> dict:
    """The JSON object of ``model_config.json``. Raises CheckpointError when it is missing or not JSON."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the model config ({error.strerror or error})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    return _Section(value, str(path), "").value


def parse_model_config(value: dict, source: str) -> ModelConfig:
    """Check and type a full model's config.

    value   the JSON object        source  named in every message
    Keys the reference ignores are ignored. Raises CheckpointError, naming file and key, for anything this network
    cannot represent.
    """
    root = _Section(value, source, "")
    model = root.child("model")
    if "encoder" in model.value:
        raise CheckpointError(f"{source}: a stand-alone autoencoder, expected a diffusion model (model.diffusion)")
    diffusion = model.child("diffusion")
    objective = diffusion.value.get("diffusion_objective", "v")
    if objective not in ("rectified_flow", "rf_denoiser"):
        diffusion.refuse("diffusion_objective", f"{objective!r} is not supported, only rectified_flow or rf_denoiser")
    dit = _parse_dit(diffusion.child("config"))
    _check_conditioning_ids(diffusion, dit)
    pretransform = model.child("pretransform")
    autoencoder = _parse_autoencoder(pretransform.child("config"), bool(pretransform.value.get("chunked", False)))
    if autoencoder.latent_dim != dit.io_channels:
        model.refuse("io_channels", f"the DiT has {dit.io_channels} channels, the autoencoder {autoencoder.latent_dim}")
    cond_dim, prompt, seconds_total = _parse_conditioning(model.child("conditioning"))
    for key in ("cond_token_dim", "global_cond_dim"):
        if getattr(dit, key) != cond_dim:
            diffusion.refuse(f"config.{key}", f"is {getattr(dit, key)}, but model.conditioning.cond_dim is {cond_dim}")
    shift = None
    if diffusion.value.get("distribution_shift_options") is not None:
        shift = diffusion.child("distribution_shift_options").read(ShiftConfig, _SHIFT_OPTIONS)
    return ModelConfig(
        source=source,
        post_trained=objective == "rf_denoiser",
        sample_rate_hz=root.number("sample_rate"),
        sample_size=root.number("sample_size"),
        audio_channels=autoencoder.patching.channels,
        dit=dit,
        autoencoder=autoencoder,
        cond_dim=cond_dim,
        prompt=prompt,
        seconds_total=seconds_total,
        distribution_shift=shift,
        mask_padding_attention=bool(diffusion.value.get("mask_padding_attention", False)),
        use_effective_length_for_schedule=bool(diffusion.value.get("use_effective_length_for_schedule", False)),
    )


def _parse_dit(section: _Section) -> DiTConfig:
    nested = {
        "norm_kwargs": (NormKwargs, _NORM_OPTIONS),
        "attn_kwargs": (AttentionKwargs, _ATTENTION_OPTIONS),
        "ff_kwargs": (FeedForwardKwargs, _FEED_FORWARD_OPTIONS),
    }
    parsed = {key: section.child(key).read(*how) for key, how in nested.items() if section.value.get(key) is not None}
    dit = section.read(DiTConfig, _DIT_OPTIONS, **parsed)
    if dit.embed_dim % dit.num_heads or dit.head_dim < 32 or dit.head_dim % 2:
        section.refuse("num_heads", f"{dit.embed_dim} / {dit.num_heads} must be a whole, even head width of 32 or more")
    for key in ("cond_token_dim", "global_cond_dim"):
        if getattr(dit, key) <= 0:
            section.refuse(key, "must be positive: the network needs cross-attention and global conditioning")
    return dit


def _check_conditioning_ids(diffusion: _Section, dit: DiTConfig) -> None:
    expected = dict(_CONDITIONING_IDS)
    if dit.local_add_cond_dim is None:
        expected["local_add_cond_ids"] = []
    elif dit.local_add_cond_dim != dit.io_channels + 1:
        diffusion.refuse("config.local_add_cond_dim", f"is {dit.local_add_cond_dim}, expected {dit.io_channels + 1}")
    for key, ids in expected.items():
        actual = diffusion.value.get(key, [])
        if actual != ids:
            diffusion.refuse(key, f"{actual} is not supported, only {ids}")


def _parse_conditioning(section: _Section) -> tuple[int, PromptConfig, NumberConfig]:
    cond_dim = section.number("cond_dim")
    conditioners = {}
    for position, item in enumerate(section.required("configs")):
        entry = _Section(item, section.source, section.name(f"configs[{position}]"))
        conditioners[entry.required("id")] = (entry.required("type"), entry)
    if {key: kind for key, (kind, _) in conditioners.items()} != {"prompt": "t5gemma", "seconds_total": "number"}:
        kinds = ", ".join(f"{key}: {kind}" for key, (kind, _) in conditioners.items())
        section.refuse("configs", f"found {kinds or 'none'}; expected prompt: t5gemma, seconds_total: number")
    prompt = conditioners["prompt"][1].child("config").read(PromptConfig, _PROMPT_OPTIONS)
    seconds_total = conditioners["seconds_total"][1].child("config").read(NumberConfig, _NUMBER_OPTIONS)
    return cond_dim, prompt, seconds_total


def _parse_autoencoder(section: _Section, chunked: bool) -> AutoencoderConfig:
    sides = {}
    for key in ("encoder", "decoder"):
        side = section.child(key).child("config")
        sides[key] = side.read(ResamplingConfig, _RESAMPLING_OPTIONS)
        _check_resampling(side, sides[key])
    patching = section.child("pretransform").child("config").read(PatchingConfig, _PATCHING_OPTIONS)
    bottleneck = section.child("bottleneck").child("config").read(BottleneckConfig, _BOTTLENECK_OPTIONS)
    config = AutoencoderConfig(
        **sides,
        bottleneck=bottleneck,
        patching=patching,
        latent_dim=section.number("latent_dim"),
        downsampling_ratio=section.number("downsampling_ratio"),
        soft_clip=bool(section.child("decoder").value.get("soft_clip", False)),
        chunked=chunked,
    )
    for key, side in sides.items():
        if side.stride * patching.patch_size != config.downsampling_ratio:
            section.refuse(
                "downsampling_ratio",
                f"is {config.downsampling_ratio}, but {key} stride x patch size is {side.stride * patching.patch_size}",
            )
    if {side.latent_dim for side in sides.values()} | {bottleneck.dim} != {config.latent_dim}:
        section.refuse("latent_dim", f"{config.latent_dim} differs between encoder, decoder and bottleneck")
    return config


def _check_resampling(section: _Section, config: ResamplingConfig) -> None:
    if {len(config.c_mults), len(config.strides), len(config.transformer_depths)} != {1}:
        section.refuse("strides", f"{config.strides}: only one resampling stage is supported")
    if config.sliding_window is not None and len(config.sliding_window) != 2:
        section.refuse("sliding_window", f"{config.sliding_window} is not [left, right]")
    if not config.sliding_window and config.chunk_size % config.stride:
        section.refuse("chunk_size", f"{config.chunk_size} is not a multiple of the stride {config.stride}")
    if config.width % min(config.dim_heads, config.width):
        section.refuse("dim_heads", f"{config.dim_heads} does not divide the width {config.width}")


def _fits(value, annotation) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(annotation))
    # In Python a bool is an int.
    fits = isinstance(value, (int, float) if annotation is float else annotation)
    return fits and (annotation is bool or not isinstance(value, bool))


def _kind(value) -> str:
    return {list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value))
