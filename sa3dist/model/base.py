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
from sa3dist.model.dit import DiT, working_dtype
from sa3dist.model.frequencies import expo_frequencies
from sa3dist.model.generation import Generation
from sa3dist.model.kept_digests import KeptDigests
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
    """A module with one child called ``model``, as the official key names require."""
    return nn.ModuleDict({"model": model})


class Base(nn.Module):
    """The network the adapters attach to. Its state-dict keys are the official file's keys; none of it is trained.

    config        ModelConfig
    weights       where tensors come from: CheckpointFile or the random weights of a benchmark
    device, dtype of the parameters; rotary tables, conditioning features and SAME stay float32
    text_source   where to find the text encoder on first use; None: this base has none
    encoder       load the SAME encoder now; otherwise it loads on first use, as its decoder and the text encoder do
    """

    def __init__(
        self, config: ModelConfig, weights, device, dtype: torch.dtype, text_source: TextSource | None, encoder: bool
    ):
        super().__init__()
        self.config = config
        self.sample_rate_hz, self.samples_per_frame = config.sample_rate_hz, config.samples_per_frame
        self.latent_channels = config.latent_channels
        # The longest clip the model was made for, and the number of tokens every prompt is padded or cut to.
        self.native_seconds, self.prompt_tokens = config.native_seconds, config.prompt.max_length
        self.weights = weights
        self.text_source = text_source
        self.text_encoder: TextEncoder | None = None
        self.kept_digests: KeptDigests | None = None
        # Replaced by an attached adapter: inside this context W' is formed once instead of at every use.
        self.formed_once: Callable[[Base], contextlib.AbstractContextManager] = contextlib.nullcontext
        with torch.device("meta"):
            self.model = wrapped(DiT(config.dit))
            self.conditioner = Conditioners(config)
            self.pretransform = wrapped(Autoencoder(config.autoencoder, parts=("encoder",) if encoder else ()))
        for name, child in self.named_children():
            # SAME stays float32: the run trains on its latents, which are computed once and kept.
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
        """The modules that hold adapter layers; layer names are relative to them."""
        return self.model, self.conditioner

    @property
    def recomputed_blocks(self) -> int:
        """Number of blocks that are recomputed in the backward pass instead of keeping their activations."""
        return self.dit.transformer.recomputed_blocks

    @recomputed_blocks.setter
    def recomputed_blocks(self, count: int) -> None:
        self.dit.transformer.recomputed_blocks = count

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether every block is recomputed. Setting it recomputes all blocks or none."""
        return self.recomputed_blocks >= self.config.dit.depth

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.recomputed_blocks = self.config.dit.depth if on else 0

    @property
    def reference_numerics(self) -> bool:
        """Whether t, seconds and rotary frequencies are rounded to the base's dtype first, as in the cast reference."""
        return self.dit.reference_numerics

    @reference_numerics.setter
    def reference_numerics(self, on: bool) -> None:
        self.dit.reference_numerics = on

    def frequency_tables(self) -> dict[str, Tensor]:
        """Arguments of the sines and cosines, by name. Processes that train one model must hold equal ones."""
        rotary = {name: value for name, value in self.dit.named_buffers() if name.endswith("inv_freq")}
        return {"Fourier": expo_frequencies(self.device), **rotary}

    def fp32_weight(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A layer's weight in float32 on ``device``, read from the checkpoint, by adapter-relative layer name."""
        return self.weights.read(weight_key(name), None, device, torch.float32)

    def weights_digest(self) -> str:
        """Hex SHA-256 that identifies the checkpoint. Reads the file at most once per process, never if it is kept."""
        return self._kept("file", lambda: self.weights.digest)

    def begin_digests(self) -> None:
        """Start computing the three digests in threads; for a base with ``kept_digests``."""
        self.kept_digests.begin(self.weights.path, "file", lambda: self.weights.digest)
        self.kept_digests.begin(self.weights.path, *self._named_autoencoder_digest())
        if self.text_source is not None:
            self.text_source.begin_digest(self.kept_digests)

    def _kept(self, what: str, make: Callable[[], str]) -> str:
        return make() if self.kept_digests is None else self.kept_digests.of(self.weights.path, what, make)

    def autoencoder_digest(self) -> str:
        """Hex SHA-256 of the weights that determine ``encode_audio``; two bases may share an autoencoder."""
        return self._kept(*self._named_autoencoder_digest())

    def _named_autoencoder_digest(self) -> tuple[str, Callable[[], str]]:
        parts = (f"{AUTOENCODER_PREFIX}encoder.", f"{AUTOENCODER_PREFIX}bottleneck.")
        names = sorted(key for key in self.weights.shapes if key.startswith(parts))
        described = repr(self.config.autoencoder.encoder)
        return f"autoencoder {digest_of(described)}", lambda: tensors_sha256(self.weights, names, described)

    def text_encoder_digest(self) -> str:
        """Hex SHA-256 of the text encoder's files. Raises CheckpointError when the base has none."""
        return self._found_text_source().digest(self.kept_digests)

    @torch.no_grad()
    def encode_audio(self, audio_BCN: Tensor) -> Tensor:
        """Latents (B, D, ceil(N / samples_per_frame)), float32, without noise.

        audio_BCN   any float dtype, N >= 1 samples at ``sample_rate_hz``, C the model's channels (2)
        Raises ValueError for another shape: a mono clip is duplicated by its reader, not here.
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
        """Load one half of the autoencoder if it is not in memory; returns one of its tensors, for device and dtype."""
        like = self.autoencoder.bottleneck.scaling_factor
        if getattr(self.autoencoder, name) is None:
            with torch.device("meta"):
                part = kind(getattr(self.config.autoencoder, name))
            fill(part, f"{AUTOENCODER_PREFIX}{name}.", self.weights, like.device, like.dtype)
            setattr(self.autoencoder, name, part)
        return like

    def encode_hidden(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The text encoder's last hidden states (B, L, 768) and mask (B, L), before any projection: what to cache.

        Raises ValueError for anything but a non-empty list of strings: a bare string would count as a list of letters.
        """
        require_list(prompts)
        if self.text_encoder is None:
            self.text_encoder = TextEncoder(self._found_text_source(), self.device)
        return self.text_encoder.encode(prompts, self.device)

    def _found_text_source(self) -> TextSource:
        if self.text_source is None:
            raise CheckpointError(f"{self.config.source}: this base has no text encoder; pass text_encoder=/path")
        return self.text_source

    def release_encoders(self) -> None:
        """Free the text encoder and both halves of SAME; they load again when used again."""
        self.text_encoder = None
        self.autoencoder.encoder = None
        self.autoencoder.decoder = None

    def embed_prompts(self, hidden_BLH: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states to embeddings (B, L, C): projection (adapted if present), then padding. Differentiable."""
        return self.conditioner.prompt(hidden_BLH.to(self.device), mask_BL.to(self.device), self._working_dtype())

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, C) as ``velocity`` takes them, and the mask (B, L), True = a token of the prompt."""
        hidden, mask = self.encode_hidden(prompts)
        return self.embed_prompts(hidden, mask), mask

    def assemble(self, prompt_embeds_BLC, prompt_mask_BL, seconds_total_B, drop_cross_B=None) -> tuple[Tensor, Tensor]:
        """The DiT's cross-attention sequence (B, L + 1, C) and its global vector (B, C).

        drop_cross_B   bool: the whole sequence of these clips becomes zero, the global vector stays
        """
        dtype = self._working_dtype()
        seconds = self.conditioner.seconds_total(seconds_total_B, dtype, self.reference_numerics)
        prompt = self.conditioner.prompt.fill_padding(prompt_embeds_BLC, prompt_mask_BL)
        cross = torch.cat([prompt.to(dtype), seconds.to(dtype)], dim=1)
        if drop_cross_B is not None:
            cross = torch.where(drop_cross_B.bool()[:, None, None], cross.new_zeros(()), cross)
        return cross, seconds[:, 0]

    def local_conditioning(self, inpaint_mask_B1T: Tensor | None, inpaint_latents_BDT: Tensor | None) -> Tensor | None:
        """Mask and masked latents as channels, (B, D + 1, T). If both are None: one frame of zeros for all."""
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

        x_BDT               noisy latents              t_B   0 data .. 1 noise
        prompt_embeds_BLC, prompt_mask_BL              from encode_prompts; padding is filled in again
        seconds_total_B     seconds of the whole item
        padding_mask_BT     True = valid; no frame attends to the others
        inpaint_mask_B1T    1 = given context          inpaint_latents_BDT   clean latents, masked here
        drop_cross_B        True = no prompt and no seconds token for this clip (guidance dropout)
        prompt_length       length of the whole prompt if fewer positions are given: the last given one, which must be
                            padding in every clip, stands for the rest; its projections are then computed once
        packing             precomputed from that padding mask: padded frames are then zero instead of computed
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

        Raises ConfigError for what this model cannot make, ValueError as ``encode_hidden``.
        """
        require_list(prompts)
        with self.formed_once(self):
            made = Generation(seconds, steps, cfg_scale, seed).clips(self, list(enumerate(prompts)))
            return torch.stack([audio_CN for _, audio_CN in made])

    def forward(self, *arguments, **keywords) -> Tensor:
        """``velocity``, for wrappers that call the module itself."""
        return self.velocity(*arguments, **keywords)
