"""The released base models: their names, repositories and configs."""

from sa3dist.errors import CheckpointError

RELEASED = {
    "small-music-base": "stabilityai/stable-audio-3-small-music-base",
    "small-sfx-base": "stabilityai/stable-audio-3-small-sfx-base",
    "medium-base": "stabilityai/stable-audio-3-medium-base",
}

_SHAPES = {
    "small": {
        "sample_size": 5_324_800,
        "dit": {"embed_dim": 1024, "depth": 20, "num_heads": 16},
        "differential": False,
        "resampling": {
            "channels": 128,
            "transformer_depths": [6],
            "chunk_size": 32,
            "chunk_midpoint_shift": True,
        },
        "encoder": {"conv_mapping": False, "mask_noise": 0.0},
        "decoder": {"conv_mapping": True, "mask_noise": 0.01, "sinusoidal_blocks": [0]},
    },
    "medium": {
        "sample_size": 16_777_216,
        "dit": {"embed_dim": 1536, "depth": 24, "num_heads": 24},
        "differential": True,
        "resampling": {"channels": 256, "transformer_depths": [12], "sliding_window": [1, 1]},
        "encoder": {"mask_noise": 0.001},
        "decoder": {"mask_noise": 0.1, "sinusoidal_blocks": [8]},
    },
}


def released_config(name: str, depth: int | None = None) -> dict:
    """``model_config.json`` of a released base as a dict; ``depth`` replaces the number of DiT layers.

    Raises CheckpointError for an unknown name.
    """
    if name not in RELEASED:
        raise CheckpointError(f"{name}: not a released base; expected one of {', '.join(RELEASED)}")
    shape = _SHAPES[name.split("-")[0]]
    return {
        "model_type": "diffusion_cond_inpaint",
        "sample_size": shape["sample_size"],
        "sample_rate": 44100,
        "audio_channels": 2,
        "model": {
            "io_channels": 256,
            "pretransform": {
                "type": "autoencoder",
                "chunked": True,
                "iterate_batch": False,
                "config": same_config(shape),
            },
            "conditioning": conditioning_config(RELEASED[name].removesuffix("-base"), max_length=256),
            "diffusion": diffusion_config(shape, depth),
        },
    }


def same_config(shape: dict) -> dict:
    common = {
        "latent_dim": 256,
        "c_mults": [6],
        "strides": [16],
        "dim_heads": 64,
        "differential": True,
        "variable_stride": True,
        "dyt": True,
        **shape["resampling"],
    }
    return {
        "encoder": {"type": "taae_v2", "config": {"in_channels": 512, **common, **shape["encoder"]}},
        "decoder": {"type": "taae_v2", "config": {"out_channels": 512, **common, **shape["decoder"]}},
        "bottleneck": {
            "type": "softnorm",
            "config": {
                "dim": 256,
                "noise_augment_dim": 0,
                "noise_regularize": True,
                "auto_scale": True,
                "freeze": True,
            },
        },
        "pretransform": {"type": "patched", "config": {"channels": 2, "patch_size": 256}},
        "latent_dim": 256,
        "downsampling_ratio": 4096,
        "io_channels": 2,
    }


def conditioning_config(repo_id: str, max_length: int) -> dict:
    prompt = {
        "repo_id": repo_id,
        "subfolder": "t5gemma-b-b-ul2",
        "max_length": max_length,
        "padding_mode": "learned",
    }
    seconds = {"fourier_features_type": "expo", "min_val": 0, "max_val": 384}
    return {
        "cond_dim": 768,
        "configs": [
            {"id": "prompt", "type": "t5gemma", "config": prompt},
            {"id": "seconds_total", "type": "number", "config": seconds},
        ],
    }


def diffusion_config(shape: dict, depth: int | None) -> dict:
    dit = {
        **shape["dit"],
        "io_channels": 256,
        "cond_token_dim": 768,
        "global_cond_dim": 768,
        "local_add_cond_dim": 257,
        "global_cond_type": "adaLN",
        "timestep_features_type": "expo",
        "num_memory_tokens": 64,
        "norm_type": "rms_norm",
        "norm_kwargs": {"force_fp32": True},
        "attn_kwargs": {"qk_norm": "rms", "differential": shape["differential"]},
        "ff_kwargs": {"mult": 4.0},
    }
    if depth is not None:
        dit["depth"] = depth
    return {
        "type": "dit",
        "diffusion_objective": "rectified_flow",
        "cross_attention_cond_ids": ["prompt", "seconds_total"],
        "global_cond_ids": ["seconds_total"],
        "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
        "mask_padding_attention": True,
        "use_effective_length_for_schedule": True,
        "distribution_shift_options": {"type": "full", "min_length": 256, "max_length": 4096},
        "config": dit,
    }
