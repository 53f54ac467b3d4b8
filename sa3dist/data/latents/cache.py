"""Cache of latents and prompt features on disk: encoded once per clip and caption, looked up by content.

Encoding on first use writes one file per item; ``encode.pack_latents`` packs these into shards.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from sa3dist.data.latents.shards import (
    FLIPPED,
    LATENTS,
    PROMPT,
    Encoders,
    LatentShard,
    LatentShards,
    Name,
    member_name,
    read_member,
)
from sa3dist.data.latents.tensor_files import unpack_tensors, write_tensors
from sa3dist.data.source.audio import load_clip_audio
from sa3dist.data.source.resample import resampled_length
from sa3dist.errors import DataError, EnvironmentFailure
from sa3dist.flow.crops import polarity_of_slot
from sa3dist.formats import ClipEntry, DatasetIndex, digest_of
from sa3dist.model.base import Base

# Frames of silence stored after every clip: more than twice SAME-L's reach (12 layers x 1 frame), so that the clip's
# end decays as it does in a long padded clip. As many again are encoded and cut off: the sequence's end affects them.
SILENCE_TAIL_FRAMES = 32
# Minimum time between scans for new shards: scanning a thousand takes milliseconds, and every clip asks.
RESCAN_SECONDS = 10.0
# Part of every file name. Change it whenever the stored values change, so that old files are not found.
ENCODING_VERSION = "1"


@dataclasses.dataclass(frozen=True)
class ClipLatents:
    """Latents of one whole clip in one polarity, followed by silence.

    latents_DT     float32 (D, valid_frames + SILENCE_TAIL_FRAMES)
    silence_D2     float32 (D, 2): latents of steady silence at even and odd frames (SAME-S works on pairs of frames)
    peaks_T        float32 (valid_frames,): largest absolute sample of each frame
    """

    latents_DT: torch.Tensor
    silence_D2: torch.Tensor
    peaks_T: torch.Tensor

    @property
    def valid_frames(self) -> int:
        return len(self.peaks_T)

    def window(self, start: int, frames: int) -> torch.Tensor:
        """Frames start..start+frames, float32 (D, frames); steady silence past the stored tail."""
        stored = self.latents_DT[:, start : start + frames]
        missing = torch.arange(start + stored.shape[1], start + frames)
        return torch.cat([stored, self.silence_D2[:, missing % 2]], dim=1) if len(missing) else stored


class EncodedClips:
    """Reads and writes the latents and prompt features of one dataset for one base."""

    keep = True

    def __init__(
        self, index: DatasetIndex, work_dir: Path, base: Base, autoencoder_digest: str, text_encoder_digest: str
    ) -> None:
        """base: gives sample rate and frame size. The digests of its encoders are part of the file names."""
        self.index = index
        self.clips = index.clips
        self.sample_rate_hz: int = base.sample_rate_hz
        self.samples_per_frame: int = base.samples_per_frame
        self.prompt_tokens: int = base.prompt_tokens
        self._latents_dir = Path(work_dir) / "latents"
        self._prompts_dir = Path(work_dir) / "prompts"
        self._silence_D2: torch.Tensor | None = None
        framing = self.sample_rate_hz, self.samples_per_frame, base.latent_channels, self.prompt_tokens
        encoders = Encoders(ENCODING_VERSION, autoencoder_digest, text_encoder_digest, *framing)
        self.shards = LatentShards(Path(work_dir) / "latent_shards", encoders)
        name = digest_of(*map(str, dataclasses.astuple(encoders)), index.digest)
        # Folder for the shards of this data set and base.
        self.shards_dir = Path(work_dir) / "latent_shards" / name[:16]
        self.shards.load(self.shards_dir)

    def add_shards(self, shards: Iterable[LatentShard]) -> None:
        """Also read from these shards. Raises DataError, naming the shard, if a different encoder wrote one."""
        for shard in shards:
            difference = self.shards.encoders.difference(shard.encoders)
            if difference:
                raise DataError(
                    f"{shard.path}: encoded with {difference}; give the model it was encoded with, or the audio"
                )
            self.shards.add(shard)

    def latents_path(self, clip: ClipEntry, flipped: bool) -> Path:
        name = digest_of(ENCODING_VERSION, self.shards.encoders.autoencoder, clip.audio_sha256, str(flipped))
        return self._latents_dir / name[:2] / f"{name}.safetensors"

    def prompt_path(self, caption: str) -> Path:
        name = digest_of(ENCODING_VERSION, self.shards.encoders.text_encoder, str(self.prompt_tokens), caption)
        return self._prompts_dir / name[:2] / f"{name}.safetensors"

    def has_latents(self, clip: ClipEntry, flipped: bool) -> bool:
        """Whether a clip is encoded, in a shard or a single file."""
        return self._has(member_name(clip, _kind(flipped)), self.latents_path(clip, flipped))

    def has_prompt(self, caption: str) -> bool:
        return self._has((PROMPT, caption), self.prompt_path(caption))

    def _has(self, name: Name, path: Path) -> bool:
        # At worst an item that another process has just packed into a shard is encoded again.
        return bool(self.shards.find(name) or path.exists() or self.shards.search(name, RESCAN_SECONDS))

    def latents(self, clip: ClipEntry, flipped: bool) -> ClipLatents:
        """Raises EnvironmentFailure, naming file and clip, if the file is damaged or holds a non-finite value."""
        name = member_name(clip, _kind(flipped))
        tensors = self._tensors(name, self.latents_path(clip, flipped), f"latents of clip {clip.key}")
        return clip_latents(tensors)

    def prompt(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (L, H) and mask (L,) of a caption, zero-padded at the end to the prompt length."""
        what = f"prompt features of caption {caption[:40]!r}"
        tensors = self._tensors((PROMPT, caption), self.prompt_path(caption), what)
        return padded_prompt(tensors["hidden"], self.prompt_tokens)

    def _tensors(self, name: Name, path: Path, what: str) -> dict[str, torch.Tensor]:
        content, where = self._content(name, path, what)
        # Shard members have already been checked against the digest of all their bytes.
        return unpack_tensors(content, where, what, compare=where == path)

    def member(self, clip: ClipEntry, kind: str) -> bytes:
        """Verified bytes of one shard member. kind: LATENTS, FLIPPED, or PROMPT (features of the clip's caption)."""
        if kind == PROMPT:
            path, what = self.prompt_path(clip.caption), f"prompt features of caption {clip.caption[:40]!r}"
        else:
            path, what = self.latents_path(clip, kind == FLIPPED), f"latents of clip {clip.key}"
        content, where = self._content(member_name(clip, kind), path, what)
        # Verify it: a damaged file must not get a valid digest in a shard.
        unpack_tensors(content, where, what)
        return content

    def _content(self, name: Name, path: Path, what: str) -> tuple[bytes, Path]:
        """Bytes of a shard member, else of the file at ``path``; and the path of the shard or file."""
        location = self.shards.find(name)
        if location is None:
            try:
                return path.read_bytes(), path
            except FileNotFoundError as error:
                # Another process may have packed it into a shard meanwhile.
                location = self.shards.search(name)
                if location is None:
                    raise EnvironmentFailure(f"{path}: the {what} are gone; run again") from error
            except OSError as error:
                raise EnvironmentFailure(f"{path}: cannot read the {what} ({error})") from error
        return read_member(*location, what), location[0]

    def slot_bytes(self, clip: ClipEntry) -> int:
        """Bytes of what ``load_slot`` returns: float32 stereo."""
        return 8 * frames_of(clip, self) * self.samples_per_frame

    def load_slot(self, clip: ClipEntry, seed: int, slot: int) -> torch.Tensor | None:
        """Audio to encode for ``slot``; None if already encoded. Thread-safe."""
        return None if self.has_latents(clip, polarity_of_slot(seed, slot)) else self.audio(clip)

    def encode_slot(
        self, base: Base, clip: ClipEntry, seed: int, slot: int, loaded_CN: torch.Tensor | None
    ) -> Path | None:
        """Encode the clip for ``slot`` from what ``load_slot`` returned, unless already encoded.

        Returns the file of this slot's crop, which the caller removes after its last use unless ``keep``; None when
        whole clips are encoded, once for all epochs.
        """
        flipped = polarity_of_slot(seed, slot)
        if not self.has_latents(clip, flipped):
            self.encode_together(base, [(clip, flipped, self.audio(clip) if loaded_CN is None else loaded_CN)])
        return None

    def audio(self, clip: ClipEntry) -> torch.Tensor:
        """The whole clip, float32 (2, n) at the base's sample rate."""
        return load_clip_audio(self.index, clip, self.sample_rate_hz)

    def encode_together(self, base: Base, rows: Sequence[tuple[ClipEntry, bool, torch.Tensor]]) -> None:
        """Encode clips of equal length in frames in one pass; write the files that do not exist yet.

        rows   (clip, flipped, its ``audio``)
        """
        for (clip, flipped, _), tensors in zip(rows, self.encode_rows(base, rows), strict=True):
            if not self.has_latents(clip, flipped):
                write_tensors(self.latents_path(clip, flipped), tensors)

    def encode_rows(
        self, base: Base, rows: Sequence[tuple[ClipEntry, bool, torch.Tensor]]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors to store for each row of ``encode_together``: latents, silence, peaks."""
        frame = self.samples_per_frame
        channels, valid_frames = rows[0][2].shape[0], -(-rows[0][2].shape[1] // frame)
        padded_BCN = torch.zeros(len(rows), channels, (valid_frames + 2 * SILENCE_TAIL_FRAMES) * frame)
        for padded_CN, (_, flipped, audio_CN) in zip(padded_BCN, rows, strict=True):
            padded_CN[:, : audio_CN.shape[1]] = -audio_CN if flipped else audio_CN
        latents_BDT = base.encode_audio(padded_BCN.to(base.device)).float().cpu()
        for latents_DT, (_, _, audio_CN) in zip(latents_BDT, rows, strict=True):
            yield {
                "latents": latents_DT[:, : valid_frames + SILENCE_TAIL_FRAMES].contiguous(),
                "silence": self._steady_silence(base, channels),
                "peaks": frame_peaks(audio_CN, frame),
            }

    def _steady_silence(self, base: Base, channels: int) -> torch.Tensor:
        """Latents of silence far from both ends of a sequence, float32 (D, 2): one even and one odd frame."""
        if self._silence_D2 is None:
            middle = 2 * SILENCE_TAIL_FRAMES
            silent_1CN = torch.zeros(1, channels, 2 * middle * self.samples_per_frame, device=base.device)
            self._silence_D2 = base.encode_audio(silent_1CN)[0, :, middle : middle + 2].float().cpu().contiguous()
        return self._silence_D2

    def encode_prompts(self, base: Base, captions: Sequence[str]) -> None:
        """Encode captions in one pass, unless all are on disk; write those that are not."""
        if all(self.has_prompt(caption) for caption in captions):
            return
        hidden_BLH, mask_BL = base.encode_hidden(list(captions))
        for caption, hidden_LH, mask_L in zip(captions, hidden_BLH, mask_BL, strict=True):
            if not self.has_prompt(caption):
                tokens_LH = hidden_LH[mask_L.bool()].cpu().contiguous()
                write_tensors(self.prompt_path(caption), {"hidden": tokens_LH})


def frames_of(clip: ClipEntry, encoded: EncodedClips) -> int:
    """Number of latent frames of the whole clip, the last one possibly partial."""
    samples = resampled_length(clip.samples, clip.sample_rate_hz, encoded.sample_rate_hz)
    return -(-samples // encoded.samples_per_frame)


def frame_peaks(audio_CN: torch.Tensor, samples_per_frame: int) -> torch.Tensor:
    """Largest absolute sample of each latent frame, float32 (ceil(N / samples_per_frame),)."""
    padding = -audio_CN.shape[1] % samples_per_frame
    padded_CN = torch.nn.functional.pad(audio_CN.abs(), (0, padding))
    return padded_CN.view(audio_CN.shape[0], -1, samples_per_frame).amax(dim=(0, 2))


def _kind(flipped: bool) -> str:
    return FLIPPED if flipped else LATENTS


def clip_latents(tensors: dict[str, torch.Tensor]) -> ClipLatents:
    return ClipLatents(tensors["latents"], tensors["silence"], tensors["peaks"])


def padded_prompt(tokens_LH: torch.Tensor, prompt_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the real tokens as ``EncodedClips.prompt`` returns them."""
    hidden_LH = tokens_LH.new_zeros(prompt_tokens, tokens_LH.shape[1])
    hidden_LH[: len(tokens_LH)] = tokens_LH
    return hidden_LH, torch.arange(prompt_tokens) < len(tokens_LH)
