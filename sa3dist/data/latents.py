"""Latents and prompt features on disk: encoded once per clip and caption, found again by content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sa3dist.data.audio import load_clip_audio
from sa3dist.errors import EnvironmentFailure
from sa3dist.formats import ClipEntry, DatasetIndex, atomic_path, digest_of

# Frames of silence kept behind every clip: more than twice SAME-L's reach (12 layers x 1 frame), so that the clip's end
# rings out as it does in one long padded clip; as many again are cut off, because the sequence's end reaches into them.
SILENCE_TAIL_FRAMES = 32
# Changes when anything that decides the stored values changes, and so makes old files unfindable.
ENCODING_VERSION = "1"


@dataclasses.dataclass(frozen=True)
class ClipLatents:
    """Latents of one whole clip in one polarity, with the silence behind it.

    latents_DT     float32 (D, valid_frames + SILENCE_TAIL_FRAMES)
    silence_D2     float32 (D, 2): latents of lasting silence at even and odd frames (SAME-S works on pairs of frames)
    peaks_T        float32 (valid_frames,): largest absolute sample of each frame
    """

    latents_DT: torch.Tensor
    silence_D2: torch.Tensor
    peaks_T: torch.Tensor

    @property
    def valid_frames(self) -> int:
        return len(self.peaks_T)

    def window(self, start: int, frames: int) -> torch.Tensor:
        """Frames start..start+frames, float32 (D, frames); past the stored tail, lasting silence."""
        stored = self.latents_DT[:, start : start + frames]
        missing = torch.arange(start + stored.shape[1], start + frames)
        return torch.cat([stored, self.silence_D2[:, missing % 2]], dim=1) if len(missing) else stored


class EncodedClips:
    """Reader and writer of the latents and prompt features of one dataset under one base."""

    def __init__(
        self, index: DatasetIndex, work_dir: Path, base, autoencoder_digest: str, text_encoder_digest: str
    ) -> None:
        """base: the sa3dist.model.Base whose framing counts; the digests of its encoders name the files."""
        self.index = index
        self.clips = index.clips
        self.sample_rate_hz: int = base.sample_rate_hz
        self.samples_per_frame: int = base.samples_per_frame
        self.prompt_tokens: int = base.prompt_tokens
        self._latents_dir = Path(work_dir) / "latents"
        self._prompts_dir = Path(work_dir) / "prompts"
        self._autoencoder = autoencoder_digest
        self._text_encoder = text_encoder_digest
        self._silence_D2: torch.Tensor | None = None

    def latents_path(self, clip: ClipEntry, flipped: bool) -> Path:
        name = digest_of(ENCODING_VERSION, self._autoencoder, clip.audio_sha256, str(flipped))
        return self._latents_dir / name[:2] / f"{name}.safetensors"

    def prompt_path(self, caption: str) -> Path:
        name = digest_of(ENCODING_VERSION, self._text_encoder, str(self.prompt_tokens), caption)
        return self._prompts_dir / name[:2] / f"{name}.safetensors"

    def latents(self, clip: ClipEntry, flipped: bool) -> ClipLatents:
        """Raises EnvironmentFailure, naming file and clip, when the file is damaged or holds a non-finite value."""
        tensors = read_tensors(self.latents_path(clip, flipped), f"latents of clip {clip.key}")
        return ClipLatents(tensors["latents"], tensors["silence"], tensors["peaks"])

    def prompt(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (L, H) and mask (L,) of a caption, padded to the prompt length with zeros, real tokens first."""
        tensors = read_tensors(self.prompt_path(caption), f"prompt features of caption {caption[:40]!r}")
        tokens_LH = tensors["hidden"]
        hidden_LH = tokens_LH.new_zeros(self.prompt_tokens, tokens_LH.shape[1])
        hidden_LH[: len(tokens_LH)] = tokens_LH
        return hidden_LH, torch.arange(self.prompt_tokens) < len(tokens_LH)

    def lacks(self, clip: ClipEntry) -> bool:
        """Whether the latents of either polarity are still to be made."""
        return not all(self.latents_path(clip, flipped).exists() for flipped in (False, True))

    def encode_latents(self, base, clip: ClipEntry, flipped: bool) -> None:
        """Encode one clip and publish its file, unless that is done already."""
        if not self.latents_path(clip, flipped).exists():
            self.encode_together(base, [(clip, flipped, self.audio(clip))])

    def audio(self, clip: ClipEntry) -> torch.Tensor:
        """The whole clip, float32 (2, n) at the base's sample rate."""
        return load_clip_audio(self.index, clip, self.sample_rate_hz)

    def encode_together(self, base, rows: Sequence[tuple[ClipEntry, bool, torch.Tensor]]) -> None:
        """Encode clips of one length in frames in one pass; publish the files that are not there yet.

        rows   (clip, flipped, its ``audio``)
        """
        frame = self.samples_per_frame
        channels, valid_frames = rows[0][2].shape[0], -(-rows[0][2].shape[1] // frame)
        padded_BCN = torch.zeros(len(rows), channels, (valid_frames + 2 * SILENCE_TAIL_FRAMES) * frame)
        for padded_CN, (_, flipped, audio_CN) in zip(padded_BCN, rows, strict=True):
            padded_CN[:, : audio_CN.shape[1]] = -audio_CN if flipped else audio_CN
        latents_BDT = base.encode_audio(padded_BCN.to(base.device)).float().cpu()
        for latents_DT, (clip, flipped, audio_CN) in zip(latents_BDT, rows, strict=True):
            path = self.latents_path(clip, flipped)
            if path.exists():
                continue
            tensors = {
                "latents": latents_DT[:, : valid_frames + SILENCE_TAIL_FRAMES].contiguous(),
                "silence": self._lasting_silence(base, channels),
                "peaks": frame_peaks(audio_CN, frame),
            }
            write_tensors(path, tensors)

    def _lasting_silence(self, base, channels: int) -> torch.Tensor:
        """Latents of silence far from both ends of a sequence, float32 (D, 2): an even frame and an odd one."""
        if self._silence_D2 is None:
            middle = 2 * SILENCE_TAIL_FRAMES
            silent_1CN = torch.zeros(1, channels, 2 * middle * self.samples_per_frame, device=base.device)
            self._silence_D2 = base.encode_audio(silent_1CN)[0, :, middle : middle + 2].float().cpu().contiguous()
        return self._silence_D2

    def encode_prompts(self, base, captions: Sequence[str]) -> None:
        """Encode captions in one pass unless all are on disk already; publish the files that are not there yet."""
        if all(self.prompt_path(caption).exists() for caption in captions):
            return
        hidden_BLH, mask_BL = base.encode_hidden(list(captions))
        for caption, hidden_LH, mask_L in zip(captions, hidden_BLH, mask_BL, strict=True):
            path = self.prompt_path(caption)
            if not path.exists():
                write_tensors(path, {"hidden": hidden_LH[mask_L.bool()].cpu().contiguous()})


def frame_peaks(audio_CN: torch.Tensor, samples_per_frame: int) -> torch.Tensor:
    """Largest absolute sample of each latent frame, float32 (ceil(N / samples_per_frame),)."""
    missing = -audio_CN.shape[1] % samples_per_frame
    padded_CN = torch.nn.functional.pad(audio_CN.abs(), (0, missing))
    return padded_CN.view(audio_CN.shape[0], -1, samples_per_frame).amax(dim=(0, 2))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={"sha256": _digest_of_tensors(tensors)}))


def _digest_of_tensors(tensors: dict[str, torch.Tensor]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


def read_tensors(path: Path, what: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``write_tensors`` file. Raises EnvironmentFailure, naming it, when they are not as written."""
    try:
        content = path.read_bytes()
        tensors = load(content)
        # The first 8 bytes of a safetensors file are the length of its JSON header.
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        expected = json.loads(header)["__metadata__"]["sha256"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise EnvironmentFailure(f"{path}: cannot read the {what} ({error}); delete the file and run again") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise EnvironmentFailure(f"{path}: the {what} hold a non-finite value; delete the file and run again")
    if _digest_of_tensors(tensors) != expected:
        raise EnvironmentFailure(f"{path}: the {what} do not match their digest; delete the file and run again")
    return tensors
