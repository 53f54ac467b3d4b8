"""A frozen Stable Audio 3 base: audio, prompts and noisy latents in; latents, embeddings and velocity out.

Legend: B batch, C channels or conditioning width, N samples, D latent channels, T latent frames, L prompt tokens.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sa3dist.errors import CheckpointError
from sa3dist.formats import digest_of
from sa3dist.model.checkpoint import fill, tensors_sha256
from sa3dist.model.conditioners import Conditioners
from sa3dist.model.config import ModelConfig
from sa3dist.model.digest_cache import DigestCache
from sa3dist.model.dit import DiT, working_dtype
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.generation import Generation
from sa3dist.model.packing import FilledPacking, Packing
from sa3dist.model.same import Autoencoder, Decoder, Encoder
from sa3dist.model.text import TextEncoder, TextSource, require_list

MODEL_PREFIX = "model."
CONDITIONER_PREFIX = "conditioner."
AUTOENCODER_PREFIX = "pretransform.model."


def weight_key(layer: str) -> str:
    """The checkpoint's key of an adaptable layer's weight, by adapter-relative layer name."""
    prefix = CONDITIONER_PREFIX if layer.startswith("conditioners.") else MODEL_PREFIX
    return f"{prefix}{layer}.weight"


def wrapped(model: nn.Module) -> nn.ModuleDict:
    """``model`` as a child named "model", as the official key names require."""
    return nn.ModuleDict({"model": model})


class Base(nn.Module):
    """The frozen network that adapters attach to. Its state-dict keys are those of the official file.

    config         ModelConfig
    weights        source of the tensors: a CheckpointFile, or random weights
    device, dtype  of the parameters; rotary tables, conditioning features and SAME stay float32
    text_source    where to look for the text encoder on first use; None: this base has none
    encoder        whether to load the SAME encoder now. Otherwise it loads on first use, as do decoder and text encoder
    """

    def __init__(
        self, config: ModelConfig, weights, device, dtype: torch.dtype, text_source: TextSource | None, encoder: bool
    ):
        super().__init__()
        self.config = config
        self.sample_rate_hz, self.samples_per_frame = config.sample_rate_hz, config.samples_per_frame
        self.latent_channels = config.latent_channels
        # The longest clip the model was trained for, and the length in tokens that prompts are padded or cut to.
        self.native_seconds, self.prompt_tokens = config.native_seconds, config.prompt.max_length
        self.weights = weights
        self.text_source = text_source
        self.text_encoder: TextEncoder | None = None
        self.digest_cache: DigestCache | None = None
        # Set by an attached adapter: a context in which W' is formed once instead of at every use.
        self.formed_once: Callable[[Base], contextlib.AbstractContextManager] = contextlib.nullcontext
        with torch.device("meta"):
            self.model = wrapped(DiT(config.dit))
            self.conditioner = Conditioners(config)
            self.pretransform = wrapped(Autoencoder(config.autoencoder, parts=("encoder",) if encoder else ()))
        for name, child in self.named_children():
            # SAME stays float32: its latents are the training data, encoded once.
            wide = torch.promote_types(dtype, torch.float32) if child is self.pretransform else dtype
            fill(child, f"{name}.", weights, device, wide)
        self.eval()

    @property
    def dit(self) -> DiT:
        return self.model.model

    @property
    def autoencoder(self) -> Autoencoder:
        return self.pretransform.model

    @property
    def dtype(self) -> torch.dtype:
        return self.dit.dtype

    def _working_dtype(self) -> torch.dtype:
        return working_dtype(self.dtype, self.device)

    @property
    def device(self) -> torch.device:
        return self.dit.transformer.layers[0].to_scale_shift_gate.device

    @property
    def adapter_roots(self) -> tuple[nn.Module, nn.Module]:
        """The modules that adapter layer names are relative to."""
        return self.model, self.conditioner

    @property
    def recomputed_blocks(self) -> int:
        """How many blocks are recomputed in the backward pass instead of saving their activations."""
        return self.dit.transformer.recomputed_blocks

    @recomputed_blocks.setter
    def recomputed_blocks(self, count: int) -> None:
        self.dit.transformer.recomputed_blocks = count

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether all blocks are recomputed; setting it recomputes all or none."""
        return self.recomputed_blocks >= self.config.dit.depth

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.recomputed_blocks = self.config.dit.depth if on else 0

    @property
    def reference_numerics(self) -> bool:
        """Whether to round t, seconds and rotary frequencies to the base's dtype, as the reference does when cast."""
        return self.dit.reference_numerics

    @reference_numerics.setter
    def reference_numerics(self, on: bool) -> None:
        self.dit.reference_numerics = on

    def frequency_tables(self) -> dict[str, Tensor]:
        """Frequencies of sines and cosines, by name. All ranks of a run must hold equal ones."""
        rotary = {name: value for name, value in self.dit.named_buffers() if name.endswith("inv_freq")}
        return {"Fourier": expo_frequencies(self.device), **rotary}

    def fp32_weight(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A layer's weight in float32 on ``device``, read from the checkpoint, by adapter-relative layer name."""
        return self.weights.read(weight_key(name), None, device, torch.float32)

    def weights_digest(self) -> str:
        """Hex SHA-256 of the checkpoint file; computed once per process, or read from ``digest_cache``."""
        return self._cached_digest("file", lambda: self.weights.digest)

    def begin_digests(self) -> None:
        """Start computing the three digests in threads; requires ``digest_cache``."""
        self.digest_cache.begin(self.weights.path, "file", lambda: self.weights.digest)
        self.digest_cache.begin(self.weights.path, *self._named_autoencoder_digest())
        if self.text_source is not None:
            self.text_source.begin_digest(self.digest_cache)

    def _cached_digest(self, what: str, make: Callable[[], str]) -> str:
        return make() if self.digest_cache is None else self.digest_cache.of(self.weights.path, what, make)

    def autoencoder_digest(self) -> str:
        """Hex SHA-256 of the weights that ``encode_audio`` depends on; two bases may share an autoencoder."""
        return self._cached_digest(*self._named_autoencoder_digest())

    def _named_autoencoder_digest(self) -> tuple[str, Callable[[], str]]:
        parts = (f"{AUTOENCODER_PREFIX}encoder.", f"{AUTOENCODER_PREFIX}bottleneck.")
        names = sorted(key for key in self.weights.shapes if key.startswith(parts))
        described = repr(self.config.autoencoder.encoder)
        return f"autoencoder {digest_of(described)}", lambda: tensors_sha256(self.weights, names, described)

    def text_encoder_digest(self) -> str:
        """Hex SHA-256 of the text encoder's files. Raises CheckpointError if the base has none."""
        return self._require_text_source().digest(self.digest_cache)

    @torch.no_grad()
    def encode_audio(self, audio_BCN: Tensor) -> Tensor:
        """Latents (B, D, ceil(N / samples_per_frame)), float32, without noise.

        audio_BCN   any float dtype, N >= 1 samples at ``sample_rate_hz``, C the model's channels (2)
        Raises ValueError for another shape; the reader of a mono clip duplicates its channel.
        """
        channels = self.config.audio_channels
        if audio_BCN.ndim != 3 or audio_BCN.shape[1] != channels or audio_BCN.shape[2] < 1:
            raise ValueError(f"audio is {tuple(audio_BCN.shape)}, expected (batch, {channels}, at least 1 sample)")
        first = self._load_part("encoder", Encoder)
        with torch.autocast(first.device.type, enabled=False):
            return self.autoencoder.encode(audio_BCN.to(first.device, first.dtype)).float()

    @torch.no_grad()
    def decode_latents(self, latents_BDT: Tensor) -> Tensor:
        """Audio (B, C, T * samples_per_frame), float32, without noise; not clamped."""
        channels = self.latent_channels
        if latents_BDT.ndim != 3 or latents_BDT.shape[1] != channels or latents_BDT.shape[2] < 1:
            raise ValueError(f"latents are {tuple(latents_BDT.shape)}, expected (batch, {channels}, at least 1 frame)")
        first = self._load_part("decoder", Decoder)
        with torch.autocast(first.device.type, enabled=False):
            return self.autoencoder.decode(latents_BDT.to(first.device, first.dtype)).float()

    def _load_part(self, name: str, kind: type[nn.Module]) -> Tensor:
        """Load one half of the autoencoder if needed; returns a tensor with its device and dtype."""
        like = self.autoencoder.bottleneck.scaling_factor
        if getattr(self.autoencoder, name) is None:
            with torch.device("meta"):
                part = kind(getattr(self.config.autoencoder, name))
            fill(part, f"{AUTOENCODER_PREFIX}{name}.", self.weights, like.device, like.dtype)
            setattr(self.autoencoder, name, part)
        return like

    def encode_hidden(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The text encoder's last hidden states (B, L, 768) and mask (B, L), before projection. This is what is cached.

        Raises ValueError for anything but a non-empty list of strings; a bare string would be read as letters.
        """
        require_list(prompts)
        if self.text_encoder is None:
            self.text_encoder = TextEncoder(self._require_text_source(), self.device)
        return self.text_encoder.encode(prompts, self.device)

    def _require_text_source(self) -> TextSource:
        if self.text_source is None:
            raise CheckpointError(f"{self.config.source}: this base has no text encoder; pass text_encoder=/path")
        return self.text_source

    def release_encoders(self) -> None:
        """Drop the text encoder and both halves of SAME from memory; they are loaded again when used."""
        self.text_encoder = None
        self.autoencoder.encoder = None
        self.autoencoder.decoder = None

    def embed_prompts(self, hidden_BLH: Tensor, mask_BL: Tensor) -> Tensor:
        """Embeddings (B, L, C) of hidden states: projection (adapted if attached), then padding. Differentiable."""
        return self.conditioner.prompt(hidden_BLH.to(self.device), mask_BL.to(self.device), self._working_dtype())

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, C) for ``velocity``, and the mask (B, L), True = a token of the prompt."""
        hidden, mask = self.encode_hidden(prompts)
        return self.embed_prompts(hidden, mask), mask

    def assemble(self, prompt_embeds_BLC, prompt_mask_BL, seconds_total_B, drop_cross_B=None) -> tuple[Tensor, Tensor]:
        """The DiT's cross-attention sequence (B, L + 1, C) and its global vector (B, C).

        drop_cross_B   bool: zero the whole sequence of these clips, but not the global vector
        """
        dtype = self._working_dtype()
        seconds = self.conditioner.seconds_total(seconds_total_B, dtype, self.reference_numerics)
        prompt = self.conditioner.prompt.fill_padding(prompt_embeds_BLC, prompt_mask_BL)
        cross = torch.cat([prompt.to(dtype), seconds.to(dtype)], dim=1)
        if drop_cross_B is not None:
            cross = torch.where(drop_cross_B.bool()[:, None, None], cross.new_zeros(()), cross)
        return cross, seconds[:, 0]

    def local_conditioning(self, inpaint_mask_B1T: Tensor | None, inpaint_latents_BDT: Tensor | None) -> Tensor | None:
        """Mask and masked latents as channels (B, D + 1, T); without them zeros of one frame, which stands for all."""
        width = self.config.dit.local_add_cond_dim
        if inpaint_mask_B1T is None and inpaint_latents_BDT is None:
            return None if width is None else torch.zeros(1, width, 1, device=self.device, dtype=self._working_dtype())
        if inpaint_mask_B1T is None or inpaint_latents_BDT is None:
            raise ValueError("inpaint_mask and inpaint_latents come together or not at all")
        if width is None:
            raise ValueError(f"{self.config.source}: this model takes no inpainting conditioning")
        mask = inpaint_mask_B1T.to(inpaint_latents_BDT.dtype)
        return torch.cat([mask, inpaint_latents_BDT * mask], dim=1)

    def velocity(
        self,
        x_BDT: Tensor,
        t_B: Tensor,
        prompt_embeds_BLC: Tensor,
        prompt_mask_BL: Tensor,
        seconds_total_B: Tensor,
        padding_mask_BT: Tensor | None = None,
        inpaint_mask_B1T: Tensor | None = None,
        inpaint_latents_BDT: Tensor | None = None,
        drop_cross_B: Tensor | None = None,
        prompt_length: int | None = None,
        packing: Packing | FilledPacking | None = None,
    ) -> Tensor:
        """Velocity (noise - data) of noisy latents, (B, D, T), float32; gradients reach adapters only.

        x_BDT, t_B           noisy latents and their time, 0 data .. 1 noise
        prompt_embeds_BLC, prompt_mask_BL   from ``encode_prompts``; padding is filled in again
        seconds_total_B      seconds of the whole item
        padding_mask_BT      True = valid; other frames are not attended to
        inpaint_mask_B1T, inpaint_latents_BDT   1 = given context; clean latents, which are masked here
        drop_cross_B         True = no prompt and no seconds token for this clip (guidance dropout)
        prompt_length        length of the whole prompt if fewer positions are passed: the last one, padding in every
                             clip, stands for the missing ones, and its projections are computed once
        packing              precomputed from the padding mask; padded frames are then not computed, but zero
        """
        cross, embed = self.assemble(prompt_embeds_BLC, prompt_mask_BL, seconds_total_B, drop_cross_B)
        local = self.local_conditioning(inpaint_mask_B1T, inpaint_latents_BDT)
        mask = None if padding_mask_BT is None else padding_mask_BT.bool()
        last = prompt_embeds_BLC.shape[1] - 1
        equal = (prompt_length or last + 1) - last
        return self.dit(x_BDT, t_B, cross, embed, local, mask, (last, equal) if equal > 1 else None, packing)

    def generate(
        self, prompts: list[str], seconds: float, steps: int = 50, cfg_scale: float = 7.0, seed: int = 0
    ) -> Tensor:
        """Audio (B, C, int(seconds * rate)) of the prompts, float32 on the CPU, -1 .. 1: see ``Generation``.

        Raises ConfigError for what this model cannot generate, ValueError as ``encode_hidden`` does.
        """
        require_list(prompts)
        with self.formed_once(self):
            clips = Generation(seconds, steps, cfg_scale, seed).clips(self, list(enumerate(prompts)))
            return torch.stack([audio_CN for _, audio_CN in clips])

    def forward(self, *arguments, **keywords) -> Tensor:
        """``velocity``, for wrappers that call the module."""
        return self.velocity(*arguments, **keywords)
