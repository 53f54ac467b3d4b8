"""``model_config.json`` as typed settings that the network is built from; defaults are the reference constructor's.

Options for which this network supports only one value are not fields: ``parse_config`` checks them.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NormKwargs:
    eps: float = 1e-5
    force_fp32: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionKwargs:
    qk_norm: str = "none"
    qk_norm_eps: float = 1e-6
    differential: bool = False


@dataclasses.dataclass(frozen=True)
class FeedForwardKwargs:
    mult: float = 4
    sinusoidal: bool = False


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """``model.diffusion.config``."""

    io_channels: int = 32
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 8
    cond_token_dim: int = 0
    global_cond_dim: int = 0
    timestep_features_logsnr: bool = False
    local_add_cond_dim: int | None = None
    num_memory_tokens: int = 0
    norm_type: str = "layer_norm"
    norm_kwargs: NormKwargs = NormKwargs()
    attn_kwargs: AttentionKwargs = AttentionKwargs()
    ff_kwargs: FeedForwardKwargs = FeedForwardKwargs()

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True)
class ResamplingConfig:
    """``encoder.config`` or ``decoder.config`` of a SAME autoencoder, with all its options.

    Its ``repr`` is part of the keys of cached latents: after adding or removing a field, everything is encoded again.
    """

    in_channels: int = 2
    out_channels: int = 2
    channels: int = 128
    latent_dim: int = 32
    c_mults: list = dataclasses.field(default_factory=lambda: [1, 2, 4, 8])
    strides: list = dataclasses.field(default_factory=lambda: [2, 4, 8, 8])
    transformer_depths: list = dataclasses.field(default_factory=lambda: [3, 3, 3, 3])
    sliding_window: list | None = None
    differential: bool = True
    variable_stride: bool = False
    mask_noise: float = 0.0
    conv_mapping: bool = False
    sinusoidal_blocks: list = dataclasses.field(default_factory=lambda: [0, 0, 0, 0])
    conformer: bool = False
    layer_scale: bool = False
    causal: bool = False
    chunk_size: int = 128
    chunk_midpoint_shift: bool = False
    dim_heads: int = 128
    ff_mult: float = 3
    dyt: bool = True
    mapping_bias: bool = True
    feat_scale: bool = False
    cross_attn: bool = False

    @property
    def width(self) -> int:
        return self.channels * self.c_mults[0]

    @property
    def stride(self) -> int:
        return self.strides[0]

    @property
    def frames_per_chunk(self) -> int:
        """Latent frames that are processed together: 1 with a sliding window, else those of one chunk."""
        return 1 if self.sliding_window else self.chunk_size // self.stride


@dataclasses.dataclass(frozen=True)
class BottleneckConfig:
    dim: int = 32
    auto_scale: bool = False


@dataclasses.dataclass(frozen=True)
class PatchingConfig:
    channels: int = 2
    patch_size: int = 1


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """A SAME autoencoder: ``model.pretransform.config``."""

    encoder: ResamplingConfig
    decoder: ResamplingConfig
    bottleneck: BottleneckConfig
    patching: PatchingConfig
    latent_dim: int
    downsampling_ratio: int
    soft_clip: bool = False
    chunked: bool = False


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The ``t5gemma`` conditioner; ``max_length`` in tokens."""

    model_name: str = "google/t5gemma-b-b-ul2"
    max_length: int = 128
    padding_mode: str = "zero"
    project_out: bool = False
    model_path: str | None = None
    repo_id: str | None = None
    subfolder: str | None = None


@dataclasses.dataclass(frozen=True)
class NumberConfig:
    """The ``number`` conditioner; for ``seconds_total`` the bounds are seconds."""

    min_val: float = 0.0
    max_val: float = 1.0


@dataclasses.dataclass(frozen=True)
class ShiftConfig:
    """Training timestep shift; lengths in latent frames."""

    min_length: int = 256
    max_length: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole diffusion model. ``source`` is the file it came from; ``sample_size`` is in samples per channel.

    post_trained   sampled in few steps, each adding fresh noise; a base is integrated by Euler steps
    """

    source: str
    post_trained: bool
    sample_rate_hz: int
    sample_size: int
    audio_channels: int
    dit: DiTConfig
    autoencoder: AutoencoderConfig
    cond_dim: int
    prompt: PromptConfig
    seconds_total: NumberConfig
    distribution_shift: ShiftConfig | None
    mask_padding_attention: bool
    use_effective_length_for_schedule: bool

    @property
    def latent_channels(self) -> int:
        return self.dit.io_channels

    @property
    def samples_per_frame(self) -> int:
        return self.autoencoder.downsampling_ratio

    @property
    def native_seconds(self) -> float:
        """Longest clip in seconds: whole seconds, or the exact quotient of a model shorter than one second."""
        whole = self.sample_size // self.sample_rate_hz
        return float(whole) if whole else self.sample_size / self.sample_rate_hz
